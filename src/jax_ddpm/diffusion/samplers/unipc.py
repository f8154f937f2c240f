"""UniPC (Zhao et al. 2023), in its multistep form with x_0-prediction and B₂(h)."""

from functools import partial
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from jax_ddpm.diffusion.samplers.grid import Grid
from jax_ddpm.diffusion.samplers.scan import Sampler
from jax_ddpm.options import Option, Where, checked


class UniPCNode(NamedTuple):
    """One evaluation x̂_0 at t: it corrects the step that led there, then the next step follows.

    x_t = kept·x + corrector_x·(x_t before) + Σ_k corrector[k]·x̂_0^(k)
    x_s = predictor_x·x_t + Σ_k predictor[k]·x̂_0^(k),   x̂_0^(k) newest first.
    """

    time: Float64[np.ndarray, " steps"]
    kept: Float64[np.ndarray, " steps"]
    corrector_x: Float64[np.ndarray, " steps"]
    corrector: Float64[np.ndarray, "steps order+1"]
    predictor_x: Float64[np.ndarray, " steps"]
    predictor: Float64[np.ndarray, "steps order+1"]


Order = Annotated[
    int,
    Option("Evaluations that a step looks back on.", Where(lambda p: 1 <= p <= 4, "from 1 to 4")),
]


@checked
def unipc(grid: Grid, order: Order = 2) -> Sampler:
    """UniPC-p: a predictor of order p and a corrector of order p + 1, one evaluation a step.

    The corrected x is not evaluated again. The first steps have the order that their history
    allows; a step from α = 0 or to σ = 0 is DDIM's, and is not corrected.

    Raises:
      ValueError: where the order is not from 1 to 4.
    """
    # log(α/σ), the λ of Lu et al. and Zhao et al.
    at = np.append(grid.now.log_snr, grid.after.log_snr[-1]) / 2
    finite = np.isfinite(at)
    width, rows, orders = order + 1, [], []
    scale = grid.after.sigma / grid.now.sigma
    # The effect of a constant x̂_0: α_s·(1 - exp(-h)) of Zhao et al., also where h is infinite.
    total = grid.after.alpha - scale * grid.now.alpha
    for i in range(grid.num_steps):
        singular = not (finite[i] and finite[i + 1])
        orders.append(1 if singular else min(order, 1 + int(sum(finite[:i]))))
        correct = i > 0 and finite[i - 1] and finite[i]
        corrector = np.zeros(width)
        if correct:
            corrector = total[i - 1] * _weights(at, i - 1, orders[i - 1], width, True)
        predictor = total[i] * _weights(at, i, orders[i], width, False)
        rows.append(
            (1.0 - correct, scale[i - 1] if correct else 0.0, corrector, scale[i], predictor)
        )
    nodes = UniPCNode(grid.now.time, *map(np.array, zip(*rows, strict=True)))

    def init(x: Array) -> tuple[Array, Array]:
        return x, jnp.zeros((width, *x.shape), x.dtype)

    return grid.sampler(nodes, _step, init)


def _weights(
    at: np.ndarray, i: int, order: int, width: int, corrects: bool
) -> Float64[np.ndarray, " width"]:
    """The weights of the newest evaluations in the step from at[i] to at[i + 1].

    The newest is the one at i, or at i + 1 for the corrector. Evaluations m_k lie at the points
    r_k = (at[k] - at[i])/h besides m at i itself. The mean of x̂_0 over the step, weighted by
    exp(λ), is m + Σ_k ρ_k·(m_k - m)/r_k, where Σ_k ρ_k·r_k^(j-1) is the mean of θ^j, with θ from
    0 to 1 over the step, for j = 1, 2, … A single ρ is ½, which keeps the order.
    """
    h = at[i + 1] - at[i]
    points = np.array([1.0] * corrects + [(at[i - k] - at[i]) / h for k in range(1, order)])
    rho = np.full(len(points), 0.5)
    if len(points) > 1:
        powers = np.arange(len(points))[:, None]
        rho = np.linalg.solve(points**powers, _mean_powers(h, len(points)))
    others = rho / points
    newest_is_i = [1 - np.sum(others), *others]
    in_order = [others[0], newest_is_i[0], *others[1:]] if corrects else newest_is_i
    return np.pad(in_order, (0, width - len(in_order)))


def _mean_powers(h: float, count: int) -> Float64[np.ndarray, " count"]:
    """The mean of θ^j over [0, 1], weighted by exp(h·θ), for j = 1, …, count.

    It is j!·φ_(j+1)(-h)/φ_1(-h) of Zhao et al. 2023, theorem 3.1, whose recursion over j loses all
    its digits at small h.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    theta = (nodes + 1) / 2
    weights *= np.exp(h * theta - max(h, 0))
    return theta ** np.arange(1, count + 1)[:, None] @ weights / weights.sum()


def _step(denoiser, x: Array, node: UniPCNode, carry: tuple[Array, Array], keys):
    start, history = carry
    prediction = denoiser(x, node.time)
    history = jnp.concatenate([prediction.x0[None], history[:-1]])
    weighted = partial(jnp.tensordot, b=history, axes=1, precision="highest")
    x = node.kept * x + node.corrector_x * start + weighted(node.corrector)
    after = node.predictor_x * x + weighted(node.predictor)
    return after, (x, history), prediction
