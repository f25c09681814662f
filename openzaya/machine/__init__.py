"""This machine and what a model costs on it: facts, formulas, and the plan that joins them."""
