"""DDIM (Song et al. 2021, "Denoising diffusion implicit models", eq. 12)."""

from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Array, Float64

from jax_ddpm.diffusion.process import per_example_normal
from jax_ddpm.diffusion.samplers.grid import Grid
from jax_ddpm.diffusion.samplers.scan import Sampler
from jax_ddpm.options import Option, between, checked

Eta = Annotated[float, Option("Fresh noise: 0 none, 1 as much as the reverse SDE.", between(0, 1))]


class DDIMNode(NamedTuple):
    """One step t → s: x_s = coef_x0·x̂_0 + coef_eps·ε̂ + std·z."""

    time: Float64[np.ndarray, " steps"]
    coef_x0: Float64[np.ndarray, " steps"]
    coef_eps: Float64[np.ndarray, " steps"]
    std: Float64[np.ndarray, " steps"]


@checked
def ddim(grid: Grid, eta: Eta = 0.0) -> Sampler:
    """x_s = α_s·x̂_0 + √(σ_s² - v)·ε̂ + √v·z with v = η²·β̃.

    η = 1 is ancestral sampling with "fixedsmall". η = 0 draws no noise and is Euler's method on the
    probability-flow ODE d(x/α) = ε̂ d(σ/α), which also runs upwards, from images to noise.

    Raises:
      ValueError: where η is outside [0, 1], or positive on a grid that rises.
    """
    variance = eta**2 * grid.posterior.variance if eta > 0 else np.zeros(grid.num_steps)
    nodes = DDIMNode(
        time=grid.now.time,
        coef_x0=grid.after.alpha,
        coef_eps=np.sqrt(np.maximum(grid.after.sigma**2 - variance, 0)),  # ≥ 0 up to round-off
        std=np.sqrt(variance),
    )
    return grid.sampler(nodes, _step if eta > 0 else _step_without_noise)


def _step_without_noise(denoiser, x: Array, node: DDIMNode, carry: tuple, keys):
    prediction = denoiser(x, node.time)
    return node.coef_x0 * prediction.x0 + node.coef_eps * prediction.eps, carry, prediction


def _step(denoiser, x: Array, node: DDIMNode, carry: tuple, keys):
    x, carry, prediction = _step_without_noise(denoiser, x, node, carry, keys)
    return x + node.std * per_example_normal(keys, x), carry, prediction
