"""Verifiable instructions: constraints on a text, and forms of a short answer, each with its own checker."""
