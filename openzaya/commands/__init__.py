"""Verbs of the command line with many options, and the options that several verbs share."""
