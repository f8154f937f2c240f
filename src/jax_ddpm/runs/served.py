"""The parameters that a run serves: what is sampled, measured, guided by, taught by."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from jax_ddpm.errors import UserError
from jax_ddpm.runs import checkpoint
from jax_ddpm.tasks.table import task_of


def served(
    workdir: pathlib.Path, config: ConfigDict, step: int | None = None, item: str = "ema"
) -> tuple[int, Any]:
    """The step asked for, or the newest whole one, and its parameters as a tree of NumPy arrays.

    ``item`` is "ema" for the average that the run's task serves, "params" for the raw network.

    Raises:
      UserError: where there is no such checkpoint, or it is damaged.
    """
    step = checkpoint.choose_step(workdir, step, item)
    held, name = checkpoint.restore_item(workdir, step, item), task_of(config).serves
    if name not in held:
        raise UserError(
            f"checkpoint {step} in {workdir}: its {item} holds {', '.join(held)}, not {name}"
        )
    return step, held[name]
