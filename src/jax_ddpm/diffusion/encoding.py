"""Images as noise: the probability-flow ODE run upwards, and down again (Song et al. 2021)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jax_ddpm.diffusion.denoiser import Conditioning, Denoiser
from jax_ddpm.diffusion.process import Process, expand
from jax_ddpm.diffusion.samplers.grid import Grid, along
from jax_ddpm.diffusion.samplers.scan import Sampler, sample

# A method without noise that also runs upwards: DDIM with η = 0, or Heun's.
Solver = Callable[[Grid], Sampler]


def encode(
    solver: Solver,
    process: Process,
    times: Float64[np.ndarray, " n"],
    denoiser: Denoiser,
    images: Float[Array, "batch *shape"],
    conditioning: Conditioning,
) -> Float[Array, "batch *shape"]:
    """The x_t at the last of the rising times, reached by the ODE from α·x_0 at the first.

    α·x_0 lacks only the σ of the first time, the least noise that is sampled.
    """
    x = process.alpha(_scalar(times[0], images)) * images
    return _solve(solver, along(process, times), denoiser, x, conditioning)


def decode(
    solver: Solver,
    process: Process,
    times: Float64[np.ndarray, " n"],
    denoiser: Denoiser,
    noise: Float[Array, "batch *shape"],
    conditioning: Conditioning,
) -> Float[Array, "batch *shape"]:
    """The inverse of ``encode`` through the same rising times, to the solver's accuracy."""
    x = _solve(solver, along(process, times[::-1]), denoiser, noise, conditioning)
    return x / process.alpha(_scalar(times[0], noise))


def _scalar(time: float, x: Array) -> Float[Array, ""]:
    return jnp.asarray(time, x.dtype)


def _solve(solver: Solver, grid: Grid, denoiser: Denoiser, x: Array, given: Conditioning) -> Array:
    unused = jax.random.split(jax.random.key(0), len(x))
    return sample(solver(grid), denoiser, x, unused, given)[0]


def spherical(
    pair: Float[Array, "2 *shape"], weights: Float[Array, " n"]
) -> Float[Array, "n *shape"]:
    """Steps from one noise (w = 0) to another (w = 1) along the sphere, which keeps the length.

    The step is sin((1-w)·θ)/sin θ·x + sin(w·θ)/sin θ·x' with the angle θ between the two (Shoemake
    1985; Song et al. 2021, DDIM, appendix D.5). The two must not be parallel.
    """
    first, second = pair
    cosine = jnp.vdot(first, second) / (jnp.linalg.norm(first) * jnp.linalg.norm(second))
    angle, w = jnp.arccos(cosine), expand(weights, pair)
    return (jnp.sin((1 - w) * angle) * pair[:1] + jnp.sin(w * angle) * pair[1:]) / jnp.sin(angle)
