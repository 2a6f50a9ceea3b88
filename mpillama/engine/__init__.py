"""Sequences in, tokens out: rank 0 plans each step, all ranks execute it."""
