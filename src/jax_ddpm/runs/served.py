"""The parameters that a run serves: what is sampled, measured, guided by, taught by."""

import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jax_ddpm.data.source import Spec
from jax_ddpm.errors import UserError
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.identity import load_identity
from jax_ddpm.runtime.distributed import several
from jax_ddpm.tasks.table import task_of


class Served(NamedTuple):
    """The parameters of a checkpoint as a tree of NumPy arrays, and what they were trained as."""

    config: ConfigDict
    spec: Spec
    step: int
    params: Any


def served(workdir: pathlib.Path, step: int | None = None, item: str = "ema") -> Served:
    """What the run serves at the step asked for, or at the newest whole one.

    ``item`` is "ema" for the average that the run's task serves, "params" for the raw network.

    Raises:
      UserError: where there is no such checkpoint, or it is damaged.
    """
    while True:
        chosen = checkpoint.choose_step(workdir, step, item)
        try:
            config, spec = load_identity(workdir, chosen)
            held = checkpoint.restore_item(workdir, chosen, item)
            break
        except UserError:
            if step is not None or several() or chosen in checkpoint.steps(workdir):
                raise  # else a run that trains there has deleted it, and has newer ones
    name = task_of(config).serves
    if name not in held:
        raise UserError(
            f"checkpoint {chosen} in {workdir}: its {item} holds {', '.join(held)}, not {name}"
        )
    return Served(config, spec, chosen, held[name])
