"""One network, one noise and every x of a run: what the samplers of two libraries agree on."""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.diffusion.denoiser import NetworkDenoiser
from jax_ddpm.diffusion.parameterisation import Parameterisation
from jax_ddpm.diffusion.process import expand, fold_in, per_example_normal
from jax_ddpm.diffusion.samplers.scan import sample

torch = pytest.importorskip("torch")

SHAPE = (3, 4)  # examples × channels: channels are the last axis here and the second in PyTorch


def network(x, time):
    """A smooth function of x and t with values beyond ±1, of NumPy and of JAX arrays."""
    xp = x.__array_namespace__()
    return xp.sin(1.5 * x + 0.01 * time) + 0.3 * xp.cos(x - 0.02 * time)


def network_with_variance(x, time):
    """Twice the channels: the second half is the variance's."""
    xp = x.__array_namespace__()
    return xp.concatenate([network(x, time), network(x, time + 50)], axis=1)


def model(process, target, network=network, **meaning):
    """The network as a denoiser of ``process``."""

    def apply(params, x, time, conditioning):
        return network(x, expand(time, x))

    return NetworkDenoiser((), apply, Parameterisation(process, target, **meaning))


def standard_normal():
    return np.random.default_rng(0).standard_normal(SHAPE)


def keys():
    return jax.random.split(jax.random.key(0), SHAPE[0])


def noise_of_rows(*rows):
    """The noise that ``sample`` draws in these rows of a sampler's nodes."""
    x = jnp.zeros(SHAPE)
    return [np.array(per_example_normal(fold_in(keys(), row), x)) for row in rows]


def trajectory(sampler, denoiser, x):
    """x after every evaluation and the x_0 that it predicted, each ``[rows, *x.shape]``."""
    x, rows = jnp.asarray(x), sampler.num_evaluations
    return sample(sampler, denoiser, x, keys()[: len(x)], {}, rows)[1]


@contextlib.contextmanager
def double_precision():
    """Both libraries ask for float32 by its name or as PyTorch's default: here that is float64.

    Only round-off then separates their tables and states from ours. JAX must not be called.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(torch, "float32", torch.float64),
            mock.patch.object(np, "float32", np.float64),
        ):
            yield
    finally:
        torch.set_default_dtype(default)


def difference(actual, expected):
    """The largest difference, in each step relative to the largest value there."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    axes = tuple(range(1, actual.ndim))
    return np.max(np.abs(actual - expected).max(axes) / np.abs(expected).max(axes))
