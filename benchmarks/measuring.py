"""How things are measured: programs in alternation, as ratios, beside the machine's own peak.

Alternation makes slow drifts of the machine cancel, but not other work on it. Threads that wait for
one another by spinning, as PyTorch's do on a CPU, let other work slow one side of a comparison a
hundredfold and leave the other unchanged. A report therefore gives the share of the processors that
others took.
"""

import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_ddpm.runtime.devices import place, split

Seconds = dict[str, list[float]]
_LOAD = os.getloadavg()  # before this process adds to it
_QUIET = 0.05  # share of the processors that others may take
_LEAST_SECONDS = 0.5  # the least time of a timing, reached by repeating
_PRODUCTS = 8  # matrix products in a row
_MATRIX_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


class Program(NamedTuple):
    """Something to time: ``launch`` starts it, ``wait`` returns when its result is there."""

    launch: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready


def time_once(program: Program, repeats: int = 1) -> float:
    """Seconds for each of ``repeats`` launches; only the last is waited for."""
    start = time.perf_counter()
    for _ in range(repeats):
        result = program.launch()
    program.wait(result)
    return (time.perf_counter() - start) / repeats


def alternate(programs: dict[str, Program], rounds: int) -> Seconds:
    """Seconds of each program in each round, with the programs taking turns.

    Two launches of each come first, one to compile and one to see how often to repeat it.
    """
    repeats = {}
    for name, program in programs.items():
        time_once(program)
        repeats[name] = max(1, math.ceil(_LEAST_SECONDS / time_once(program)))
    seconds: Seconds = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            seconds[name].append(time_once(program, repeats[name]))
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> tuple[float, list[float]]:
    """Median over rounds of the ratio within a round, and its range."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return statistics.median(ratios), [min(ratios), max(ratios)]


def compared(seconds: Seconds) -> dict[str, Any]:
    """Median seconds of "ours"; beside "theirs" also the speed-up theirs/ours with its range."""
    row: dict[str, Any] = {"seconds": statistics.median(seconds["ours"])}
    if "theirs" in seconds:
        row["their_seconds"] = statistics.median(seconds["theirs"])
        row["speedup"], row["speedup_range"] = ratio(seconds["theirs"], seconds["ours"])
    return row


class Peak(NamedTuple):
    """Large matrix products on every device, the fastest computation of this machine."""

    program: Program
    flops: float

    def share(self, seconds: Seconds, flops: float) -> dict[str, float]:
        """The rate of "ours" and its share of the best round of "peak" (model FLOPs utilisation).

        The peak is the fastest round, since only other work on the machine slows it down.
        """
        rate = flops / statistics.median(seconds["ours"])
        peak = self.flops / min(seconds["peak"])
        return {"tflops": rate / 1e12, "peak_tflops": peak / 1e12, "peak_share": rate / peak}


def matmul_peak(mesh: Mesh, dtype: str) -> Peak:
    """Products of square matrices in ``dtype``, at its default precision."""
    size = _MATRIX_SIZE[jax.default_backend()]
    matrix = np.random.default_rng(0).standard_normal((size, size), np.float32) / size**0.5
    shape = (mesh.size, size, size)
    matrices = place(jnp.broadcast_to(jnp.asarray(matrix, dtype), shape), split(mesh))

    @jax.jit
    def products(matrices: jax.Array) -> jax.Array:
        result = matrices
        for _ in range(_PRODUCTS):
            result = result @ matrices
        return result

    return Peak(Program(lambda: products(matrices)), 2.0 * size**3 * mesh.size * _PRODUCTS)


class Others:
    """The share of the processors that other programs and a virtual machine's host take.

    It counts from now on. Linux reports it; the share is None elsewhere.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        now = self._now()
        if self._start is None or now is None:
            return None
        busy, own, clock = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, (busy - own) / (clock * (os.cpu_count() or 1)))

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds of work of all processors, seconds of this process and its children on them, and
        seconds of the clock."""
        statistics = pathlib.Path("/proc/stat")
        if not statistics.exists():
            return None
        _, *ticks = statistics.read_text().splitlines()[0].split()
        user, nice, system, _, _, *interrupts_and_stolen = map(int, ticks[:8])
        busy = user + nice + system + sum(interrupts_and_stolen)
        own = sum(os.times()[:4])
        return busy / os.sysconf("SC_CLK_TCK"), own, time.monotonic()


_OTHERS = Others()


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """``function(*arguments)`` where nothing is imported, compiled or allocated yet."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def report(doc: str, results: list[dict[str, Any]]) -> None:
    """Prints JSON to the standard output, and the results as a table to the standard error."""
    others = _OTHERS.share()
    versions = {
        name: sys.modules[name].__version__
        for name in ("jax", "flax", "torch", "diffusers", "pytorch_fid")
        if name in sys.modules
    }
    whole = {
        "benchmark": doc.splitlines()[0],
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "load_before": _LOAD,
        "others_share": others,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": versions | {"python": platform.python_version()},
        "results": results,
    }
    print(table(results), file=sys.stderr)
    if others is not None and others > _QUIET:
        print(
            f"warning: other programs took {others:.0%} of the processors; these numbers, the "
            "ratios too, mean nothing: measure again on a quiet machine",
            file=sys.stderr,
        )
    print(json.dumps(whole, indent=2, ensure_ascii=False))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows under the names of their fields; rows may lack some fields."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.rjust, line, widths)) for line in cells)
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    information = pathlib.Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
