"""Requests and answers in the form of OpenAI's API, for batch files and the server."""
