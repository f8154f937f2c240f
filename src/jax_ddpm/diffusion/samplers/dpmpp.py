"""DPM-Solver++ 2M and its SDE form (Lu et al. 2022, "DPM-Solver++", algorithm 2 and appendix)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from jax_ddpm.diffusion.process import per_example_normal
from jax_ddpm.diffusion.samplers.ddim import Eta
from jax_ddpm.diffusion.samplers.grid import Grid
from jax_ddpm.diffusion.samplers.scan import Sampler
from jax_ddpm.options import checked


class DPMNode(NamedTuple):
    """One step t → s: x_s = coef_x·x_t + coef_x0·x̂_0 + coef_change·(x̂_0 - the last x̂_0) + std·z."""

    time: Float64[np.ndarray, " steps"]
    coef_x: Float64[np.ndarray, " steps"]
    coef_x0: Float64[np.ndarray, " steps"]
    coef_change: Float64[np.ndarray, " steps"]
    std: Float64[np.ndarray, " steps"]


@checked
def dpmpp_2m(grid: Grid, eta: Eta = 0.0) -> Sampler:
    """Second order with one evaluation a step, from the change of x̂_0 since the last step.

    h is the step in log(α/σ), r the last step over this one and v = 1 - exp(-2ηh). The exact
    solution of the (reverse) SDE for an x̂_0 that is linear in log(α/σ) is, to second order,

        x_s = σ_s/σ_t·exp(-ηh)·x_t + α_s·(1 - exp(-(1+η)h))·(x̂_0 + (x̂_0 - x̂_0')/(2r)) + σ_s·√v·z.

    η = 0 solves the probability-flow ODE, η = 1 the SDE ("2M SDE", midpoint). The first step, a
    step of infinite h and the step after one are of first order: DDIM's, with v·σ_s² in place of
    η²·β̃.

    Raises:
      ValueError: where η is outside [0, 1], or positive on a grid that rises.
    """
    h = grid.step_size
    if eta > 0 and np.any(h < 0):
        raise ValueError("towards noise the SDE is not run: eta must be 0")
    eta_h = np.multiply(eta, h, where=np.isfinite(h), out=np.full_like(h, np.inf if eta else 0.0))
    second_order = np.isfinite(h) & np.isfinite(np.append(np.inf, h[:-1]))
    last_over_this = np.divide(np.append(0.0, h[:-1]), h, where=second_order, out=np.ones_like(h))
    coef_x = grid.after.sigma / grid.now.sigma * np.exp(-eta_h)
    coef_x0 = grid.after.alpha - coef_x * grid.now.alpha
    nodes = DPMNode(
        time=grid.now.time,
        coef_x=coef_x,
        coef_x0=coef_x0,
        coef_change=np.where(second_order, coef_x0 / (2 * last_over_this), 0.0),
        std=grid.after.sigma * np.sqrt(-np.expm1(-2 * eta_h)),
    )
    return grid.sampler(nodes, _step if eta > 0 else _step_without_noise, init=jnp.zeros_like)


def _step_without_noise(denoiser, x: Array, node: DPMNode, last_x0: Array, keys):
    prediction = denoiser(x, node.time)
    change = prediction.x0 - last_x0
    x = node.coef_x * x + node.coef_x0 * prediction.x0 + node.coef_change * change
    return x, prediction.x0, prediction


def _step(denoiser, x: Array, node: DPMNode, last_x0: Array, keys):
    x, last_x0, prediction = _step_without_noise(denoiser, x, node, last_x0, keys)
    return x + node.std * per_example_normal(keys, x), last_x0, prediction
