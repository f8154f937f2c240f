"""Frozen networks of other runs, and their part in a run's identity."""

import json
import pathlib
import warnings
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jax_ddpm.errors import UserError
from jax_ddpm.factory import Companions
from jax_ddpm.models.network import Frozen
from jax_ddpm.options import value_of
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.checkpoint import digest
from jax_ddpm.runs.served import served
from jax_ddpm.runtime.files import read_json, replacing
from jax_ddpm.tasks.recipe import Recipe
from jax_ddpm.tasks.table import make_model

_NAME = "frozen.json"


def read_frozen(
    config: ConfigDict, field: str, *, workdir: pathlib.Path, accept_changes: bool = False
) -> Frozen:
    """The network that the run in ``config.<field>`` serves.

    A run that goes on in ``workdir`` reads the checkpoint that it began with.

    Raises:
      UserError: naming the field, where there is no such run, or its parameters are not those that
        the run in ``workdir`` began with. That only warns where changes are accepted.
    """
    donor = pathlib.Path(value_of(config, field))
    before = _noted(workdir).get(field, {})
    step = None if accept_changes else before.get("checkpoint_step")
    if step is not None and step not in checkpoint.steps(donor):
        raise UserError(
            f"config.{field}={donor}: its checkpoint {step}, which {workdir} began with, is gone; "
            "bring it back, or go on with --accept_changes"
        )
    try:
        frozen = _read(donor, step)
    except UserError as error:
        raise UserError(str(error).replace("--workdir=", f"config.{field}=")) from error
    if before and before["sha256"] != frozen.record["sha256"]:
        changed = f"config.{field}={donor}: not the parameters that {workdir} began with"
        if not accept_changes:
            raise UserError(f"{changed}; bring them back, or go on with --accept_changes")
        warnings.warn(f"{changed}; going on with these", stacklevel=2)
    return frozen


def save_frozen(workdir: pathlib.Path, recipe: Recipe) -> None:
    """Notes which frozen networks a run began with in ``frozen.json``, if there are any."""
    records = {name: each.record for name, each in recipe.frozen.items() if each.record}
    if records:
        with replacing(workdir / _NAME) as path:
            path.write_text(json.dumps(records, indent=2) + "\n")


def _noted(workdir: pathlib.Path) -> dict[str, Any]:
    """The records of a run that has begun."""
    if not checkpoint.steps(workdir) or not (workdir / _NAME).exists():
        return {}
    try:
        return dict(read_json(workdir / _NAME))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--workdir={workdir}: {_NAME} is damaged") from error


def _read(donor: pathlib.Path, step: int | None) -> Frozen:
    config, spec, step, params = served(donor, step)
    record = {"task": config.task, "checkpoint_step": step, "sha256": digest(params)}
    read = partial(read_frozen, config, workdir=donor)
    return Frozen(params, make_model(config, spec, Companions(read)), record)
