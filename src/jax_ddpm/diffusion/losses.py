"""Weighted denoising errors, with all weightings stated on the squared ε-error.

    loss(t) = w(t)·‖ε - ε̂‖², averaged over dimensions.

An error in another target is an ε-error with another weight: ‖y - ŷ‖² = (Δ/α)²·‖ε - ε̂‖², with Δ of
``parameterisation.Target``. A loss is therefore computed in the network's own target, where it is
free of cancellation, and multiplied by w·(α/Δ)².
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.likelihood import mean_over_dims
from jax_ddpm.diffusion.parameterisation import TARGETS, Parameterisation
from jax_ddpm.diffusion.process import Process

Weighting = Callable[[Process, Array], Array]


def _signal(process: Process, t: Array) -> Array:
    """α, never quite 0: w·(α/Δ)² is a finite limit of ∞·0 where a chain ends without signal."""
    return jnp.maximum(process.alpha(t), 1e-18)


def simple(process: Process, t: Array) -> Array:
    """w = 1: L_simple (Ho et al. 2020, eq. 14), which is the SNR-weighted x_0-error."""
    return jnp.ones_like(t)


def truncated_snr(process: Process, t: Array) -> Array:
    """The x_0-error under max(SNR, 1): w = max(1, 1/SNR) (Salimans & Ho 2022)."""
    return jnp.maximum(1, (process.sigma(t) / _signal(process, t)) ** 2)


def min_snr(process: Process, t: Array, gamma: float = 5.0) -> Array:
    """The x_0-error under min(SNR, γ): w = min(1, γ/SNR) (Hang et al. 2023)."""
    return jnp.minimum(1, gamma * (process.sigma(t) / _signal(process, t)) ** 2)


def p2(process: Process, t: Array, k: float = 1.0, gamma: float = 1.0) -> Array:
    """w = 1/(k + SNR)^γ (Choi et al. 2022)."""
    return (k + (process.alpha(t) / process.sigma(t)) ** 2) ** -gamma


def vlb(process: Process, t: Array) -> Array:
    """The bound's own weight: a KL of equal variances σ² = β̃ is ‖μ̃ - μ̂‖²/(2σ²) (Ho et al., eq. 12).

    σ² at t = 0, where β̃ = 0, is that of t = 1. T times the expectation over uniform t estimates
    Σ L_{t-1} in nats/dim.
    """
    assert isinstance(process, Chain), "the VLB weighting belongs to the T-step chain"
    log_variance = process.gather(process.posterior_log_variance, t)
    return 0.5 * WEIGHTINGS["posterior_mean"](process, t) * jnp.exp(-log_variance)


def _error_in(target: str) -> Weighting:
    def weighting(process: Process, t: Array) -> Array:
        return (TARGETS[target](process, t).delta / _signal(process, t)) ** 2

    weighting.__doc__ = f"The plain squared error in the target {target!r}."
    return weighting


WEIGHTINGS: dict[str, Weighting] = {
    "simple": simple,
    "snr": simple,
    "truncated_snr": truncated_snr,
    "min_snr": min_snr,
    "p2": p2,
    "vlb": vlb,
    "x0": _error_in("x0"),
    "v": _error_in("v"),
    "posterior_mean": _error_in("posterior_mean"),
}
# The plain squared error in the network's own target: λ(σ) on the x_0-error for EDM's F (Karras et
# al. 2022, table 1), flow matching for a flow's velocity (Lipman et al. 2023).
OWN_TARGET = "target"


def weighted_error(
    parameterisation: Parameterisation,
    weighting: str,
    y: Float[Array, "batch *shape"],
    target: Float[Array, "batch *shape"],
    t: Float[Array, " batch"],
) -> Float[Array, " batch"]:
    """w(t)·‖ε - ε̂‖² per example, from the network's mean output y and its regression target."""
    error = mean_over_dims((target - y) ** 2)
    if weighting == OWN_TARGET:
        return error
    process = parameterisation.process
    to_eps_error = (_signal(process, t) / parameterisation.coefficients(t).delta) ** 2
    return WEIGHTINGS[weighting](process, t) * to_eps_error * error
