"""Initialisers that draw on the host.

A network has some fifty parameter shapes, and JAX would compile a random program for each; NumPy
draws at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class HostInitialiser:
    """``draw(rng, shape)`` as NumPy float32, which is also an ordinary Linen initialiser."""

    draw: Callable[[np.random.Generator, Shape], np.ndarray]

    def __call__(self, key: Any, shape: Shape, dtype: Any = np.float32) -> jax.Array:
        return jax.pure_callback(
            lambda data: self.draw(generator(data), shape).astype(dtype),
            jax.ShapeDtypeStruct(shape, dtype),
            jax.random.key_data(key),
        )


def generator(*entropy: Any) -> np.random.Generator:
    """NumPy's generator for a JAX key's data and anything else that names the draw."""
    words = np.concatenate([np.ravel(np.asarray(word, np.uint32)) for word in entropy])
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words.tolist())))


def fan_average_uniform(scale: float = 1.0) -> HostInitialiser:
    """Uniform with variance scale·2/(fan_in + fan_out) (Glorot & Bengio 2010).

    The last two axes are (in, out) features, those before them the receptive field. Scale 0
    becomes 1e-10, as in the code of Ho et al. 2020.
    """

    def draw(rng: np.random.Generator, shape: Shape) -> np.ndarray:
        fan_average = np.prod(shape[:-2]) * (shape[-2] + shape[-1]) / 2
        limit = np.float32(np.sqrt(3 * max(scale, 1e-10) / fan_average))
        values = rng.random(shape, np.float32)
        values -= np.float32(0.5)
        values *= 2 * limit
        return values

    return HostInitialiser(draw)


normal = HostInitialiser(lambda rng, shape: rng.standard_normal(shape, np.float32))
zeros = HostInitialiser(lambda rng, shape: np.zeros(shape, np.float32))
ones = HostInitialiser(lambda rng, shape: np.ones(shape, np.float32))
