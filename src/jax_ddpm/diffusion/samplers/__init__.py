"""Samplers: each a table of nodes and a pure step, run by the one scan in ``scan``."""
