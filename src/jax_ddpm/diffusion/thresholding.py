"""Thresholding: keeping the predicted x_0 in the range of images (Saharia et al. 2022, Imagen).

ε = (x_t - α·x_0)/σ is recomputed to agree with it.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.diffusion.denoiser import Conditioning
from jax_ddpm.diffusion.parameterisation import Prediction
from jax_ddpm.diffusion.process import Process, expand, noise_between
from jax_ddpm.options import Option, between, check_options

Quantile = Annotated[float, Option("Quantile of |x_0| that limits it: 0.995.", between(0, 1))]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClippedDenoiser:
    """Static thresholding: x_0 clipped to [-1, 1].

    The mean of an ancestral step is made from the clipped x_0 whatever the network predicts. The
    code of Ho et al. keeps the mean of a network that predicts it (``posterior_mean``) as it is,
    and clips only the x_0 that it shows.
    """

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThresholdedDenoiser:
    """Dynamic thresholding: x_0 clipped to [-s, s] and divided by s, where s is at least 1.

    s is the given quantile of |x_0| over all pixels and channels of an example: 0.995 clips about
    one in 200 of them and at least one, 1 clips none. An x_0 within [-1, 1] is left unchanged.

    Raises:
      ValueError: where the quantile is outside [0, 1].
    """

    denoiser: Any
    process: Process = dataclasses.field(metadata={"static": True})
    quantile: Quantile = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        prediction = self.denoiser(xt, t, conditioning)
        sizes = jnp.abs(prediction.x0).reshape(len(xt), -1)
        s = expand(jnp.maximum(jnp.quantile(sizes, self.quantile, axis=1), 1), xt)
        x0 = jnp.clip(prediction.x0, -s, s) / s
        return prediction._replace(x0=x0, eps=noise_between(self.process, x0, xt, t))
