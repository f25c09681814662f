"""Rollout pools on other people's systems, and our algorithms in theirs."""
