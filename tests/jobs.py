"""Jobs of several processes on this machine, each forked from one that has imported everything."""

import functools
import os
import pathlib
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from command import FORKSERVER, Result


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Job:
    """A process for each of ``works``, with so many devices each; outputs go into ``folder``."""

    def __init__(
        self,
        folder: pathlib.Path,
        works: Sequence[Callable[[], None]],
        devices: int | Sequence[int] = 1,
    ):
        counts = [devices] * len(works) if isinstance(devices, int) else devices
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.processes = [
            FORKSERVER.Process(target=_run, args=(folder / str(index), count, work))
            for index, (count, work) in enumerate(zip(counts, works, strict=True))
        ]
        for process in self.processes:
            process.start()

    def results(self, seconds: float = 120) -> list[Result]:
        """The result of each process; what is under way after ``seconds`` is killed."""
        for process in self.processes:
            process.join(seconds)
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
            process.join()
        results = [
            Result(
                process.exitcode,
                without_gloo((self._folder / f"{index}.out").read_text()),
                (self._folder / f"{index}.err").read_text(),
            )
            for index, process in enumerate(self.processes)
        ]
        assert not hanging, results
        return results


def joined(folder: pathlib.Path, count: int, devices: int, work: Callable[[], None]) -> Job:
    """``work`` in so many processes that make one job."""
    port = free_port()
    return Job(
        folder, [functools.partial(_join, port, count, i, work) for i in range(count)], devices
    )


def _join(port, count, index, work):
    from jax_ddpm.runtime.distributed import ending
    from jax_ddpm.runtime.launch import join

    with ending():
        join("manual", f"localhost:{port}", count, index)
        work()


def _run(output, devices, work):
    import jax

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_disable_most_optimizations", True)
    work()


def tells_of_another(result: Result) -> bool:
    """Whether a process ended as it should because another one had."""
    ours = "error: another process of this job has stopped; the same command for all of them"
    jaxs = "This most likely indicates that another task died"
    return (result.returncode == 1 and ours in result.stderr) or (
        result.returncode == -signal.SIGABRT and jaxs in result.stderr
    )


def without_gloo(text: str) -> str:
    """The output without the lines of the library that carries collectives between processes.

    Its threads print in pieces, so that one's line may break another's.
    """
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not _GLOO.fullmatch(line))


_GLOO = re.compile(
    r"(\[Gloo\] Rank |\d+| is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : |\n)+"
)
