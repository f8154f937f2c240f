"""A command carried out in a process of its own: XLA, the job, signals and exit codes."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from jax_ddpm.cli.flags import MODES
from jax_ddpm.cli.modes import RUN
from jax_ddpm.cli.parsing import Command
from jax_ddpm.errors import UserError
from jax_ddpm.runtime.stopping import EXIT_CODE, Stopped, StopRequest, never


def run(command: Command) -> None:
    """Prints the command's result; a mistake is one line and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without "±" shows its number
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    mode, given = RUN[command.mode], dict(command.given)
    if not MODES[command.mode].on_devices:
        with one_line():
            print(mode(given, never))
        return
    with one_line():
        from jax_ddpm.runtime import backend, distributed
        from jax_ddpm.runtime.launch import join

        named = given.get("config")
        backend.set_flags(deterministic=named is not None and named.config.deterministic)
        backend.keep_memory()
        backend.keep_compiled()
    with distributed.ending(), one_line():
        join(**command.job)
        distributed.require_agreement(_facts(command))
        with distributed.noticing_loss(), StopRequest() as stop:
            result = mode(given, distributed.shared_poll(stop.poll))
        if distributed.is_first():
            print(result)


def _facts(command: Command) -> dict[str, Any]:
    """What all processes of a job must have been started with, by name."""
    import jax
    import jaxlib

    import jax_ddpm

    facts: dict[str, Any] = {f"--{name}": value for name, value in command.given.items()}
    if "--workdir" in facts:
        facts["--workdir"] = os.path.abspath(facts["--workdir"])
    if "--config" in facts:
        facts["--config"] = facts["--config"].config.to_dict()
    versions = {each.__name__: each.__version__ for each in (jax_ddpm, jax, jaxlib)}
    return {"--mode": command.mode} | facts | versions


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Ends the program with a line of explanation where that is enough."""
    try:
        yield
    except Stopped as signal:
        print(f"stopped by {signal}; the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit("interrupted; what was saved before stays valid")
    except UserError as error:
        sys.exit(f"error: {error.flags}")
    except BrokenPipeError:  # whoever reads has had enough, as in --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(f"error: {error.filename or 'writing failed'}: {error.strerror or error}")
    except RuntimeError as error:  # XLA's
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(
            "error: the device is out of memory; raise training.accumulate, set model.remat, or "
            "lower training.batch_size or --sample_batch; --mode=check estimates what is needed"
        )
