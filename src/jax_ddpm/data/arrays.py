"""Arrays in files, which may be damaged or claim to hold more than they do."""

import math
import os
import pathlib

import numpy as np


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz``, without running anything that it may hold.

    Raises:
      ValueError: saying in a line why it cannot be read.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            require_room(sum(entry.file_size for entry in stored.zip.infolist()))
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # zipfile raises anything on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason) from error


def require_room(num_bytes: int) -> None:
    """Raises ValueError where the machine's memory is smaller than so many bytes."""
    if num_bytes > _memory():
        raise ValueError(
            f"its arrays would take {num_bytes / 2**30:,.1f} GiB, more than this machine's memory"
        )


def _memory() -> int | float:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return math.inf
