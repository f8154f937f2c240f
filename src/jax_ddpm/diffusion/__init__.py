"""The mathematics: pure functions over frozen dataclasses, in JAX and NumPy alone."""
