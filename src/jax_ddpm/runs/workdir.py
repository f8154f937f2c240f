"""A run's folder: one job at a time trains into it, and only into a folder of its own."""

import contextlib
import pathlib
import re
from collections.abc import Iterator

from jax_ddpm.errors import UserError
from jax_ddpm.runs import checkpoint
from jax_ddpm.runtime.distributed import from_first
from jax_ddpm.runtime.files import locked, read_json

# What training writes over, all of it after config.json, which comes after checkpoints/.
_WRITTEN = ("data.json", "frozen.json", "metrics.jsonl", "tensorboard", "samples")
_SECTIONS = {"data", "model", "process", "parameterisation", "training", "sampling"}


@contextlib.contextmanager
def claimed(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the folder, and keeps other jobs from training into it meanwhile.

    Raises:
      UserError: where the folder cannot be written, another job trains there, or it holds what no
        run of ours has left there.
    """
    with locked(workdir, f"--workdir={workdir}", "trains"):
        require_ours(workdir)
        yield


def require_ours(workdir: pathlib.Path) -> None:
    """Checks that training into ``workdir`` overwrites nothing, or what a run left that goes on.

    Raises:
      UserError: naming what is there, or that a run's checkpoints are gone or cannot be read.
    """
    from_first(lambda: _require_ours(workdir))


def _require_ours(workdir: pathlib.Path) -> None:
    if checkpoint.steps(workdir):
        return  # a run, which is compared with the config
    config, checkpoints = workdir / "config.json", checkpoint.folder(workdir)
    there = [name for name in _WRITTEN if (workdir / name).exists()]
    if config.exists():
        there.insert(0, config.name)
        interval = _checkpoint_every(config)
        # Training makes the folder first, and waits for each checkpoint before it begins the next:
        # beyond the second, there has been one.
        if not checkpoints.exists() or (interval and _logged(workdir) > 2 * interval):
            raise UserError(
                f"--workdir={workdir} holds {', '.join(there)}, but its checkpoints are gone; "
                "bring them back, or give another --workdir"
            )
        if interval:
            return  # it was killed before its first checkpoint
    if checkpoints.exists() and any(checkpoints.iterdir()):
        there.append(checkpoints.name)
    if there:
        raise UserError(
            f"--workdir={workdir} holds {', '.join(there)} of something else, which training would "
            "overwrite; give another --workdir"
        )


def _checkpoint_every(path: pathlib.Path) -> int | None:
    """The steps between the checkpoints of a run; None where this is no config of ours."""
    try:
        config = read_json(path)
        return config["training"]["checkpoint_every"] if config.keys() >= _SECTIONS else None
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return None


def _logged(workdir: pathlib.Path) -> int:
    """The steps that the run had done by the last line of its log."""
    path = workdir / "metrics.jsonl"
    steps = re.findall(rb'^{"step": (\d+)', path.read_bytes(), re.M) if path.exists() else []
    return max(map(int, steps), default=0)
