"""Denoisers: ``(x_t, t, conditioning) → Prediction``, as pytrees.

Samplers, likelihoods and editing see nothing else of a model. A denoiser carries its parameters as
leaves, so it passes through ``jit`` and new parameters never recompile. ``t`` is float32, a
scalar in samplers and ``[batch]`` in training.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.diffusion.parameterisation import Parameterisation, Prediction
from jax_ddpm.diffusion.process import Process, noise_between

# A flat dict of [batch, …] arrays that the network is conditioned on; empty when unconditional.
Conditioning = dict[str, Array]


@runtime_checkable
class Denoiser(Protocol):
    """Predicts (x_0, ε) from x_t: a pytree that can be called."""

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NetworkDenoiser:
    """A network with its parameters.

    ``apply(params, x, time, conditioning)`` is the network as a pure function, with time
    ``[batch]``.
    """

    params: Any
    apply: Callable = dataclasses.field(metadata={"static": True})
    parameterisation: Parameterisation = dataclasses.field(metadata={"static": True})

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        time = self.parameterisation.network_time(jnp.broadcast_to(t, xt.shape[:1]))
        output = self.apply(self.params, xt, time, conditioning)
        return self.parameterisation.to_prediction(output, xt, t)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClippedDenoiser:
    """Clips the predicted x_0 to [-1, 1] and recomputes ε = (x_t - α·x_0)/σ to agree with it."""

    denoiser: Any
    process: Process = dataclasses.field(metadata={"static": True})

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        prediction = self.denoiser(xt, t, conditioning)
        x0 = jnp.clip(prediction.x0, -1, 1)
        return prediction._replace(x0=x0, eps=noise_between(self.process, x0, xt, t))
