"""Tests of building and storing graphs."""
