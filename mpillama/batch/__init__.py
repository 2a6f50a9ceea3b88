"""Offline jobs: a file of requests in, a file of answers out, each exactly once."""
