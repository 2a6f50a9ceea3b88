"""An HTTP server in front of the engines of a job: OpenAI's API and a chat page."""
