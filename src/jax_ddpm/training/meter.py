"""Metrics from the device to files and the terminal."""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jax_ddpm.errors import UserError
from jax_ddpm.tasks.objective import Metrics


def weighted_means(sums: Mapping[str, Any]) -> dict[str, float]:
    """Total over weight of each metric with any weight."""
    return {name: float(total / weight) for name, (total, weight) in sums.items() if weight > 0}


class NonFinite(UserError):
    """A loss or gradient that is not finite; ``step`` and ``quantities`` say where."""

    def __init__(self, step: int, quantities: list[str]):
        self.step, self.quantities = step, quantities
        super().__init__(
            f"step {step}: {' and '.join(quantities)} not finite; the update was not applied. "
            "Lower training.learning_rate or train with model.dtype=float32"
        )


class Meter:
    """Writes the means of metrics over a fixed number of steps; fetches late, so no device waits.

    The metrics of a dispatch of steps are read only when ``lag`` more are under way, which also
    bounds how far the host runs ahead. A line covers the same steps however the run was
    interrupted.
    """

    def __init__(
        self,
        batch_size: int,
        every: int,
        write: Callable[[int, dict[str, float]], None],
        lag: int = 2,
    ):
        self._batch_size, self._every, self._write, self._lag = batch_size, every, write, lag
        self._pending: deque[tuple[int, Metrics]] = deque()
        self._sums: dict[str, np.ndarray] = {}
        self._done = 0
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._timed_steps, self._start = 0, time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics ``[steps]`` of the steps just dispatched, beginning with ``step``, and
        fetches those of older ones.

        Raises:
          NonFinite: naming the first step whose loss or gradient was not finite.
        """
        self._pending.append((step, metrics))
        self._fetch(self._lag)

    def _fetch(self, leave: int) -> None:
        while len(self._pending) > leave:
            first, metrics = self._pending.popleft()
            columns = {
                name: np.array(pair, float).reshape(2, -1)
                for name, pair in jax.device_get(metrics).items()
            }
            for i in range(columns["finite"].shape[1]):
                self._take(first + i, {name: pair[:, i] for name, pair in columns.items()})

    def _take(self, step: int, sums: dict[str, np.ndarray]) -> None:
        if sums.pop("finite")[0] < 1:
            bad = [
                name
                for kind in ("loss", "gradient_norm")
                for name in sums
                if name.endswith(kind) and not np.isfinite(sums[name][0])
            ]
            raise NonFinite(step, bad)
        self._sums = {name: self._sums.get(name, 0) + pair for name, pair in sums.items()}
        self._timed_steps, self._done = self._timed_steps + 1, step + 1
        if self._done % self._every == 0:
            self._write_line()

    def _write_line(self) -> None:
        means = weighted_means(self._sums)
        seconds = time.perf_counter() - self._start
        means["images_per_second"] = self._timed_steps * self._batch_size / seconds
        self._write(self._done, means)
        self._sums = {}
        self._restart_clock()

    def finish(self) -> None:
        """Writes the rest at the end of a run."""
        self._fetch(0)
        if self._sums:
            self._write_line()

    def state(self) -> dict[str, list[float]]:
        """Waits for all steps so far; returns the sums that no line holds yet, for JSON."""
        self._fetch(0)
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def restore(self, done: int, state: Mapping[str, list[float]]) -> None:
        """Goes on from the sums of a run that was interrupted after ``done`` steps."""
        self._done = done
        self._sums = {name: np.array(pair, float) for name, pair in state.items()}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for all steps so far, then leaves the time spent inside out of the rate."""
        self._fetch(0)
        pause = time.perf_counter()
        yield
        self._start += time.perf_counter() - pause


class MetricWriter:
    """Writes scalars to ``metrics.jsonl`` and TensorBoard files in the workdir.

    A run that resumes after ``step`` steps goes on at byte ``position`` of ``metrics.jsonl``: lines
    that it wrote beyond, before it was interrupted, are dropped.
    """

    def __init__(self, workdir: pathlib.Path, step: int = 0, position: int = 0):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        path = workdir / "metrics.jsonl"
        path.touch()
        held = path.stat().st_size
        if held < position:
            warnings.warn(f"{path}: {position - held} bytes of the log are lost", stacklevel=2)
        elif held and not step:
            warnings.warn(f"{path}: begun anew, as no checkpoint was finished", stacklevel=2)
        self._lines = path.open("r+b")
        self._lines.truncate(min(position, held))
        self._lines.seek(0, os.SEEK_END)
        board = workdir / "tensorboard"
        if not step:
            shutil.rmtree(board, ignore_errors=True)
        board.mkdir(exist_ok=True)
        # Not SummaryWriter: its thread dies silently on a full disk, and then blocks this one.
        self._board = EventsWriter(str(board / "events"))
        # TensorBoard drops the events of earlier files from this step on.
        self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        for file in (self._lines, self._board):
            with contextlib.suppress(OSError):  # a failed write has left data in a buffer
                file.close()

    @property
    def position(self) -> int:
        """Length of ``metrics.jsonl`` in bytes, all of them on disk."""
        os.fsync(self._lines.fileno())
        return self._lines.tell()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes one line, and one point per scalar, at this step."""
        from tensorboardX.summary import scalar

        self._lines.write(json.dumps({"step": step} | scalars).encode() + b"\n")
        self._lines.flush()
        for name, value in scalars.items():
            self._event(step, summary=scalar(name, value))
        self._board.flush()

    def _event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._board.write_event(Event(step=step, wall_time=time.time(), **content))


class Progress:
    """A bar with step, loss, images/s and the time left; plain lines without a terminal.

    ``silent`` shows nothing; all processes except the first are silent.
    """

    def __init__(self, num_steps: int, done: int = 0, silent: bool = False):
        self._silent = silent
        self._num_steps, self._resumed, self._start = num_steps, done, time.perf_counter()
        self._bar = None
        if sys.stderr.isatty() and not silent:
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=done, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """Advances by this many dispatched steps."""
        if self._bar is not None:
            self._bar.update(count)

    def show(self, step: int, scalars: dict[str, float]) -> None:
        """Shows the figures of the last stretch, after ``step`` steps."""
        losses = [name for name in scalars if f"/{name}".endswith("/loss")]  # one for each phase
        told = ", ".join(f"{name} {scalars[name]:.4f}" for name in losses)
        rate = scalars["images_per_second"]
        if self._bar is not None:
            self._bar.set_postfix_str(f"{told}, {rate:,.0f} images/s")
            return
        elapsed = time.perf_counter() - self._start
        left = elapsed / max(1, step - self._resumed) * (self._num_steps - step)
        self.say(
            f"step {step:,}/{self._num_steps:,}  {told}  {rate:,.0f} images/s  "
            f"{_clock(elapsed)} elapsed, {_clock(left)} left"
        )

    def say(self, line: str) -> None:
        """Shows a line above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif not self._silent:
            with contextlib.suppress(OSError):  # nobody reads any more; the run goes on
                print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
