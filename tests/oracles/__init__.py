"""Slow float64 references, written from the paper alone and sharing no code with the library."""
