"""From metrics on the device to files and the terminal."""

import contextlib
import json
import pathlib
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jax_ddpm.errors import UserError
from jax_ddpm.training.state import Metrics


def weighted_means(sums: Mapping[str, Any]) -> dict[str, float]:
    """Total over weight of each metric that has any weight."""
    return {name: float(total / weight) for name, (total, weight) in sums.items() if weight > 0}


class Meter:
    """Means of metrics between two log lines, fetched late so that the device never waits.

    The metrics of a step are read only when ``lag`` more steps are under way, which also bounds how
    far the host runs ahead; a line thus covers the steps up to ``lag`` before it.
    """

    def __init__(self, batch_size: int, lag: int = 2):
        self._batch_size, self._lag = batch_size, lag
        self._pending: deque[tuple[int, Metrics]] = deque()
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._steps, self._start = 0, time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step just dispatched and fetches those of older ones.

        Raises:
          UserError: naming the first step whose loss or gradient was not finite.
        """
        self._pending.append((step, metrics))
        self._fetch(self._lag)

    def _fetch(self, leave: int) -> None:
        while len(self._pending) > leave:
            step, metrics = self._pending.popleft()
            sums = {name: np.array(pair) for name, pair in jax.device_get(metrics).items()}
            if sums.pop("finite")[0] < 1:
                bad = [
                    name
                    for kind in ("loss", "gradient_norm")
                    for name in sums
                    if name.endswith(kind) and not np.isfinite(sums[name][0])
                ]
                raise UserError(
                    f"step {step}: {' and '.join(bad)} not finite; the update was not applied. "
                    "Lower training.learning_rate or train with model.dtype=float32"
                )
            self._sums = {name: self._sums.get(name, 0) + pair for name, pair in sums.items()}
            self._steps += 1

    def means(self) -> dict[str, float]:
        """Means over the fetched steps since the last call, with ``images_per_second``."""
        if not self._steps:
            self._fetch(0)
        means = weighted_means(self._sums)
        seconds = time.perf_counter() - self._start
        means["images_per_second"] = self._steps * self._batch_size / seconds
        self._reset()
        return means

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for all steps so far, then leaves the time spent inside out of the rate."""
        self._fetch(0)
        pause = time.perf_counter()
        yield
        self._start += time.perf_counter() - pause


class MetricWriter:
    """Writes scalars to ``metrics.jsonl`` and TensorBoard files in the workdir, anew."""

    def __init__(self, workdir: pathlib.Path):
        from tensorboardX import SummaryWriter

        shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
        self._lines = (workdir / "metrics.jsonl").open("w")
        self._board = SummaryWriter(str(workdir / "tensorboard"))

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._lines.close()
        self._board.close()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """One line, and one point per scalar, at this step."""
        self._lines.write(json.dumps({"step": step} | scalars) + "\n")
        self._lines.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)


class Progress:
    """A bar with step, loss, images/s and the time left; plain lines where there is no terminal."""

    def __init__(self, num_steps: int):
        self._num_steps, self._start = num_steps, time.perf_counter()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """One more step dispatched."""
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, scalars: dict[str, float]) -> None:
        """The figures of the last stretch, ``step`` steps being done."""
        loss, rate = scalars["loss"], scalars["images_per_second"]
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} images/s")
            return
        elapsed = time.perf_counter() - self._start
        left = elapsed / step * (self._num_steps - step)
        self.say(
            f"step {step:,}/{self._num_steps:,}  loss {loss:.4f}  {rate:,.0f} images/s  "
            f"{_clock(elapsed)} elapsed, {_clock(left)} left"
        )

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
