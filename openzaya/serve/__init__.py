"""The OpenAI-compatible server, and what it makes of a model's text."""
