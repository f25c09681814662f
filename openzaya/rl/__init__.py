"""Reinforcement learning: the formulas of the RL cascade (arXiv 2605.05365), one idea a file."""
