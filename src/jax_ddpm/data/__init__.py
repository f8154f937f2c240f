"""Data sources and the order in which examples are visited."""
