"""Files that exist whole or not at all, JSON from any file, folders that one job writes into."""

import contextlib
import json
import os
import pathlib
import secrets
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from jax_ddpm.errors import UserError
from jax_ddpm.runtime.distributed import from_first, is_first

_PARTIAL = ".jax_ddpm-partial"
_LOCK = ".lock"


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Yields a new file beside ``path`` to write to, and moves it into place once it is on disk.

    Its folder is made. A reader of ``path``, meanwhile or after a kill or a power cut, finds the
    old file or the new one; of several writers, one. No link is followed. The first process's file
    is kept where several processes of a job write the same one.
    """
    if not is_first():
        with tempfile.TemporaryFile() as scratch:
            yield scratch
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, file = _create_beside(path)
    with file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def _create_beside(path: pathlib.Path) -> tuple[pathlib.Path, BinaryIO]:
    """A new file, locked by its writer, in place of what a killed one has left."""
    import fcntl

    partial = path.with_name(f".{path.name}{_PARTIAL}")
    while True:
        _remove_if_left(partial)
        try:
            file = partial.open("xb")  # which neither opens what is there nor follows a link
        except FileExistsError:  # another process writes it, too
            partial = path.with_name(f".{secrets.token_hex(8)}{_PARTIAL}")
            continue
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is(partial, file.fileno()):  # and was not taken for one that is left
            return partial, file
        file.close()


def _remove_if_left(partial: pathlib.Path) -> None:
    import fcntl

    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        file = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
        stack.callback(os.close, file)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(partial, file):
            partial.unlink()


def read_json(path: pathlib.Path) -> Any:
    """What a file holds as JSON.

    Raises:
      ValueError: where it is no JSON, or nested too deep.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep") from error


@contextlib.contextmanager
def locked(folder: pathlib.Path, name: str, does: str) -> Iterator[None]:
    """Makes a folder, and keeps other jobs that ask for the same out of it.

    ``name`` is the folder as the user knows it, and ``does`` what is done there, for the refusal.
    File systems without locks do without.

    Raises:
      UserError: where another job holds the folder, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        from_first(lambda: _lock(folder, name, does, held))
        yield


def _lock(folder: pathlib.Path, name: str, does: str, held: contextlib.ExitStack) -> None:
    import fcntl

    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            held.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{name}: another process {does} there; wait for it or stop it"
                ) from error
            except OSError:
                pass  # some network file systems have no locks
            if _is(path, file):  # and not one that its holder has removed meanwhile
                break
        held.callback(_remove, path, file)
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{name}: {where} cannot be written ({error.strerror})") from error


def _is(path: pathlib.Path, file: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _remove(path: pathlib.Path, file: int) -> None:
    """Removes the lock, unless it is a file of someone else's, with something in it."""
    with contextlib.suppress(OSError):
        if not os.fstat(file).st_size:
            path.unlink()


def sweep(folder: pathlib.Path) -> list[str]:
    """Removes what killed writers left in a folder that is locked, and names all else in it."""
    names = []
    for path in folder.iterdir():
        if path.name.endswith(_PARTIAL):
            path.unlink()
        elif path.name != _LOCK:
            names.append(path.name)
    return sorted(names)
