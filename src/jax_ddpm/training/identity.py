"""What a run is: its config and its data, noted in the workdir and compared when it resumes."""

import json
import pathlib
import warnings
from typing import Any

from ml_collections import ConfigDict

from jax_ddpm.config import default
from jax_ddpm.data.source import Spec
from jax_ddpm.errors import UserError
from jax_ddpm.training import checkpoint

# How long, how often and on what to run, not what is trained.
_FREE_SECTIONS = ("sampling",)
_FREE_FIELDS = (
    "parallel",
    "data.path",
    "model.remat",
    "training.num_steps",
    "training.accumulate",
    "training.log_every",
    "training.heldout_every",
    "training.heldout_examples",
    "training.sample_every",
    "training.checkpoint_every",
    "training.keep_last",
    "training.keep_every",
)


def require_same_run(
    workdir: pathlib.Path, config: ConfigDict, spec: Spec, accept_changes: bool = False
) -> None:
    """Compares with the run whose checkpoints lie in the workdir, if there is one.

    Raises:
      UserError: naming all that differs in meaning, unless changes are accepted: then it warns.
    """
    if not checkpoint.steps(workdir):
        return
    changes = differences(load_identity(workdir), (config, spec))
    listed = ", ".join(f"{name} {old!r} → {new!r}" for name, (old, new) in changes.items())
    if changes and not accept_changes:
        raise UserError(
            f"--workdir={workdir} holds a run that differs: {listed}; train into another "
            "--workdir, or go on regardless with --accept_changes"
        )
    if changes:
        warnings.warn(f"going on with changes: {listed}", stacklevel=2)


def save_identity(workdir: pathlib.Path, config: ConfigDict, spec: Spec) -> None:
    """Notes what the run is, in ``config.json`` and ``data.json``, making the folder.

    Raises:
      UserError: where the workdir cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _replace(workdir / "config.json", config.to_json(indent=2) + "\n")
        _replace(workdir / "data.json", json.dumps(spec._asdict(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes a file at once: whoever reads it meanwhile, or after a kill, finds it whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def load_identity(workdir: pathlib.Path) -> tuple[ConfigDict, Spec]:
    """The config that a workdir was trained with and the spec of its data.

    Raises:
      UserError: where there is none, or it cannot be read.
    """
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


def differences(
    old: tuple[ConfigDict, Spec], new: tuple[ConfigDict, Spec]
) -> dict[str, tuple[Any, Any]]:
    """What differs in meaning between two runs: field → (old, new).

    The model, process, data, loss and optimiser have meaning; intervals, devices and where the data
    lies do not, nor has the number of steps unless the learning rate decays towards it.
    """
    free = set(_FREE_FIELDS)
    if "cosine" in (old[0].training.decay, new[0].training.decay):
        free.remove("training.num_steps")
    before, after = (
        _fields(config.to_dict() | {"data set": spec._asdict()}) for config, spec in (old, new)
    )
    return {
        field: (before.get(field), after.get(field))
        for field in before | after
        if before.get(field) != after.get(field)
        and field not in free
        and field.split(".")[0] not in _FREE_SECTIONS
    }


def _fields(sections: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in sections.items():
        if isinstance(value, dict):
            fields |= {f"{name}.{field}": inner for field, inner in value.items()}
        else:
            fields[name] = value
    return fields
