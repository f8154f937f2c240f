"""The variational bound on the negative log-likelihood, term by term (Ho et al. 2020, eq. 5).

    L = L_T + Σ_{t≥1} KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)) - log p(x_0 | x_{t=0}).

All terms are in nats, averaged over dimensions: their sum divided by log 2 is bits/dim.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float

from jax_ddpm.diffusion.chain import Chain, chain_of, q_posterior
from jax_ddpm.diffusion.denoiser import Conditioning, Denoiser
from jax_ddpm.diffusion.parameterisation import Prediction, learned_variance_bounds
from jax_ddpm.diffusion.process import Process, corrupt, expand, fold_in

ModelVariance = Literal["fixedsmall", "fixedlarge", "learned"]


def mean_over_dims(x: Float[Array, "batch *shape"]) -> Float[Array, " batch"]:
    """The mean over all axes except the batch axis."""
    return x.mean(axis=tuple(range(1, x.ndim)))


def gaussian_kl(
    mean_q: Array, log_variance_q: Array, mean_p: Array, log_variance_p: Array
) -> Array:
    """KL(N(mean_q, σ_q²) ‖ N(mean_p, σ_p²)) in nats, elementwise, from means and log-variances."""
    log_ratio = log_variance_q - log_variance_p
    # exp(r) - 1 - r with its first two terms joined: equal variances give exactly 0.
    return 0.5 * (
        jnp.expm1(log_ratio) - log_ratio + (mean_q - mean_p) ** 2 * jnp.exp(-log_variance_p)
    )


def discrete_decoder_log_likelihood(
    x0: Float[Array, "batch *shape"],
    mean: Float[Array, "batch *shape"],
    log_variance: Float[Array, "batch *var"],
    num_levels: int,
) -> Float[Array, "batch *shape"]:
    """log p(x_0) in nats of a Gaussian integrated over the bin of each level (Ho et al., eq. 13).

    ``x0`` holds ``num_levels`` evenly spaced levels from -1 to 1 (256 for images); the bins of the
    first and last level are open to ±∞, so the probabilities of all levels sum to 1.
    """
    half_bin = 1 / (num_levels - 1)
    inverse_std = jnp.exp(-0.5 * log_variance)
    upper = (x0 + half_bin - mean) * inverse_std
    lower = (x0 - half_bin - mean) * inverse_std
    # log(Φ(u) - Φ(l)) is mirrored to the left tail, where log Φ keeps its precision.
    in_right_tail = x0 > mean
    high = log_ndtr(jnp.where(in_right_tail, -lower, upper))
    low = log_ndtr(jnp.where(in_right_tail, -upper, lower))
    inside = high + jnp.log(-jnp.expm1(low - high))
    is_first, is_last = x0 < -1 + half_bin, x0 > 1 - half_bin
    return jnp.where(is_first, log_ndtr(upper), jnp.where(is_last, log_ndtr(-lower), inside))


def model_log_variance(
    chain: Chain, prediction: Prediction, t: Float[Array, " batch"], variance: ModelVariance
) -> Float[Array, "batch *var"]:
    """log σ_t² of p(x_{t-1} | x_t), broadcasting against x.

    "fixedsmall" is β̃_t and "fixedlarge" is β_t, both with β̃ of t = 1 at t = 0 for the decoder.
    The prediction's fraction places "learned" between log β̃_t and log β_t.
    """
    xt = prediction.x0
    smallest = chain.posterior_log_variance
    if variance == "fixedsmall":
        return expand(chain.gather(smallest, t), xt)
    if variance == "fixedlarge":
        largest = np.log(np.append(chain.posterior.variance[1], chain.betas[1:]))
        return expand(chain.gather(largest, t), xt)
    assert prediction.variance_fraction is not None, "this model predicts no variance"
    lowest, span = (expand(bound, xt) for bound in learned_variance_bounds(chain, t))
    return lowest + prediction.variance_fraction * span


def bound_term(
    chain: Chain,
    prediction: Prediction,
    x0: Float[Array, "batch *shape"],
    xt: Float[Array, "batch *shape"],
    t: Float[Array, " batch"],
    variance: ModelVariance,
    num_levels: int,
) -> Float[Array, " batch"]:
    """L_{t-1} for t ≥ 1 and the discrete decoder's L_0 at t = 0, in nats/dim."""
    true_mean, true_log_variance = q_posterior(chain, x0, xt, t)
    mean, _ = q_posterior(chain, prediction.x0, xt, t)
    log_variance = model_log_variance(chain, prediction, t, variance)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    decoder = -discrete_decoder_log_likelihood(x0, mean, log_variance, num_levels)
    return jnp.where(t == 0, mean_over_dims(decoder), mean_over_dims(kl))


def bound_estimate(
    process: Process,
    prediction: Prediction,
    x0: Float[Array, "batch *shape"],
    xt: Float[Array, "batch *shape"],
    t: Float[Array, " batch"],
    variance: ModelVariance,
    num_levels: int,
) -> Float[Array, " batch"]:
    """T·L_t in bits/dim: its mean over uniform t is the bound less L_T.

    Raises:
      UserError: where the process is no chain.
    """
    nats = bound_term(chain_of(process), prediction, x0, xt, t, variance, num_levels)
    return process.num_timesteps / jnp.log(2.0) * nats


def prior_term(chain: Chain, x0: Float[Array, "batch *shape"]) -> Float[Array, " batch"]:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) in nats/dim."""
    # ½(ᾱ·x_0² - ᾱ - log(1-ᾱ)), with the last two terms joined in float64.
    alpha_bar = chain.alpha_bar[-1]
    rest = -alpha_bar - chain.log_one_minus_alpha_bar[-1]
    return mean_over_dims(0.5 * (x0**2 * alpha_bar.astype(x0.dtype) + rest.astype(x0.dtype)))


class BoundTerms(NamedTuple):
    """The bound of a batch in nats/dim: ``steps[:, t]`` holds L_0 at t = 0 and L_{t-1} after,
    ``x0_mse`` the squared error of the x_0 predicted there, ``prior`` L_T."""

    steps: Float[Array, "batch T"]
    x0_mse: Float[Array, "batch T"]
    prior: Float[Array, " batch"]

    @property
    def total(self) -> Float[Array, " batch"]:
        return self.steps.sum(axis=1) + self.prior


def variational_bound(
    chain: Chain,
    denoiser: Denoiser,
    x0: Float[Array, "batch *shape"],
    keys: Any,
    conditioning: Conditioning,
    variance: ModelVariance,
    num_levels: int,
) -> BoundTerms:
    """An unbiased estimate of the whole bound, from one draw per term.

    The noise of example i at step t depends only on ``keys[i]`` and t. Pass a ``ClippedDenoiser``
    to evaluate as the paper does.
    """

    def term(carry: None, t: Array) -> tuple[None, tuple[Array, Array]]:
        times = jnp.full(x0.shape[:1], t, x0.dtype)
        xt, _ = corrupt(chain, fold_in(keys, t), x0, times)
        prediction = denoiser(xt, times, conditioning)
        nats = bound_term(chain, prediction, x0, xt, times, variance, num_levels)
        return carry, (nats, mean_over_dims((prediction.x0 - x0) ** 2))

    _, (steps, x0_mse) = jax.lax.scan(term, None, jnp.arange(chain.num_timesteps))
    return BoundTerms(steps.T, x0_mse.T, prior_term(chain, x0))
