"""Mistakes that a user can correct."""


class UserError(Exception):
    """A mistake in an argument, config, file or data set: one line that names it and the remedy.

    The library names arguments as flags (``--class=10: …``); ``api`` has the line name them as
    Python does (``label=10: …``).

    Attributes:
      flags: the line as the command line says it.
    """

    def __init__(self, line: str):
        super().__init__(line)
        self.flags = line
