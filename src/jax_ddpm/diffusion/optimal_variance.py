"""The optimal variance of the reverse process, without training (Bao et al. 2022, Analytic-DPM)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jax_ddpm.diffusion.denoiser import Conditioning, Denoiser
from jax_ddpm.diffusion.likelihood import mean_over_dims
from jax_ddpm.diffusion.process import ALL_NOISE, Process, corrupt, fold_in
from jax_ddpm.diffusion.samplers.grid import Grid

_NUM_TIMES = 200  # for a process without steps of its own
# Noise of this variance moves a pixel by one of 256 levels of [-1, 1] on average.
_LEAST_VISIBLE = np.pi / 2 * (2 / 255) ** 2


class X0Error(NamedTuple):
    """E‖x_0 - x̂_0(x_t)‖²/d over the data and the noise, at rising λ."""

    log_snr: Float64[np.ndarray, " n"]
    mse: Float64[np.ndarray, " n"]


def visited_times(process: Process) -> Float64[np.ndarray, " n"]:
    """Every step of a chain, or a grid even in λ in continuous time; both down to ``ALL_NOISE``."""
    if process.num_timesteps:
        times = np.arange(process.num_timesteps, dtype=float)
        return times[process.log_snr(times) >= ALL_NOISE]
    high, low = process.log_snr(np.array(process.time_range))
    return process.time(np.linspace(high, max(low, ALL_NOISE), _NUM_TIMES))


def x0_error(
    process: Process,
    denoiser: Denoiser,
    x0: Float[Array, "batch *shape"],
    times: Float[Array, " n"],
    keys: Any,
    conditioning: Conditioning,
) -> Float[Array, "n batch"]:
    """‖x_0 - x̂_0‖²/d of each example at each time, with one draw of x_t ~ q(x_t | x_0)."""

    def at(row: tuple[Array, Array]) -> Array:
        index, t = row
        xt, _ = corrupt(process, fold_in(keys, index), x0, t)
        return mean_over_dims((x0 - denoiser(xt, t, conditioning).x0) ** 2)

    return jax.lax.map(at, (jnp.arange(times.size), times))


def optimal_variance(
    grid: Grid, statistic: X0Error, visible: bool = True
) -> Float64[np.ndarray, " steps"]:
    """σ*² of each step, for ``ancestral`` (Bao et al. 2022, theorem 1 and its bounds, theorem 2).

        σ*² = β̃ + c_0²·Cov,   Cov = E‖x_0 - x̂_0‖²/d,

    where c_0 weights x̂_0 in the posterior mean and Cov is what x_t leaves unknown of x_0, at most
    1 for data in [-1, 1]. Cov of an exact model is their (σ/α)²·(1 - E‖ε̂‖²/d). The error itself is
    also the optimum of an inexact model (Bao et al. 2022, "Estimating the optimal covariance with
    imperfect mean", theorem 3.1), and can be estimated at high noise as well as at low. It is
    interpolated between the λ of the statistic and held beyond them. A step to clean data draws no
    noise, so that of the step before it is seen where x_0 are pixels (``visible``): there E|σ*·z|
    is at most one of 256 levels, 2/255 (the first paper's section 4.2, with y = 1).
    """
    unknown = np.interp(grid.now.log_snr, statistic.log_snr, np.minimum(statistic.mse, 1))
    step = grid.posterior
    variance = np.where(grid.after.sigma > 0, step.variance + step.coef_x0**2 * unknown, 0)
    if visible and grid.after.sigma[-1] == 0:
        variance[-2:-1] = np.minimum(variance[-2:-1], _LEAST_VISIBLE)
    return variance
