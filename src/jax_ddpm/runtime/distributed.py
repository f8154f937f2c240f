"""Several processes as one job: agreeing, stopping together and ending.

All run the same program, each on its own devices. The first process decides what depends on files,
and writes; only checkpoints are written by all.
"""

import collections
import contextlib
import json
import os
import pathlib
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_ddpm.errors import UserError
from jax_ddpm.runtime.devices import make_mesh, place_rows, split, whole
from jax_ddpm.runtime.stopping import EXIT_CODE, Poll, Stopped

_POLLS_UNDER_WAY = 2
_deciding = False
# XLA's form of an error: a status and its reason.
_LOST = re.compile("[A-Z_]+: (?s:.*)(?i:gloo|nccl|connection|coordination|barrier|heartbeat)")


def several() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that decides and writes."""
    return not several() or jax.process_index() == 0


@contextlib.contextmanager
def own_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder itself on the first process, a temporary one on the others."""
    if is_first():
        yield folder
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield pathlib.Path(scratch)


def from_first(decide: Callable[[], Any]) -> Any:
    """The value that the first process decides, which JSON can keep, on all processes.

    All must call this at the same place, and it returns no sooner than the first process has
    decided. Calls of this from within ``decide`` stay on the first process.

    Raises:
      UserError: on all processes, where ``decide`` raises one.
    """
    global _deciding
    if not several() or _deciding:
        return decide()
    answer: dict[str, Any] = {}
    if is_first():
        _deciding = True
        try:
            answer = {"value": decide()}
        except UserError as error:
            answer = {"error": str(error)}
        finally:
            _deciding = False
    answer = json.loads(_broadcast(json.dumps(answer).encode()))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def _broadcast(message: bytes) -> bytes:
    """The first process's message."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    buffer = np.zeros(1 << length.bit_length(), np.uint8)  # few sizes: each is compiled
    if is_first():
        buffer[:length] = np.frombuffer(message, np.uint8)
    return multihost_utils.broadcast_one_to_all(buffer)[:length].tobytes()


def require_agreement(facts: Mapping[str, Any]) -> None:
    """Compares facts, a nested dict for JSON, over all processes; all must call this at one place.

    Raises:
      UserError: on all processes, naming one that differs from most, or else from the first.
    """
    if not several():
        return
    from flax.traverse_util import flatten_dict

    told = _gathered(json.dumps(facts, sort_keys=True, default=str).encode())
    usual, _ = collections.Counter(told).most_common(1)[0]
    for process, text in enumerate(told):
        if text != usual:
            held, expected = (flatten_dict(json.loads(each), sep=".") for each in (text, usual))
            name = next(n for n in expected | held if held.get(n) != expected.get(n))
            raise UserError(
                f"process {process} has {name} {held.get(name)!r}, but process "
                f"{told.index(usual)} {expected.get(name)!r}; start all with the same command"
            )


def _gathered(message: bytes) -> list[bytes]:
    """The messages of all processes."""
    lengths = multihost_utils.process_allgather(np.int32(len(message)))
    buffer = np.zeros(1 << int(max(lengths)).bit_length(), np.uint8)
    buffer[: len(message)] = np.frombuffer(message, np.uint8)
    gathered = multihost_utils.process_allgather(buffer)
    return [row[:length].tobytes() for row, length in zip(gathered, lengths, strict=True)]


def shared_poll(poll: Poll) -> Poll:
    """A poll that raises Stopped on all processes at once, when ``poll`` does so on one.

    All must poll at the same places. Each poll reduces the number of the signal over all devices
    and looks at the result from two polls before, so that no device waits for this.
    """
    if not several():
        return poll
    mesh = make_mesh()
    latest = jax.jit(lambda numbers: numbers.max(), out_shardings=whole(mesh))
    under_way: collections.deque[jax.Array] = collections.deque()

    def shared() -> None:
        number = 0
        try:
            poll()
        except Stopped as request:
            number = signal.Signals[str(request)].value
        numbers = np.full(jax.local_device_count(), number, np.int32)
        under_way.append(latest(place_rows(numbers, split(mesh))))
        if len(under_way) > _POLLS_UNDER_WAY and (number := int(under_way.popleft())):
            raise Stopped(signal.Signals(number).name)

    return shared


def lost(error: BaseException | None) -> bool:
    """Whether an error comes from another process having stopped."""
    if error is None or not several():
        return False
    if isinstance(error, RuntimeError | ValueError) and _LOST.match(str(error)):
        return True
    return lost(error.__cause__)


@contextlib.contextmanager
def noticing_loss() -> Iterator[None]:
    """Turns an error that comes from another process having stopped into a UserError."""
    try:
        yield
    except Exception as error:
        if lost(error):
            raise UserError(
                "another process of this job has stopped; the same command for all of them goes "
                "on from the last checkpoint"
            ) from error
        raise


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Leaves with all processes together, or at once with exit code 1 where one fails.

    The others notice: mostly at once, because their exchange of data fails too (``noticing_loss``),
    else when its heartbeat is missed (``launch``); JAX then aborts them (SIGABRT) with a message.
    """
    try:
        yield
    except BaseException as error:
        if several() and not (isinstance(error, SystemExit) and error.code == EXIT_CODE):
            _leave(error)
        raise
    finally:
        if several():
            try:
                with noticing_loss():
                    multihost_utils.sync_global_devices("the end")
            except UserError as error:
                _leave(SystemExit(f"error: {error}"))
            jax.distributed.shutdown()


def _leave(error: BaseException) -> NoReturn:
    if isinstance(error, SystemExit):
        print(error.code, file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(3)  # JAX ends the others once their coordinator is gone; let them print first
    os._exit(1)
