"""Tests of mpillama."""
