"""Data whose best denoiser is known in closed form: the oracle of the sampler and bound tests."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.diffusion.denoiser import Conditioning
from jax_ddpm.diffusion.parameterisation import Prediction
from jax_ddpm.diffusion.process import Process, expand


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianDenoiser:
    """The exact denoiser of data x_0 ~ N(mean, var·I).

    x_0 and x_t are jointly Gaussian with covariance α·var, and x_t has variance α²·var + σ²:

        E[x_0 | x_t] = mean + α·var/(α²·var + σ²)·(x_t - α·mean)
        E[ε | x_t]   = σ/(α²·var + σ²)·(x_t - α·mean).
    """

    mean: Array | float
    var: Array | float
    process: Process = dataclasses.field(metadata={"static": True})

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        alpha, sigma = expand(self.process.alpha(t), xt), expand(self.process.sigma(t), xt)
        whitened = (xt - alpha * self.mean) / (alpha**2 * self.var + sigma**2)
        return Prediction(x0=self.mean + alpha * self.var * whitened, eps=sigma * whitened)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixtureDenoiser:
    """The exact denoiser of data whose every dimension is drawn from Σ_k weights_k·N(means_k, var).

    Given the component, x_0 is Gaussian; x_t says with what probability it was which.
    """

    weights: Array  # [k]
    means: Array  # [k]
    var: Array | float
    process: Process = dataclasses.field(metadata={"static": True})

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        alpha, sigma = expand(self.process.alpha(t), xt), expand(self.process.sigma(t), xt)
        variance = (alpha**2 * self.var + sigma**2)[..., None]
        means = self.means.reshape(*xt.ndim * [1], -1)
        log_density = -((xt[..., None] - alpha[..., None] * means) ** 2) / (2 * variance)
        component = jax.nn.softmax(jnp.log(self.weights).reshape(means.shape) + log_density)
        mean = jnp.sum(component * means, axis=-1)
        return GaussianDenoiser(mean, self.var, self.process)(xt, t, conditioning)
