"""The state that training carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jax_ddpm.runtime.devices import place
from jax_ddpm.tasks.recipe import Recipe


class TrainState(NamedTuple):
    """Parameters by name, their averages by name, and for each phase the state of its optimiser and
    its objective's own memory ``extra``."""

    step: Int[Array, ""]
    params: dict[str, Any]
    ema: dict[str, Any]
    opt_state: tuple[Any, ...]
    extra: tuple[Any, ...]


def init_state(recipe: Recipe, params: dict[str, Any]) -> TrainState:
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
        extra=tuple(phase.objective.init() for phase in recipe.phases),
    )


def readable(params: dict[str, Any], ema: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """All that an objective can be given, by name: averages are called "ema/<name>"."""
    return params | {f"ema/{name}": average for name, average in ema.items()} | frozen


def to_items(state: TrainState) -> dict[str, Any]:
    """All except the step, as the items of a checkpoint; ``extra`` is one for each phase."""
    items = state._asdict()
    del items["step"]
    return items | {_extra(i): extra for i, extra in enumerate(items.pop("extra"))}


def from_items(step: int, items: dict[str, Any], like: TrainState) -> TrainState:
    """The state of these items; its step is placed on the devices like that of ``like``."""
    extra = tuple(items[_extra(i)] for i in range(len(like.extra)))
    rest = {name: items[name] for name in ("params", "ema", "opt_state")}
    return TrainState(place(np.int32(step), like.step.sharding), **rest, extra=extra)


def _extra(phase: int) -> str:
    """The item's name, which for the first phase is older than others."""
    return f"extra_{phase}" if phase else "extra"
