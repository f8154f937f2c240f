"""A run's folder: one job at a time trains into it."""

import contextlib
import pathlib
from collections.abc import Iterator

from jax_ddpm.errors import UserError
from jax_ddpm.runtime.distributed import from_first


@contextlib.contextmanager
def claimed(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the folder, and keeps other jobs from training into it meanwhile.

    Raises:
      UserError: where the folder cannot be written, or another job trains there.
    """
    with contextlib.ExitStack() as held:
        from_first(lambda: _claim(workdir, held))
        yield


def _claim(workdir: pathlib.Path, held: contextlib.ExitStack) -> None:
    import fcntl

    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context((workdir / ".lock").open("w"))
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"--workdir={workdir}: another process trains there; wait for it or stop it"
        ) from error
    except OSError:
        pass  # some network file systems have no locks
