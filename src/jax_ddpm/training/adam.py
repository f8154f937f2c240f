"""Adam with clipped gradients, in one pass over each array."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def clipped_adam(
    learning_rate: Callable[[Any], Any], b1: float, b2: float, eps: float, max_norm: float
) -> optax.GradientTransformationExtraArgs:
    """Adam (Kingma & Ba 2015) on gradients whose global norm is clipped to ``max_norm``.

        g ← g·min(1, max_norm/‖g‖),   m ← m + (1-β₁)(g - m),   v ← v + (1-β₂)(g² - v),
        Δθ = -η·m̂/(√v̂ + ε)   with   m̂ = m/(1-β₁ᵗ),   v̂ = v/(1-β₂ᵗ)

    The update takes ‖g‖ as ``norm``, and ``finite``: where that is false the state stays as it is
    and Δθ is 0. With that choice made here, and with clip and bias corrections as factors (section
    2 there), each array is read and written once. To choose between what optax's own ``adam`` gives
    and what was before, XLA would copy all that was before at every step.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        gradients: Any,
        state: optax.ScaleByAdamState,
        params: Any = None,
        *,
        norm: Any,
        finite: Any,
    ) -> tuple[Any, optax.ScaleByAdamState]:
        def towards(old: Any, weight: float, new: Any) -> Any:
            return jnp.where(finite, old + weight * (new - old), old)

        clip = jnp.minimum(1, max_norm / norm)
        mu = jax.tree.map(lambda m, g: towards(m, 1 - b1, clip * g), state.mu, gradients)
        nu = jax.tree.map(lambda v, g: towards(v, 1 - b2, (clip * g) ** 2), state.nu, gradients)
        t = state.count + 1
        root = jnp.sqrt(1 - b2**t)
        rate = jnp.where(finite, learning_rate(state.count) * root / (1 - b1**t), 0)
        updates = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + eps * root), mu, nu)
        return updates, optax.ScaleByAdamState(jnp.where(finite, t, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
