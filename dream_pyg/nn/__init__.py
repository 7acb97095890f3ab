"""Layers and losses: message passing, filter gates, alignment."""
