"""Tests of what requests and answers look like."""
