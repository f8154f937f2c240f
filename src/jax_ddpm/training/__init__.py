"""Training: the pure step, the loop around it, and what they cost."""
