"""Test-time compute: Markovian RSA (arXiv 2605.05365, section VI) over any model."""
