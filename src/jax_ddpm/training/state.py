"""The state that training carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jax_ddpm.runtime.devices import place
from jax_ddpm.tasks.recipe import Recipe


class TrainState(NamedTuple):
    """Parameters by name, their averages by name, an optimiser state per phase, and the
    objectives' own memory ``extra``."""

    step: Int[Array, ""]
    params: dict[str, Any]
    ema: dict[str, Any]
    opt_state: tuple[Any, ...]
    extra: Any


def init_state(recipe: Recipe, params: dict[str, Any], extra: Any) -> TrainState:
    """The state before step 0: averages start from copies of the parameters.

    Nothing is compiled for it: that would take longer than the copies.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema={
            name: jax.device_put(params[average.source], may_alias=False)
            for name, average in recipe.averages.items()
        },
        opt_state=tuple(
            phase.optimiser.init({name: params[name] for name in phase.trains})
            for phase in recipe.phases
        ),
        extra=extra,
    )


def to_items(state: TrainState) -> dict[str, Any]:
    """All except the step, as the items of a checkpoint."""
    items = state._asdict()
    del items["step"]
    return items


def from_items(step: int, items: dict[str, Any], like: TrainState) -> TrainState:
    """The state of these items; its step is placed on the devices like that of ``like``."""
    return TrainState(place(np.int32(step), like.step.sharding), **items)
