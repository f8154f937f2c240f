"""Frozen networks of other runs, and their part in a run's identity."""

import json
import pathlib
import warnings
from collections.abc import Mapping
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
from jax_ddpm.tasks.table import make_model

_NAME = "frozen.json"


class FrozenReader:
    """Reads the networks that the runs in fields of a config serve (a ``Read``).

    A run that goes on in ``workdir`` reads the checkpoints that it began with.

    Attributes:
      records: what identifies each network read so far, by its field.
    """

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, accept_changes: bool = False):
        self._config, self._workdir, self._accept = config, workdir, accept_changes
        self.records: dict[str, Any] = {}

    def __call__(self, field: str) -> Frozen:
        """The network of the run in ``config.<field>``.

        Raises:
          UserError: naming the field, where there is no such run, or its parameters are not those
            that the run in ``workdir`` began with. The latter only warns where changes are
            accepted.
        """
        try:
            given = value_of(self._config, field)
        except (KeyError, AttributeError) as error:
            raise UserError(f"a frozen network is read of config.{field}: no such field") from error
        if not given:
            raise UserError(f"config.{field} is {given!r}; it must be the workdir of a run")
        donor, workdir = pathlib.Path(given), self._workdir
        before = self._noted(field)
        step = None if self._accept else before.get("checkpoint_step")
        if step is not None and step not in checkpoint.steps(donor):
            raise UserError(
                f"config.{field}={donor}: its checkpoint {step}, which {workdir} began with, is "
                "gone; bring it back, or go on with --accept_changes"
            )
        try:
            frozen = _read(donor, step)
        except UserError as error:
            raise UserError(str(error).replace("--workdir=", f"config.{field}=")) from error
        if before and before["sha256"] != frozen.record["sha256"]:
            changed = f"config.{field}={donor}: not the parameters that {workdir} began with"
            if not self._accept:
                raise UserError(f"{changed}; bring them back, or go on with --accept_changes")
            warnings.warn(f"{changed}; going on with these", stacklevel=2)
        self.records[field] = dict(frozen.record)
        return frozen

    def _noted(self, field: str) -> dict[str, Any]:
        """The record that the run in ``workdir``, if it has begun, has of a field."""
        if not checkpoint.steps(self._workdir):
            return {}
        try:
            return dict(read_json(self._workdir / _NAME)[field])
        except (OSError, ValueError, TypeError, KeyError) as error:
            lacking = f"{_NAME}, which tells what it began with, is missing or damaged"
            if not self._accept:
                raise UserError(
                    f"--workdir={self._workdir}: {lacking}; bring it back, or go on with "
                    "--accept_changes"
                ) from error
            warnings.warn(f"{self._workdir}: {lacking}", stacklevel=3)
            return {}


def save_frozen(workdir: pathlib.Path, records: Mapping[str, Any]) -> None:
    """Notes which frozen networks a run began with in ``frozen.json``, if there are any."""
    if records:
        with replacing(workdir / _NAME) as file:
            file.write((json.dumps(records, indent=2) + "\n").encode())


def _read(donor: pathlib.Path, step: int | None) -> Frozen:
    config, spec, step, params = served(donor, step)
    record = {"task": config.task, "checkpoint_step": step, "sha256": digest(params)}
    companions = Companions(FrozenReader(config, donor))
    return Frozen(params, make_model(config, spec, companions), record)
