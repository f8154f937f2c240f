"""The final checkpoint: parameters, their averages and the config that made them."""

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from jax_ddpm.errors import UserError


def save_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes the resolved config as ``config.json``."""
    (workdir / "config.json").write_text(config.to_json(indent=2) + "\n")


def load_config(workdir: pathlib.Path, defaults: ConfigDict) -> ConfigDict:
    """The config that a workdir was trained with."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir={workdir}: no config.json there; train into it first")
    config = defaults.copy_and_resolve_references()
    with config.unlocked():
        config.update(ConfigDict(json.loads(path.read_text())))
    return config


def exists(workdir: pathlib.Path) -> bool:
    """Whether a finished run lies in the workdir."""
    return (workdir / "checkpoint").is_dir()


def save(workdir: pathlib.Path, items: dict[str, Any]) -> None:
    """Writes the named trees; returns when they are on disk."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((workdir / "checkpoint").absolute(), items)


def restore(workdir: pathlib.Path) -> dict[str, Any]:
    """The saved trees as NumPy arrays."""
    import orbax.checkpoint as ocp

    if not exists(workdir):
        raise UserError(f"--workdir={workdir}: no checkpoint there; train to the end first")
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore((workdir / "checkpoint").absolute())
