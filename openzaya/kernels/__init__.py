"""Kernels in C++ for the machine's CPU, each beside a twin in plain PyTorch that says what it computes."""
