"""Tests of dream_pyg, laid out like the package."""
