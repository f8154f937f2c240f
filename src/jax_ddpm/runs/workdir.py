"""A run's folder: one job at a time trains into it, and only into a folder of its own."""

import contextlib
import json
import pathlib
from collections.abc import Iterator

from jax_ddpm.errors import UserError
from jax_ddpm.runs import checkpoint
from jax_ddpm.runtime.distributed import from_first
from jax_ddpm.runtime.files import locked

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
      UserError: naming what is there.
    """
    from_first(lambda: _require_ours(workdir))


def _require_ours(workdir: pathlib.Path) -> None:
    config, checkpoints = workdir / "config.json", checkpoint.folder(workdir)
    there = [name for name in _WRITTEN if (workdir / name).exists()]
    if config.exists():
        there.insert(0, config.name)
        if not checkpoints.exists():
            raise UserError(
                f"--workdir={workdir} holds {', '.join(there)}, but its checkpoints/ are gone; "
                "bring them back, or give another --workdir"
            )
        if _is_config(config) or checkpoint.steps(workdir):  # these are compared with the config
            return
    elif checkpoint.steps(workdir):
        return  # a run that has lost its config.json, as the comparison says
    if checkpoints.exists() and (not checkpoints.is_dir() or any(checkpoints.iterdir())):
        there.append(checkpoints.name)
    if there:
        raise UserError(
            f"--workdir={workdir} holds {', '.join(there)} of something else, which training would "
            "overwrite; give another --workdir"
        )


def _is_config(path: pathlib.Path) -> bool:
    try:
        return json.loads(path.read_bytes()).keys() >= _SECTIONS
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
