"""What training carries from step to step, and the recipe that says how."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jax_ddpm.keys import StepKeys

# A metric is a weighted sum and its weight, so that means over examples, micro-batches, devices
# and steps are exact, also where a batch has no example of a kind.
Metrics = dict[str, tuple[Array, Array]]


@runtime_checkable
class Objective(Protocol):
    """What a phase minimises: the mean of the losses over the global batch."""

    def __call__(
        self,
        params: dict[str, Any],
        extra: Any,
        batch: dict[str, Array],
        keys: StepKeys,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, " batch"], Metrics, Any]:
        """Loss per example; metrics, each as values and weights ``[batch]``; the new extra."""
        ...


class Phase(NamedTuple):
    """One objective and the named parameters that its optimiser updates.

    The optimiser's update takes the gradients' global ``norm``, and ``finite``; where that is false
    it shall change nothing.
    ``learning_rate`` is its schedule, step → rate, for the log.
    """

    objective: Objective
    trains: tuple[str, ...]
    optimiser: optax.GradientTransformationExtraArgs
    learning_rate: Callable[[Any], Any]


class Average(NamedTuple):
    """An exponential moving average of the parameters ``source``, with decay(step)."""

    source: str
    decay: Callable[[Any], Any]


class Recipe(NamedTuple):
    """How to train: the phases of every step, the averages kept, micro-batches per step."""

    phases: tuple[Phase, ...]
    averages: dict[str, Average]
    accumulate: int = 1


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

    Nothing is compiled for it, which takes longer than the copies do.
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
