"""The mathematics: pure functions over frozen dataclasses, importing jax and numpy only."""
