"""Heun's method on the probability-flow ODE, with or without churn (Karras et al. 2022, alg. 2).

Every process has the same ODE in y = x/α and s = σ/α: dy/ds = ε̂ (their eq. 1 at s(t) = 1).
"""

from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from jax_ddpm.diffusion.process import per_example_normal
from jax_ddpm.diffusion.samplers.grid import Grid, Levels, levels
from jax_ddpm.diffusion.samplers.scan import Sampler
from jax_ddpm.options import Option, checked, noise_levels, not_negative_and_finite


class HeunNode(NamedTuple):
    """One evaluation, at a step's start x_t or at the x_s that it led to.

    x at the start is first raised to more noise, then takes Euler's step, which is DDIM's:

        x_t = raised·x + noise·z,   x_s = coef_x0·x̂_0 + coef_eps·ε̂.

    The evaluation at x_s (``kept`` = 1) corrects half of the difference between the two slopes:

        x_s = x + coef_eps·(ε̂ - ε̂ at the start).
    """

    time: Float64[np.ndarray, " rows"]
    raised: Float64[np.ndarray, " rows"]
    noise: Float64[np.ndarray, " rows"]
    kept: Float64[np.ndarray, " rows"]
    coef_x0: Float64[np.ndarray, " rows"]
    coef_eps: Float64[np.ndarray, " rows"]


Churn = Annotated[float, Option("Noise added again, S_churn.", not_negative_and_finite)]
ChurnRange = Annotated[
    tuple[float, float], Option("Noise levels σ/α where it is, (S_tmin, S_tmax).", noise_levels)
]
ChurnNoise = Annotated[float, Option("Its standard deviation, S_noise.", not_negative_and_finite)]


@checked
def heun(
    grid: Grid,
    churn: Churn = 0.0,
    churn_range: ChurnRange = (0.0, np.inf),
    churn_noise: ChurnNoise = 1.0,
) -> Sampler:
    """2n - 1 evaluations over n steps to clean data, 2n - 2 where these begin at α = 0.

    A step from α = 0 or to σ = 0 is Euler's.

    Args:
      churn: S_churn, with γ = min(churn/n, √2 - 1): a step's start is first raised to the noise
        (1 + γ)·σ/α, but never above the grid's start. 0 is the deterministic method.
      churn_range: [S_tmin, S_tmax], the σ/α where noise is added.
      churn_noise: S_noise, the standard deviation of the noise added.

    Raises:
      ValueError: where churn is negative, or positive on a grid that rises.
    """
    if churn > 0 and np.any(grid.step_size < 0):
        raise ValueError("towards noise nothing is churned: churn must be 0")
    start, raised, noise = _churned(grid, churn, churn_range, churn_noise)
    after = grid.after
    rows: list[tuple[float, ...]] = []  # a HeunNode each
    for i in range(grid.num_steps):
        rows.append((start.time[i], raised[i], noise[i], 0, after.alpha[i], after.sigma[i]))
        if start.alpha[i] > 0 and after.sigma[i] > 0:
            drift = after.sigma[i] - start.sigma[i] / start.alpha[i] * after.alpha[i]
            rows.append((after.time[i], 1, 0, 1, 0, drift / 2))
    nodes = HeunNode(*np.array(rows).T)
    return grid.sampler(nodes, _step if churn > 0 else _step_without_noise, init=jnp.zeros_like)


def _churned(
    grid: Grid, churn: float, churn_range: tuple[float, float], churn_noise: float
) -> tuple[Levels, np.ndarray, np.ndarray]:
    """The start of each step, and the factor and the noise that raise x to there."""
    s = grid.now.noise_to_signal
    gamma = min(churn / grid.num_steps, np.sqrt(2) - 1)
    higher = np.minimum((1 + gamma) * s, s[0])
    inside = (churn_range[0] <= s) & (s <= churn_range[1]) & (higher > s)
    if not np.any(inside):
        return grid.now, np.ones_like(s), np.zeros_like(s)
    times = np.where(inside, grid.process.time(-2 * np.log(np.where(inside, higher, 1))), 0)
    start = levels(grid.process, np.where(inside, times, grid.now.time))
    raised = np.where(inside, start.alpha / np.where(inside, grid.now.alpha, 1), 1)
    added = np.where(inside, start.noise_to_signal**2 - np.where(inside, s, 0) ** 2, 0)
    return start, raised, start.alpha * churn_noise * np.sqrt(added)


def _step_without_noise(denoiser, x: Array, node: HeunNode, slope: Array, keys):
    prediction = denoiser(x, node.time)
    step = node.coef_x0 * prediction.x0 + node.coef_eps * prediction.eps
    x = node.kept * (x - node.coef_eps * slope) + step
    return x, prediction.eps, prediction


def _step(denoiser, x: Array, node: HeunNode, slope: Array, keys):
    x = node.raised * x + node.noise * per_example_normal(keys, x)
    return _step_without_noise(denoiser, x, node, slope, keys)
