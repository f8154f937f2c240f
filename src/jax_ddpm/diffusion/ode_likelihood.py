"""Likelihood by the probability-flow ODE (Chen et al. 2018; Song et al. 2021, section 4.3).

The ODE of every process is dy/ds = ε̂ in y = x/α and s = σ/α (Karras et al. 2022, eq. 1 at
s(t) = 1). Its flow carries the density of data to that of noise, over u = log s = -λ/2:

    dy/du = s·ε̂(α·y, t),    d log p(y)/du = -s·div_y ε̂(α·y, t).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Float64

from jax_ddpm.diffusion.denoiser import Conditioning, Denoiser
from jax_ddpm.diffusion.process import Process, fold_in

# A process that goes on to α = 0 is cut off at this σ/α.
_NO_SIGNAL = 1e4


class FlowLikelihood(NamedTuple):
    """log p(x) in nats, and the latent x_T that x flows to."""

    log_p: Float[Array, " batch"]
    latent: Float[Array, "batch *shape"]


def ode_log_likelihood(
    process: Process,
    denoiser: Denoiser,
    x: Float[Array, "batch *shape"],
    keys: Any,
    conditioning: Conditioning,
    *,
    exact_trace: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> FlowLikelihood:
    """log p(x) of each example under the model that the denoiser's ODE defines.

    x is the state at the least noisy time of the process and flows to the noisiest, where the prior
    is N(0, prior_std²). A density in x is one in y divided by α^d, with d the number of dimensions.
    With x_0 and x_T at these two ends

        log p_x(x_0) = log p_y(y_0) - d·log α_0
        log p_y(y_0) = log p_y(y_T) + ∫ s·div_y ε̂ du
        log p_y(y_T) = log N(x_T; 0, prior_std²) + d·log α_T.

    The divergence is the trace of the Jacobian J of ε̂, estimated without bias by vᵀ·J·v
    (Hutchinson 1990; Grathwohl et al. 2019). One v of random signs, drawn from ``keys[i]``, serves
    the whole path of example i; ``exact_trace`` takes vᵀ·J·v along every axis, at d times the cost
    and memory. The integrator is Dormand and Prince's, in x's dtype. Each example takes the steps
    that its tolerances need, whatever the rest of the batch.

    The denoiser should not clip x_0: clipping puts kinks into the ODE and drops the clipped part
    from the divergence. A process that goes on to α = 0 is cut off at σ/α = 10⁴, where data in
    [-1, 1] differ from the prior by a KL divergence below 2·10⁻⁸ nats per dimension.
    """
    times = _ends(process)
    u_0, u_T = (-process.log_snr(times) / 2).tolist()
    alpha_0, alpha_T = process.alpha(times).tolist()

    def slope(state, tau, denoiser, given, probes):
        # u goes from u_0 at τ = 0 to u_T at τ = 1. The integrator steps past the end and
        # interpolates back; the cosine turns back there, so no noise beyond the end is asked for.
        u = u_0 + (u_T - u_0) * (1 - jnp.cos(jnp.pi * tau)) / 2
        ds = jnp.exp(u) * (u_T - u_0) * jnp.sin(jnp.pi * tau) * (jnp.pi / 2)
        t = jnp.clip(process.time(-2 * u), *times.tolist())

        def eps(y):
            return denoiser(process.alpha(t) * y[None], t, given).eps[0]

        y, _ = state
        value, jacobian = jax.linearize(eps, y)
        divergence = jnp.sum(probes * jax.vmap(jacobian)(probes))
        return ds * value, ds * divergence / y.size

    def flow(x, key, given):
        # The log of the volume's growth is kept per dimension, as large as a coordinate of y.
        start = x / alpha_0, jnp.zeros((), x.dtype)
        given = jax.tree.map(lambda array: array[None], given)
        probes = _axes(x) if exact_trace else jax.random.rademacher(key, (1, *x.shape), x.dtype)
        tau = jnp.array([0, 1], x.dtype)
        path = odeint(slope, start, tau, denoiser, given, probes, rtol=rtol, atol=atol)
        y, growth = jax.tree.map(lambda values: values[-1], path)
        latent = alpha_T * y
        log_prior = norm.logpdf(latent, scale=process.prior_std(times[1])).sum()
        log_alpha_ratio = float(np.log(alpha_T / alpha_0))
        return FlowLikelihood(log_prior + x.size * (log_alpha_ratio + growth), latent)

    return jax.vmap(flow)(x, keys, conditioning)


def _ends(process: Process) -> Float64[np.ndarray, " 2"]:
    """The first and the last time of the flow."""
    times = np.array(process.time_range)
    if process.alpha(times)[1] == 0:
        times[1:] = process.time(np.array([-2 * np.log(_NO_SIGNAL)]))
    return times


def _axes(x: Float[Array, "*shape"]) -> Float[Array, "d *shape"]:
    """The unit vectors of x's space."""
    return jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape)


def dequantised_nll(
    process: Process,
    denoiser: Denoiser,
    x0: Float[Array, "batch *shape"],
    keys: Any,
    conditioning: Conditioning,
    num_levels: int,
    *,
    exact_trace: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Float[Array, " batch"]:
    """An upper bound on -log P(x_0) in nats/dim, in expectation over ``keys``.

    ``x0`` holds ``num_levels`` evenly spaced levels from -1 to 1, each the centre of a bin of width
    w. The model's P of a level is its density integrated over the bin. A u uniform over the bin and
    Jensen's inequality give (Theis et al. 2016)

        -log P(x_0) = -log E p(x_0 + u) - d·log w ≤ -E log p(x_0 + u) - d·log w.

    One u is drawn per example.
    """
    width = 2 / (num_levels - 1)

    def uniform(key):
        return jax.random.uniform(key, x0.shape[1:], x0.dtype, -width / 2, width / 2)

    x = x0 + jax.vmap(uniform)(fold_in(keys, 0))
    flow = ode_log_likelihood(
        process,
        denoiser,
        x,
        fold_in(keys, 1),
        conditioning,
        exact_trace=exact_trace,
        rtol=rtol,
        atol=atol,
    )
    return -flow.log_p / x0[0].size - float(np.log(width))
