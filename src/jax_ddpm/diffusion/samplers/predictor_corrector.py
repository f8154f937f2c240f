"""Predictor–corrector sampling (Song et al. 2021, "Score-based generative modeling", alg. 4, 5)."""

from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float64

from jax_ddpm.diffusion.process import expand, per_example_normal
from jax_ddpm.diffusion.samplers.grid import Grid
from jax_ddpm.diffusion.samplers.scan import Sampler
from jax_ddpm.options import Option, between, checked, positive_and_finite


class PredictorCorrectorNode(NamedTuple):
    """One evaluation at t, for a Langevin step at t (``corrects``) or the step t → s.

    Langevin:  x + δ·score + √(2δ)·z,  δ = 2·(1-β)·(snr·‖z‖/‖score‖)², score = -ε̂/σ
    predictor: x_s = coef_x0·x̂_0 + coef_xt·x + std·z.
    """

    time: Float64[np.ndarray, " rows"]
    corrects: Bool[np.ndarray, " rows"]
    sigma: Float64[np.ndarray, " rows"]
    strength: Float64[np.ndarray, " rows"]
    coef_x0: Float64[np.ndarray, " rows"]
    coef_xt: Float64[np.ndarray, " rows"]
    std: Float64[np.ndarray, " rows"]


Snr = Annotated[
    float, Option("How strong a corrector's noise is beside the score.", positive_and_finite)
]
CorrectorSteps = Annotated[int, Option("Langevin steps before each step.", between(0, 1000))]


@checked
def predictor_corrector(
    grid: Grid, snr: Snr = 0.16, corrector_steps: CorrectorSteps = 1
) -> Sampler:
    """``corrector_steps`` Langevin steps at t before each ancestral step (variance β̃).

    ``snr`` is the paper's r, the strength of the noise relative to the score. Norms are each
    example's own, so a sample does not depend on the others; the paper's code averages them over
    the batch. A step's size so depends on the example's own chance, which makes samples of few
    dimensions wider than the data, visibly below about 100. 1-β is that of the step t → s, which is
    1 in a variance-exploding process.

    Raises:
      ValueError: where snr is not positive, corrector_steps is negative or the grid rises.
    """
    with np.errstate(divide="ignore"):
        kept = (grid.now.alpha / grid.after.alpha) ** 2
    step = grid.posterior
    table = PredictorCorrectorNode(
        time=grid.now.time,
        corrects=np.zeros(grid.num_steps, bool),
        sigma=grid.now.sigma,
        strength=2 * kept * snr**2,
        coef_x0=step.coef_x0,
        coef_xt=step.coef_xt,
        std=np.sqrt(step.variance),
    )
    each = corrector_steps + 1
    nodes = PredictorCorrectorNode(*(np.repeat(column, each) for column in table))
    corrects = np.arange(len(nodes.time)) % each != each - 1
    return grid.sampler(nodes._replace(corrects=corrects), _step)


def _step(denoiser, x: Array, node: PredictorCorrectorNode, carry: tuple, keys):
    prediction, z = denoiser(x, node.time), per_example_normal(keys, x)
    score = -prediction.eps / node.sigma
    size = node.strength * expand(_square_norm(z) / _square_norm(score), x)
    corrected = x + size * score + jnp.sqrt(2 * size) * z
    predicted = node.coef_x0 * prediction.x0 + node.coef_xt * x + node.std * z
    return jnp.where(node.corrects, corrected, predicted), carry, prediction


def _square_norm(x: Array) -> Array:
    return jnp.sum(x**2, axis=tuple(range(1, x.ndim)))
