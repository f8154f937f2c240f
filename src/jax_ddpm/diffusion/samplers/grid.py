"""The path of a sampler: noise levels from its start to its end, in float64 on the host."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from jax_ddpm.diffusion.process import (
    ALL_NOISE,
    Posterior,
    Process,
    posterior_coefficients,
    prior,
)
from jax_ddpm.diffusion.samplers.scan import Sampler, no_history
from jax_ddpm.options import Table, Unfit


class Levels(NamedTuple):
    """Times of a process with their α, σ and λ."""

    time: Float64[np.ndarray, " n"]
    alpha: Float64[np.ndarray, " n"]
    sigma: Float64[np.ndarray, " n"]
    log_snr: Float64[np.ndarray, " n"]

    @property
    def noise_to_signal(self) -> Float64[np.ndarray, " n"]:
        """σ/α, the σ of Karras et al. 2022; ∞ where α = 0."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha


class Grid(NamedTuple):
    """The steps now[i] → after[i] of a process; after[i] is now[i+1]."""

    process: Process
    now: Levels
    after: Levels

    @property
    def num_steps(self) -> int:
        return len(self.now.time)

    @property
    def step_size(self) -> Float64[np.ndarray, " steps"]:
        """h = log(α_s/σ_s) - log(α_t/σ_t) of each step t → s; ∞ from pure noise and to clean data.

        h is half the change of λ: the λ of Lu et al. 2022 is log(α/σ).
        """
        return (self.after.log_snr - self.now.log_snr) / 2

    @property
    def beta(self) -> Float64[np.ndarray, " steps"]:
        """The variance of q(x_t | x_s): σ_t² - (α_t/α_s)²·σ_s²."""
        return -(self.now.sigma**2) * np.expm1(-2 * self.step_size)

    @property
    def posterior(self) -> Posterior:
        """The coefficients of q(x_s | x_t, x_0).

        Raises:
          ValueError: where the grid rises.
        """
        if np.any(self.step_size < 0):
            raise ValueError("towards noise there is no ancestral step")
        now, after = self.now, self.after
        return posterior_coefficients(self.beta, now.alpha, now.sigma, after.alpha, after.sigma)

    def sampler(self, nodes: Any, step: Callable, init: Callable = no_history) -> Sampler:
        """A sampler along this grid, which starts from the noise of its first time."""
        return Sampler(nodes, init, step, start=partial(prior, self.process, self.now.time[0]))


def levels(process: Process, times: Float64[np.ndarray, " n"]) -> Levels:
    """The process at these times; λ is -∞ where α = 0, even if the process keeps it finite."""
    alpha = process.alpha(times)
    log_snr = np.where(alpha > 0, process.log_snr(times), -np.inf)
    return Levels(times, alpha, process.sigma(times), log_snr)


def along(process: Process, times: Float64[np.ndarray, " n"]) -> Grid:
    """The steps through these times, the last of which is the end; rising times lead to noise.

    Raises:
      ValueError: where the times are fewer than two or neither fall nor rise, or lie where a chain
        has no noise level.
    """
    _check_between(process, times)
    change = np.diff(times)
    if len(times) < 2 or not (np.all(change < 0) or np.all(change > 0)):
        raise ValueError("times must be two or more, all falling or all rising")
    now, after = levels(process, times[:-1]), levels(process, times[1:])
    return Grid(process, now, after)


def to_clean(process: Process, times: Float64[np.ndarray, " n"]) -> Grid:
    """The steps down through these times, and from the last of them to exactly clean data.

    Raises:
      ValueError: where times do not decrease, or lie where a chain has no noise level.
    """
    _check_between(process, times)
    if np.any(np.diff(times) >= 0):
        raise ValueError("times must decrease, from the noisiest to the last before clean data")
    now = levels(process, times)
    clean = Levels(*map(np.array, ([process.time_range[0]], [1.0], [0.0], [np.inf])))
    return Grid(process, now, Levels(*map(np.append, levels(process, times[1:]), clean)))


def _check_between(process: Process, times: Float64[np.ndarray, " n"]) -> None:
    """Between the last step with signal and pure noise no noise level is in between."""
    end = process.time_range[1]
    lost = process.num_timesteps and process.alpha(np.array([end]))[0] == 0
    if lost and np.any(between := (end - 1 < times) & (times < end)):
        t = times[between][0]
        raise ValueError(
            f"t = {t:g} lies between {end - 1:g} and {end:g}, which is pure noise: the chain has "
            "no noise level there; take fewer steps or whole times"
        )


def uniform(process: Process, num_steps: int) -> Float64[np.ndarray, " steps"]:
    """Times evenly spaced in t: whole steps of a chain, both of its ends among them.

    The step to clean data is as long as the others in continuous time.

    Raises:
      ValueError: where a chain has fewer steps.
    """
    low, high = process.time_range
    if process.num_timesteps:
        if num_steps > process.num_timesteps:
            must_be = f"at most the {process.num_timesteps} of the chain"
            raise Unfit("num_steps", num_steps, must_be)
        return np.round(np.linspace(high, low, num_steps))
    return np.linspace(high, low, num_steps + 1)[:-1]


def quadratic(process: Process, num_steps: int) -> Float64[np.ndarray, " steps"]:
    """√t evenly spaced, so finer at low noise (Song et al. 2021, DDIM, appendix D.2)."""
    low, high = process.time_range
    return _exactly_between(np.array([high, low]), np.linspace(high**0.5, low**0.5, num_steps) ** 2)


def karras(process: Process, num_steps: int, rho: float = 7.0) -> Float64[np.ndarray, " steps"]:
    """(σ/α)^(1/ρ) evenly spaced, both useful ends among them (Karras et al. 2022, eq. 5).

    Raises:
      ValueError: where the process ends without signal, at infinite σ/α.
    """
    ends = _useful_ends("karras", process)
    first, last = np.exp(-process.log_snr(ends) / (2 * rho))
    log_snr = -2 * rho * np.log(np.linspace(first, last, num_steps))
    return _exactly_between(ends, process.time(log_snr))


def log_snr_uniform(process: Process, num_steps: int) -> Float64[np.ndarray, " steps"]:
    """λ evenly spaced, both useful ends among them (Lu et al. 2022, DPM-Solver).

    Raises:
      ValueError: where the process ends without signal, at infinite λ.
    """
    ends = _useful_ends("log_snr", process)
    first, last = process.log_snr(ends)
    return _exactly_between(ends, process.time(np.linspace(first, last, num_steps)))


def _useful_ends(grid: str, process: Process) -> Float64[np.ndarray, " 2"]:
    """The noisiest and the least noisy time worth a visit.

    A process whose sampling starts from the same noise at every t begins at ``ALL_NOISE``.
    """
    low, high = process.time_range
    if process.alpha(np.array([high]))[0] == 0:
        must_be = "uniform or quadratic: the process ends without signal, at infinite σ/α"
        raise Unfit("grid", grid, must_be)
    same_everywhere = process.prior_std(low) == process.prior_std(high)
    if same_everywhere and process.log_snr(np.array([high]))[0] < ALL_NOISE:
        high = float(process.time(np.array([ALL_NOISE]))[0])
    return np.array([high, low])


def _exactly_between(
    ends: Float64[np.ndarray, " 2"], times: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """The times, with the ends restored that rounding has changed."""
    times[0] = ends[0]
    if len(times) > 1:
        times[-1] = ends[1]
    return times


# (process, num_steps) → times, falling
GRIDS = Table(uniform=uniform, quadratic=quadratic, karras=karras, log_snr=log_snr_uniform)
