"""Ancestral sampling: the reverse chain p(x_s | x_t) of Ho et al. 2020, algorithm 2."""

from functools import partial
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from jax_ddpm.diffusion.likelihood import ModelVariance
from jax_ddpm.diffusion.process import per_example_normal
from jax_ddpm.diffusion.samplers.grid import Grid
from jax_ddpm.diffusion.samplers.scan import Sampler
from jax_ddpm.options import OneOf, Option


class AncestralNode(NamedTuple):
    """One step t → s: x_s = coef_x0·x̂_0 + coef_xt·x_t + noise·σ·z.

    log σ² = log_variance + fraction·log_variance_span lies between log β̃ and log β of this step;
    ``noise`` is 1, or 0 for a step without noise.
    """

    time: Float64[np.ndarray, " steps"]
    coef_x0: Float64[np.ndarray, " steps"]
    coef_xt: Float64[np.ndarray, " steps"]
    log_variance: Float64[np.ndarray, " steps"]
    log_variance_span: Float64[np.ndarray, " steps"]
    fraction: Float64[np.ndarray, " steps"]
    noise: Float64[np.ndarray, " steps"]


Variance = Annotated[
    ModelVariance | Float64[np.ndarray, " steps"],
    Option(
        "Of the steps, in place of the model's own; optimal: by its measured errors.",
        OneOf(("fixedsmall", "fixedlarge", "optimal")),
        kind=str,
    ),
]


def ancestral(grid: Grid, variance: Variance) -> Sampler:
    """The ancestral sampler down a grid.

    The coefficients over fewer steps than the chain has are those of the re-spaced chain, rebuilt
    from the ratios of ᾱ. The steps' variances are β̃ ("fixedsmall"), β ("fixedlarge"), the model's
    own ("learned"), or given, one value per step. A step to clean data draws no noise, unless its
    variance is given and positive.

    Raises:
      ValueError: where a given variance is negative or the grid rises.
    """
    if isinstance(variance, np.ndarray) and np.any(variance < 0):
        raise ValueError("variances must not be negative")
    beta, step = grid.beta, grid.posterior
    if isinstance(variance, np.ndarray):
        noise, variances, fraction = np.sign(variance), variance, 0.0
    else:
        noise, variances = np.sign(grid.after.sigma), step.variance
        fraction = 0.0 if variance == "fixedsmall" else 1.0
    smallest = np.log(variances, where=noise > 0, out=np.zeros_like(beta))
    nodes = AncestralNode(
        time=grid.now.time,
        coef_x0=step.coef_x0,
        coef_xt=step.coef_xt,
        log_variance=smallest,
        log_variance_span=noise * (np.log(beta) - smallest),
        fraction=np.full_like(beta, fraction),
        noise=noise,
    )
    learned = isinstance(variance, str) and variance == "learned"
    return grid.sampler(nodes, partial(_step, learned))


def _step(learned: bool, denoiser, x: Array, node: AncestralNode, carry: tuple, keys):
    prediction = denoiser(x, node.time)
    fraction = node.fraction
    if learned:
        assert prediction.variance_fraction is not None, "this model predicts no variance"
        fraction = prediction.variance_fraction
    std = jnp.exp(0.5 * (node.log_variance + fraction * node.log_variance_span))
    mean = node.coef_x0 * prediction.x0 + node.coef_xt * x
    return mean + node.noise * std * per_example_normal(keys, x), carry, prediction
