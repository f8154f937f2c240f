"""Denoisers: ``(x_t, t, conditioning) → Prediction``, as pytrees.

Samplers, likelihoods and editing see nothing else of a model. A denoiser carries its parameters as
leaves, so it passes through ``jit`` and new parameters never recompile. ``t`` is float32, a scalar
in samplers and ``[batch]`` in training.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.diffusion.parameterisation import Parameterisation, Prediction, marginal_std
from jax_ddpm.diffusion.process import Process, expand

# What the network is told, by name: [batch, …] arrays, or small trees of them such as tokens with
# their mask. ``<name>_drop`` is true for examples that go without it. Empty when unconditional.
Conditioning = dict[str, Any]
X0_ESTIMATE = "x0_estimate"  # a self-conditioned network's last prediction, shaped like x_t


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
        parameterisation, times = self.parameterisation, jnp.broadcast_to(t, xt.shape[:1])
        x, time = parameterisation.network_input(xt, times), parameterisation.network_time(times)
        output = self.apply(self.params, x, time, conditioning)
        return parameterisation.to_prediction(output, xt, t)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InProcess:
    """A denoiser of the process ``trained`` as one of another process.

    Both processes see the same mixture of x_0 and ε at equal λ, in other units: x_t of ``process``
    times α_trained/α is an x_t of ``trained``, and the predicted (x_0, ε) is the same (Kingma et
    al. 2021, section 5.1; Karras et al. 2022, appendix C). λ must lie in the range of ``trained``.
    """

    denoiser: Any
    trained: Process = dataclasses.field(metadata={"static": True})
    process: Process = dataclasses.field(metadata={"static": True})

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        trained_t = self.trained.time(self.process.log_snr(t))
        # α_trained/α equals σ_trained/σ; this form also has a value where α = 0.
        units = marginal_std(self.trained, trained_t, 1.0) / marginal_std(self.process, t, 1.0)
        return self.denoiser(expand(units, xt) * xt, trained_t, conditioning)
