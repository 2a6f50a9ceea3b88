"""Answers' Markdown as safe HTML for the chat page."""
