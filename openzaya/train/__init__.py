"""Training: optimiser, loss, loop and checkpoints."""
