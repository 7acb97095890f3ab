"""Models against the oracles."""
