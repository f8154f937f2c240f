"""How to train: the phases of a step, their optimisers, the averages kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jax_ddpm.tasks.adam import clipped_adam
from jax_ddpm.tasks.objective import Objective


class Phase(NamedTuple):
    """One objective and the named parameters that its optimiser updates.

    The optimiser's update takes the gradients' global ``norm``, and ``finite``; where that is false
    it must change nothing. ``learning_rate`` is its schedule, step → rate, for the log.
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


def make_recipe(config: ConfigDict, objective: Objective) -> Recipe:
    """One phase, the parameters "network" and their average of the same name."""
    learning_rate = make_learning_rate(config)
    training = config.training
    optimiser = clipped_adam(
        learning_rate, training.adam_b1, training.adam_b2, training.adam_eps, training.grad_clip
    )

    def ema_decay(step):
        # Early on, average over about the last tenth of the run instead of the random start.
        return jnp.minimum(config.training.ema_decay, (1 + step) / (10 + step))

    return Recipe(
        phases=(Phase(objective, ("network",), optimiser, learning_rate),),
        averages={"network": Average("network", ema_decay)},
        accumulate=config.training.accumulate,
    )


def make_learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up from 0, then constant or along a cosine to 0 at the last step."""
    peak, warmup = config.training.learning_rate, config.training.warmup_steps
    rest = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, max(1, config.training.num_steps - warmup)),
    }[config.training.decay]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup])
