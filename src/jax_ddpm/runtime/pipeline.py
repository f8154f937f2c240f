"""Batches on devices, one ahead of the host."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from jax_ddpm.runtime.devices import fetch
from jax_ddpm.runtime.stopping import Poll, Stopped, never

Item = TypeVar("Item")


def run_ahead(
    launch: Callable[[Item], Any], items: Iterable[Item], poll: Poll = never
) -> Iterator[tuple[Item, Any]]:
    """Each item with the result of ``launch(item)``, brought to the host.

    The next item is under way while the caller handles one. ``poll`` is called before each; if it
    raises Stopped, the items under way are yielded first.
    """
    running: deque[tuple[Item, Any]] = deque()
    stopped = None
    for item in items:
        try:
            poll()
        except Stopped as signal:
            stopped = signal
            break
        running.append((item, launch(item)))
        if len(running) == 2:
            done, result = running.popleft()
            yield done, fetch(result)
    for done, result in running:
        yield done, fetch(result)
    if stopped:
        raise stopped
