"""Editing images with a sampler: keeping a known part, repeating steps, starting from an image."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64

from jax_ddpm.diffusion.process import corrupt, fold_in, per_example_normal
from jax_ddpm.diffusion.samplers.grid import Grid, Levels, levels
from jax_ddpm.diffusion.samplers.scan import Sampler

# Draws of a step beside the sampler's own, which uses the step's keys unchanged.
_KNOWN_DRAW, _CLIMB_DRAW = 1, 2

# x → P·x for a batch of images; P is an orthogonal projection: P² = P = Pᵀ.
Projection = Callable[[Array], Array]


def inpainting(kept: Bool[Array | np.ndarray, "h w"]) -> Projection:
    """The kept pixels, and 0 elsewhere."""

    def project(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        return jnp.where(kept[None, :, :, None], x, 0)

    return project


def colourisation(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
    """The gray image: each pixel's mean over its channels, in all channels."""
    return jnp.broadcast_to(jnp.mean(x, axis=-1, keepdims=True), x.shape)


def super_resolution(factor: int) -> Projection:
    """The image at a lower resolution: each factor × factor block filled with its mean."""

    def project(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        batch, height, width, channels = x.shape
        split = (batch, height // factor, factor, width // factor, factor, channels)
        mean = jnp.mean(x.reshape(split), axis=(2, 4), keepdims=True)
        return jnp.broadcast_to(mean, split).reshape(x.shape)

    return project


class ProjectedNode(NamedTuple):
    """A row of the inner sampler, with the levels α and σ at which it leaves x."""

    time: Float64[np.ndarray, " rows"]
    inside: Any
    alpha: Float64[np.ndarray, " rows"]
    sigma: Float64[np.ndarray, " rows"]


def projected(
    sampler: Sampler, grid: Grid, project: Projection, known: Float[Array, "batch h w c"]
) -> Sampler:
    """Samples images whose part P·x_0 is that of ``known``, by projecting after every evaluation:

        x_s ← x_s - P·x_s + P·y_s,   y_s = α_s·known + σ_s·z ~ q(x_s | known)

    (Song et al. 2021, "Score-based generative modeling", appendix I; Choi et al. 2021, ILVR;
    Lugmayr et al. 2022, RePaint, eq. 8). The known part is exact at the clean end. The rest only
    approximates its conditional distribution, because each y_s is drawn without regard to it: see
    ``resampled``.

    Raises:
      ValueError: where the sampler evaluates between the times of this grid, as churn does.
    """
    _require_times_of(grid, sampler)
    now = levels(grid.process, sampler.nodes.time)
    after = Levels(*(np.append(a[1:], b[-1]) for a, b in zip(now, grid.after, strict=True)))

    def step(denoiser, x: Array, node: ProjectedNode, carry: Any, keys: Any):
        x, carry, prediction = sampler.step(denoiser, x, node.inside, carry, keys)
        noise = per_example_normal(fold_in(keys, _KNOWN_DRAW), x)
        y = node.alpha * known + node.sigma * noise
        return x - project(x) + project(y), carry, prediction

    nodes = ProjectedNode(now.time, sampler.nodes, after.alpha, after.sigma)
    return sampler._replace(nodes=nodes, step=step)


class ResampledNode(NamedTuple):
    """A row of the inner sampler, then x_t = factor·x_s + std·z; 1 and 0 where nothing climbs."""

    time: Float64[np.ndarray, " rows"]
    inside: Any
    factor: Float64[np.ndarray, " rows"]
    std: Float64[np.ndarray, " rows"]


def resampled(sampler: Sampler, grid: Grid, jump_length: int, resamplings: int) -> Sampler:
    """Runs every stretch of ``jump_length`` steps ``resamplings`` times (Lugmayr et al. 2022).

    Noise by q(x_t | x_s) = N(α_t/α_s·x_s, σ_t² - (α_t/α_s)²·σ_s²) takes the stretch's end x_s back
    to its start, so that new content comes to agree with the known part of a ``projected`` sampler.
    The step to clean data is taken once, as in the paper's algorithm 1 and its jump schedule.
    Stretches are counted from there, and a remainder at the noisy end is taken once, too.

    Raises:
      ValueError: where jump_length is not from 1 to one less than the steps of the grid,
        resamplings is below 1, or the sampler has a history, which a jump back would invalidate.
    """
    _require_times_of(grid, sampler)
    if jax.tree.leaves(sampler.init(jnp.zeros(1))):
        raise ValueError("only a sampler without history can be resampled, not a multistep one")
    if not 1 <= jump_length < grid.num_steps:
        raise ValueError(f"jump_length is {jump_length}; it must be 1 to {grid.num_steps - 1}")
    if resamplings < 1:
        raise ValueError(f"resamplings is {resamplings}; it must be 1 or more")
    time, last = sampler.nodes.time, grid.num_steps - 1
    first_rows = np.flatnonzero(np.diff(time, prepend=np.inf))  # the first row of each step
    stretches = np.split(np.arange(len(time)), first_rows[last % jump_length :: jump_length])
    order = np.concatenate(
        [stretches[0], *(np.tile(rows, resamplings) for rows in stretches[1:-1]), stretches[-1]]
    )
    # The climb from where a row leaves x to where the next one takes it, mostly of length 0.
    left, taken = levels(grid.process, time[order[:-1] + 1]), levels(grid.process, time[order[1:]])
    climb = Grid(grid.process, now=taken, after=left)

    def step(denoiser, x: Array, node: ResampledNode, carry: Any, keys: Any):
        x, carry, prediction = sampler.step(denoiser, x, node.inside, carry, keys)
        noise = per_example_normal(fold_in(keys, _CLIMB_DRAW), x)
        return node.factor * x + node.std * noise, carry, prediction

    nodes = ResampledNode(
        time=time[order],
        inside=jax.tree.map(lambda column: column[order], sampler.nodes),
        factor=np.append(taken.alpha / left.alpha, 1.0),
        std=np.append(np.sqrt(climb.beta), 0.0),
    )
    return sampler._replace(nodes=nodes, step=step)


def _require_times_of(grid: Grid, sampler: Sampler) -> None:
    if not np.all(np.isin(sampler.nodes.time, grid.now.time)):
        raise ValueError("the sampler must evaluate at the times of the grid: churn must be 0")


def last_steps(grid: Grid, num_steps: int) -> Grid:
    """The grid's last steps, on which SDEdit samples (Meng et al. 2022).

    Raises:
      ValueError: where the grid has fewer.
    """
    if not 1 <= num_steps <= grid.num_steps:
        raise ValueError(f"{num_steps} last steps of {grid.num_steps}: take 1 to {grid.num_steps}")
    now, after = (Levels(*(a[-num_steps:] for a in part)) for part in (grid.now, grid.after))
    return grid._replace(now=now, after=after)


def perturbed(
    grid: Grid, images: Float[Array, "batch *shape"], keys: Any
) -> Float[Array, "batch *shape"]:
    """Images with the noise of the grid's start, x_t ~ q(x_t | x_0): the start of SDEdit.

    Fewer steps keep more of the images; what is lost is drawn again.
    """
    t = jnp.asarray(grid.now.time[0], images.dtype)
    return corrupt(grid.process, keys, images, t)[0]
