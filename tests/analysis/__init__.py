"""Tests of studies and tables."""
