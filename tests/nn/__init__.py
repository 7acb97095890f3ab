"""Layers and losses against the oracles."""
