"""Environments: tasks with a difficulty knob, and verifiers that reward an answer or give no verdict."""
