"""What a finished run leaves: parameters, their averages, its config and its data's spec."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jax_ddpm.config import default
from jax_ddpm.data.source import Spec
from jax_ddpm.errors import UserError


def save_identity(workdir: pathlib.Path, config: ConfigDict, spec: Spec) -> None:
    """Notes what the run is, in ``config.json`` and ``data.json``, making the folder.

    Raises:
      UserError: where the workdir cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(config.to_json(indent=2) + "\n")
        (workdir / "data.json").write_text(json.dumps(spec._asdict(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error


def load_identity(workdir: pathlib.Path) -> tuple[ConfigDict, Spec]:
    """The config that a workdir was trained with and the spec of its data."""
    try:
        config = default()
        config.update(json.loads((workdir / "config.json").read_text()))
        spec = Spec(**json.loads((workdir / "data.json").read_text()))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"--workdir={workdir}: no run there; train into it first") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--workdir={workdir}: config.json or data.json is damaged, or from another version"
        ) from error
    height, width, channels = spec.image_shape
    return config, spec._replace(image_shape=(height, width, channels))


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
    path = (workdir / "checkpoint").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
