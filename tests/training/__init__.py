"""Sampling, checkpoints and the training loop."""
