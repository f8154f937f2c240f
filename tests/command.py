"""The command line: in this process, or in one of its own, forked from one that has imported all.

Starting Python and importing takes seconds, which a test of many short runs cannot afford.
"""

import contextlib
import io
import multiprocessing
import os
import pathlib
import sys
import time
import warnings
from typing import NamedTuple

import pytest

from jax_ddpm import main as program
from jax_ddpm.runtime import backend

ROOT = pathlib.Path(__file__).parent.parent
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "compiled",
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


def main(*flags: object, cwd=ROOT) -> Result:
    """A command in this process, which keeps its own memory and XLA."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always", UserWarning)
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        patch.setattr(sys, "argv", ["jax_ddpm", *map(str, flags)])
        for name in ("keep_memory", "set_flags"):
            patch.setattr(backend, name, lambda *_, **__: None)
        patch.chdir(cwd)
        code: object = 0
        try:
            program.main()
        except SystemExit as end:
            code = end.code
        for warning in warned:
            err.write(warnings.formatwarning(warning.message, UserWarning, "", 0))
    if isinstance(code, str):  # as Python ends on it
        err.write(f"{code}\n")
        code = 1
    return Result(int(code), out.getvalue(), err.getvalue())


def succeeds(*flags: object, cwd=ROOT) -> list[str]:
    """The lines that a successful command prints, in this process."""
    result = main(*flags, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def mistake(*flags: object, cwd=ROOT) -> str:
    """The one line that a command ends with, before it has printed anything else."""
    result = main(*flags, cwd=cwd)
    assert result.returncode == 1, result.stdout
    assert result.stdout == ""
    *others, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(other.startswith("warning: ") for other in others), others
    return line.removeprefix("error: ")


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

    jax.config.update("jax_disable_most_optimizations", True)
    sys.argv = ["jax_ddpm", *map(str, flags)]
    program.main()
