"""What a user can mend."""


class UserError(Exception):
    """A mistake in a flag, config, file or data set: one line naming it and the remedy."""
