"""Faults that are injected for real: whatever happens on one rank, all end within seconds and the user is told once."""
