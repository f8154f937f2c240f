"""Mistakes that a user can correct."""


class UserError(Exception):
    """A mistake in a flag, config, file or data set: one line that names it and the remedy."""
