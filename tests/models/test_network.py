"""Parameters drawn on the host are those that Linen would have made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.models.initialisers import fan_average_uniform, normal
from jax_ddpm.models.network import make_network
from jax_ddpm.models.unet import UNet


@pytest.fixture(scope="module")
def unet():
    return UNet(
        out_channels=3,
        base_channels=16,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_groups=4,
        num_classes=5,
    )


@pytest.fixture(scope="module")
def network(unet):
    return make_network(unet, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), {})


@pytest.fixture(scope="module")
def params(network):
    return network.init(jax.random.key(0))


def named_leaves(tree, *names):
    """(path, leaf) of all leaves, or of those with one of these names."""
    leaves = [
        (tuple(entry.key for entry in path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return [(path, leaf) for path, leaf in leaves if not names or path[-1] in names]


def test_has_linens_structure(unet, params):
    shapes = jax.eval_shape(
        unet.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), {}
    )["params"]
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    jax.tree.map(lambda p, s: np.testing.assert_equal((p.shape, p.dtype), (s.shape, s.dtype)),
                 params, shapes)  # fmt: skip


def test_kernels_are_uniform_with_fan_average_variance(params):
    """Variance scale·2/(fan_in + fan_out); the layers that end a residual branch start at ≈ 0."""
    for path, kernel in named_leaves(params, "kernel"):
        *receptive_field, fan_in, fan_out = kernel.shape
        scale = 1e-10 if path[-2] in ("conv2", "out", "conv_out") else 1.0
        variance = scale * 2 / (np.prod(receptive_field) * (fan_in + fan_out))
        # A uniform variable's square has relative variance 4/5.
        standard_error = np.sqrt(0.8 / kernel.size)
        assert abs(np.mean(kernel**2) / variance - 1) < 5 * standard_error, path
        assert np.abs(kernel).max() <= np.sqrt(3 * variance) * (1 + 1e-6), path
        assert abs(kernel.mean()) < 5 * np.sqrt(variance / kernel.size), path


def test_biases_start_at_0_and_scales_at_1(params):
    assert all(np.all(bias == 0) for _, bias in named_leaves(params, "bias"))
    assert all(np.all(scale == 1) for _, scale in named_leaves(params, "scale"))


def test_label_embeddings_are_standard_normal(params):
    ((_, table),) = named_leaves(params, "embedding")
    assert abs(table.mean()) < 5 / np.sqrt(table.size)
    assert abs(table.var() - 1) < 5 * np.sqrt(2 / table.size)


def test_same_key_same_parameters(network, params):
    again, other = (network.init(jax.random.key(seed)) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    pairs = zip(named_leaves(params, "kernel"), named_leaves(other, "kernel"), strict=True)
    assert not any(np.any(a == b) for (_, a), (_, b) in pairs)


def test_layers_of_one_shape_differ(params):
    kernels = [(leaf / np.abs(leaf).max()) for _, leaf in named_leaves(params, "kernel")]
    distinct = {kernel.tobytes() for kernel in kernels}
    assert len({kernel.shape for kernel in kernels}) < len(kernels) == len(distinct)


@pytest.mark.parametrize("initialiser", [normal, fan_average_uniform()])
def test_initialisers_also_serve_linen(initialiser):
    """They are pure functions of a key like any initialiser, under jit too."""
    key, shape = jax.random.key(0), (3, 3, 4, 8)
    plain = initialiser(key, shape)
    compiled = jax.jit(lambda key: initialiser(key, shape))(key)
    np.testing.assert_array_equal(plain, compiled)
    assert not np.any(plain == initialiser(jax.random.key(1), shape))
