"""Tests of the text box."""
