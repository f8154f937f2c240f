"""Stopping on request: SIGTERM and Ctrl-C end a run between two steps, with everything saved."""

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from there


class Stopped(Exception):
    """Raised at a poll, once stopping was asked for."""


Poll = Callable[[], None]


def never() -> None:
    """The poll of a caller that is never asked to stop."""


class StopRequest:
    """Makes the first SIGTERM or SIGINT a request while entered; a second one acts as usual."""

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._name = ""

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._name = signal.Signals(number).name
        self.__exit__()
        message = f"{self._name}: finishing what is under way, then saving; again to stop at once\n"
        with contextlib.suppress(OSError):  # stderr is gone, with the terminal or `tee`
            os.write(2, message.encode())  # not print: a handler may interrupt one

    def poll(self) -> None:
        """Raises Stopped once a signal has come."""
        if self._name:
            raise Stopped(self._name)
