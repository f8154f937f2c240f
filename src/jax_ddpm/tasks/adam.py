"""Adam with clipped gradients, in one pass over each array."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array


def clipped_adam(
    learning_rate: Callable[[Any], Any], b1: float, b2: float, eps: float, max_norm: float
) -> optax.GradientTransformationExtraArgs:
    """Adam (Kingma & Ba 2015) on gradients whose global norm is clipped to ``max_norm``.

        g ← g·min(1, max_norm/‖g‖),   m ← m + (1-β₁)(g - m),   v ← v + (1-β₂)(g² - v),
        Δθ = -η·m̂/(√v̂ + ε)   with   m̂ = m/(1-β₁ᵗ),   v̂ = v/(1-β₂ᵗ)

    The update takes ‖g‖ as ``norm``, and ``finite``: where that is false the state stays as it is
    and Δθ is 0. This choice is made here, and clip and bias corrections are factors (section 2
    there), so each array is read and written once. A choice between the old state and the result of
    optax's own ``adam`` would make XLA copy the whole old state at every step.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        def zeros(like: Array) -> np.ndarray:
            return np.zeros(like.shape, like.dtype)  # jnp.zeros would be compiled

        mu, nu = jax.device_put([jax.tree.map(zeros, params) for _ in range(2)])
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        gradients: Any,
        state: optax.ScaleByAdamState,
        params: Any = None,
        *,
        norm: Any,
        finite: Any,
    ) -> tuple[Any, optax.ScaleByAdamState]:
        t = state.count + 1
        root = jnp.sqrt(1 - b2**t)
        rate = jnp.where(finite, learning_rate(state.count) * root / (1 - b1**t), 0)
        clip = jnp.minimum(1, max_norm / norm)

        @jax.jit  # traced once for all arrays of a shape
        def one(g: Array, m: Array, v: Array) -> tuple[Array, Array, Array]:
            g = clip * g
            m = jnp.where(finite, m + (1 - b1) * (g - m), m)
            v = jnp.where(finite, v + (1 - b2) * (g**2 - v), v)
            return -rate * m / (jnp.sqrt(v) + eps * root), m, v

        updates, mu, nu = jax.tree.transpose(
            jax.tree.structure(gradients),
            jax.tree.structure((0, 0, 0)),
            jax.tree.map(one, gradients, state.mu, state.nu),
        )
        return updates, optax.ScaleByAdamState(jnp.where(finite, t, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
