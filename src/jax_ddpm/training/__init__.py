"""Training: the objective, the pure step, and the loop around it."""
