"""Every optimiser by its name, behind one gate: an update that is not finite changes nothing."""

from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jax_ddpm.options import (
    Option,
    Table,
    fraction,
    not_negative_and_finite,
    positive_and_finite,
    taken,
)
from jax_ddpm.tasks.adam import clipped_adam

Schedule: TypeAlias = Callable[[Any], Any]
Gated: TypeAlias = optax.GradientTransformationExtraArgs

AdamB1 = Annotated[float, Option("Decay of the first moment.", fraction)]
AdamB2 = Annotated[float, Option("Decay of the second moment.", fraction)]
AdamEps = Annotated[float, Option("Added to the root of the second moment.", positive_and_finite)]
WeightDecay = Annotated[
    float,
    Option("Of adamw: times the learning rate, off every parameter.", not_negative_and_finite),
]


def gated(inner: optax.GradientTransformation, max_norm: float) -> Gated:
    """Any optimiser of optax, on gradients whose global norm is clipped to ``max_norm``.

    Its update takes that norm as ``norm``, and ``finite``: where that is false the state stays as
    it is and the update is 0.
    """

    def update(gradients: Any, state: Any, params: Any = None, *, norm: Any, finite: Any):
        clip = jnp.minimum(1, max_norm / norm)
        clipped = jax.tree.map(lambda g: clip * g, gradients)
        updates, new_state = inner.update(clipped, state, params)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, 0), updates)
        return updates, jax.tree.map(lambda n, o: jnp.where(finite, n, o), new_state, state)

    return Gated(inner.init, update)


def adam(
    learning_rate: Schedule,
    max_norm: float,
    adam_b1: AdamB1 = 0.9,
    adam_b2: AdamB2 = 0.999,
    adam_eps: AdamEps = 1e-8,
) -> Gated:
    """Adam (Kingma & Ba 2015)."""
    return clipped_adam(learning_rate, adam_b1, adam_b2, adam_eps, max_norm)


def adamw(
    learning_rate: Schedule,
    max_norm: float,
    adam_b1: AdamB1 = 0.9,
    adam_b2: AdamB2 = 0.999,
    adam_eps: AdamEps = 1e-8,
    weight_decay: WeightDecay = 0.01,
) -> Gated:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), of all parameters."""
    inner = optax.adamw(learning_rate, adam_b1, adam_b2, adam_eps, weight_decay=weight_decay)
    return gated(inner, max_norm)


def radam(
    learning_rate: Schedule,
    max_norm: float,
    adam_b1: AdamB1 = 0.9,
    adam_b2: AdamB2 = 0.999,
    adam_eps: AdamEps = 1e-8,
) -> Gated:
    """Adam with the variance of its first steps rectified (Liu et al. 2020)."""
    return gated(optax.radam(learning_rate, adam_b1, adam_b2, adam_eps), max_norm)


# (learning_rate, max_norm, **options) → an optimiser that has passed the gate
OPTIMISERS = Table(adam=adam, adamw=adamw, radam=radam)


def make_optimiser(config: ConfigDict, learning_rate: Schedule) -> Gated:
    """The optimiser of ``config.training``, whose schedule counts its own updates."""
    training = config.training
    row = OPTIMISERS[training.optimiser]
    return row(learning_rate, training.grad_clip, **taken(row, training))
