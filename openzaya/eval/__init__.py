"""Evaluation and reports: accuracies with intervals, and pages drawn from a run's files."""
