"""The command line in processes of its own, forked from one that has imported everything.

Starting Python and importing takes seconds, which a test of many short runs cannot afford.
"""

import multiprocessing
import os
import pathlib
import sys
import time
from typing import NamedTuple

from absl import app

ROOT = pathlib.Path(__file__).parent.parent
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "jax_ddpm.main",
        "jax_ddpm.training.preflight",
        "jax_ddpm.inference.sampling",
        "jax_ddpm.training.loop",
        "orbax.checkpoint",
        "PIL.Image",
        "sklearn.datasets",
        "tensorboardX.summary",
        "tiny",
    ]
)


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Run:
    """A command under way. ``prepare`` is called in the new process before anything else."""

    def __init__(self, folder: pathlib.Path, *flags: str, cwd=ROOT, prepare=None):
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        arguments = (flags, str(cwd), str(self._out), str(self._err), prepare)
        self.process = FORKSERVER.Process(target=_main, args=arguments)
        self.process.start()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Returns when the text is on stderr or the process has ended."""
        end = time.monotonic() + seconds
        while self.process.is_alive() and not (
            self._err.exists() and text in self._err.read_text()
        ):
            assert time.monotonic() < end, f"no {text!r} after {seconds} s"
            time.sleep(0.02)

    def result(self, seconds: float = 300) -> Result:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s"
        return Result(self.process.exitcode, self._out.read_text(), self._err.read_text())


def _main(flags, cwd, out, err, prepare):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    os.chdir(cwd)
    if prepare is not None:
        prepare()
    import jax

    from jax_ddpm import main

    jax.config.update("jax_disable_most_optimizations", True)
    sys.argv = ["main.py", *map(str, flags)]
    app.run(main.main, flags_parser=main.parse_flags)
