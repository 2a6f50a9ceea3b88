"""Tests of whole runs: several ranks, the command line, mistakes and failures."""
