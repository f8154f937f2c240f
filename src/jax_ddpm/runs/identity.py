"""A run's identity: its config and data, kept with each checkpoint and noted in the workdir.

A checkpoint's own is hashed with it, so that decides; the files are for people, and for a run that
has no checkpoint yet.
"""

import contextlib
import json
import operator
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from jax_ddpm.config.defaults import restored
from jax_ddpm.config.fields import fields
from jax_ddpm.data.source import Field, Spec, image_spec
from jax_ddpm.errors import UserError
from jax_ddpm.runs import checkpoint
from jax_ddpm.runtime.files import read_json, replacing


def require_same_run(
    workdir: pathlib.Path, config: ConfigDict, spec: Spec, accept_changes: bool = False
) -> None:
    """Compares with the run whose checkpoints lie in the workdir, if there is one.

    Raises:
      UserError: naming all that differs in meaning. It only warns where changes are accepted.
    """
    if not checkpoint.steps(workdir):
        return
    try:
        step = checkpoint.choose_step(workdir, None, "config")
        changes = differences(_held(workdir, step), (config, spec))
    except UserError as error:
        if not accept_changes:
            raise UserError(f"{error}; --accept_changes goes on with this config") from error
        warnings.warn(f"going on with this config: {error}", stacklevel=2)
        return
    listed = ", ".join(f"{name} {old!r} → {new!r}" for name, (old, new) in changes.items())
    if changes and not accept_changes:
        raise UserError(
            f"--workdir={workdir} holds a run that differs: {listed}; train into another "
            "--workdir, or go on regardless with --accept_changes"
        )
    if changes:
        warnings.warn(f"going on with changes: {listed}", stacklevel=2)


def save_identity(workdir: pathlib.Path, config: ConfigDict, spec: Spec) -> None:
    """Notes the run's identity in ``config.json`` and ``data.json``."""
    with replacing(workdir / "config.json") as file:
        file.write((config.to_json(indent=2) + "\n").encode())
    with replacing(workdir / "data.json") as file:
        file.write((json.dumps(to_json(spec), indent=2) + "\n").encode())


def load_identity(workdir: pathlib.Path, step: int | None = None) -> tuple[ConfigDict, Spec]:
    """The config that a checkpoint was trained with and the spec of its data.

    They are those that the checkpoint ``step`` holds, by default the newest one; a warning tells
    where ``config.json`` or ``data.json`` says something else. Without a checkpoint these hold.

    Raises:
      UserError: where there is no run, or they cannot be read.
    """
    step = checkpoint.newest(workdir, ["config"]) if step is None else step
    if step is None:
        return _noted(workdir)
    held = _held(workdir, step)
    try:
        told = differences(held, _noted(workdir), sampling=True)
        listed = ", ".join(f"{name} {old!r} → {new!r}" for name, (old, new) in told.items())
        changed = listed and f"--workdir={workdir}: config.json or data.json was changed: {listed}"
    except UserError as error:
        changed = str(error)
    if changed:
        warnings.warn(f"{changed}; checkpoint {step} decides", stacklevel=2)
    return held


def _held(workdir: pathlib.Path, step: int) -> tuple[ConfigDict, Spec]:
    """The identity that was saved with a checkpoint."""
    where = f"checkpoint {step} in {workdir}"
    with _reading(workdir):
        config = restored(checkpoint.restore_note(workdir, step, "config"), where)
        if not (checkpoint.folder(workdir) / str(step) / "data").exists():
            return config, _noted_spec(workdir)  # from before checkpoints held it
        return config, _from_json(checkpoint.restore_note(workdir, step, "data"))


def _noted(workdir: pathlib.Path) -> tuple[ConfigDict, Spec]:
    with _reading(workdir):
        stored = read_json(workdir / "config.json")
        return restored(stored, f"--workdir={workdir}: config.json"), _noted_spec(workdir)


def _noted_spec(workdir: pathlib.Path) -> Spec:
    with _reading(workdir):
        return _from_json(read_json(workdir / "data.json"))


@contextlib.contextmanager
def _reading(workdir: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        known = checkpoint.steps(workdir)
        reason = f"{error.filename} is missing" if known else "no run there; train into it first"
        raise UserError(f"--workdir={workdir}: {reason}") from error
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--workdir={workdir}: config.json or data.json is damaged, or from another version"
        ) from error


def to_json(spec: Spec) -> dict[str, Any]:
    """The spec as ``data.json`` and the checkpoints keep it."""
    fields = {name: field._asdict() for name, field in spec.fields.items()}
    return spec._asdict() | {"fields": fields}


def _from_json(stored: dict[str, Any]) -> Spec:
    if "fields" not in stored:  # from before a source could hold more than images and labels
        spec = image_spec(**stored | {"num_classes": operator.index(stored["num_classes"])})
    else:
        fields = {
            name: Field(**field | {"shape": tuple(field["shape"]), "names": tuple(field["names"])})
            for name, field in stored["fields"].items()
        }
        spec = Spec(**stored | {"fields": fields})
    if len(spec.fields["image"].shape) != 3:
        raise ValueError("no images")
    sizes = [size for field in spec.fields.values() for size in (field.num_values, *field.shape)]
    if any(operator.index(size) < 0 for size in [*sizes, *spec.split_sizes.values()]):
        raise ValueError("a size below 0")
    return spec


def differences(
    old: tuple[ConfigDict, Spec], new: tuple[ConfigDict, Spec], sampling: bool = False
) -> dict[str, tuple[Any, Any]]:
    """The differences in meaning between two runs: field → (old, new).

    The model, process, data, loss and optimiser have meaning; intervals, devices and the place of
    the data have none. The number of steps has meaning only if the learning rate decays towards
    it, and the section ``sampling`` only if asked for.
    """
    modules = {*old[0].modules, *new[0].modules}
    free = {name for name, option in fields(modules).items() if option.free}
    free -= {name for name in free if sampling and name.startswith("sampling.")}
    if "cosine" in (old[0].training.decay, new[0].training.decay):
        free.remove("training.num_steps")
    before, after = (
        _flat(config.to_dict() | {"data set": spec.as_noted(old[1]).meaning()})
        for config, spec in (old, new)
    )
    return {
        field: (before.get(field), after.get(field))
        for field in before | after
        if before.get(field) != after.get(field) and field not in free
    }


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in sections.items():
        if isinstance(value, dict):
            fields |= {f"{name}.{field}": inner for field, inner in value.items()}
        else:
            fields[name] = value
    return fields
