"""Every layer against its definition in plain NumPy float64."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jax_ddpm.models import layers


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def group_norm(x, num_groups, scale, bias, epsilon=1e-6):
    pixels = x.shape[1] * x.shape[2]
    groups = np.reshape(x.astype(np.float64), (len(x), pixels, num_groups, -1))
    mean, var = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    return ((groups - mean) / np.sqrt(var + epsilon)).reshape(x.shape) * scale + bias


class TestGroupNorm:
    @pytest.mark.parametrize("num_groups", [1, 4, 8])
    def test_is_its_definition(self, rng, num_groups):
        x = rng.normal(2.0, 3.0, (2, 4, 6, 8)).astype(np.float32)
        scale, bias = rng.standard_normal((2, 8)).astype(np.float32)
        params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
        y = layers.GroupNorm(num_groups).apply({"params": params}, jnp.asarray(x))
        np.testing.assert_allclose(y, group_norm(x, num_groups, scale, bias), atol=1e-5)

    def test_epsilon_is_inside_the_root(self, rng):
        """A variance as small as ε shows it."""
        x = 1e-3 * rng.standard_normal((1, 4, 4, 8)).astype(np.float32)
        y, _ = layers.GroupNorm(2).init_with_output(jax.random.key(0), jnp.asarray(x))
        np.testing.assert_allclose(y, group_norm(x, 2, 1, 0), atol=1e-5)

    def test_gradients_are_those_of_linen(self, rng):
        x, cotangent = jnp.asarray(rng.normal(1, 2, (2, 2, 4, 6, 8)), jnp.float32)
        params = jax.tree.map(
            jnp.asarray, dict(zip(("scale", "bias"), rng.standard_normal((2, 8)), strict=True))
        )

        def gradients(module):
            def loss(params, x):
                return jnp.sum(cotangent * module.apply({"params": params}, x))

            return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

        ours = gradients(layers.GroupNorm(4))
        linen = gradients(nn.GroupNorm(num_groups=4, epsilon=1e-6))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, linen)

    def test_statistics_of_bfloat16_are_float32(self, rng):
        """Moments summed in bfloat16 would be off by whole units here."""
        x = jnp.asarray(rng.normal(100, 8, (2, 16, 16, 8)), jnp.bfloat16)
        y, _ = layers.GroupNorm(4, jnp.bfloat16).init_with_output(jax.random.key(0), x)
        assert y.dtype == jnp.bfloat16
        expected = group_norm(np.asarray(x, np.float64), 4, 1, 0)
        np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=2e-3)


@pytest.mark.parametrize("sharpness", [1, 100], ids=["broad", "sharp"])
def test_attention_is_its_definition(rng, sharpness):
    """It is even where exp(logits) is beyond float32."""
    batch, height, width, channels = shape = (2, 3, 5, 8)
    x = rng.standard_normal(shape).astype(np.float32)
    module = layers.AttentionBlock(num_groups=4, dtype=jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(x))["params"]
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype("f"), shapes)
    params["query"] = jax.tree.map(lambda leaf: sharpness * leaf, params["query"])

    def dense(name, h):
        return h @ params[name]["kernel"].astype(np.float64) + params[name]["bias"]

    h = group_norm(x, 4, **params["norm"]).reshape(batch, height * width, channels)
    query, key, value = (dense(name, h) for name in ("query", "key", "value"))
    logits = np.einsum("bqc,bkc->bqk", query, key) / np.sqrt(channels)
    assert (logits.max() > np.log(np.finfo(np.float32).max)) == (sharpness > 1)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = x + dense("out", np.einsum("bqk,bkc->bqc", weights, value)).reshape(shape)

    y = module.apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(x))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_attention_has_the_derivatives_of_its_values(rng):
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, 3, 5, 8)))
        module = layers.AttentionBlock(num_groups=4, dtype=jnp.float64)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), shapes)
        apply = jax.jit(partial(module.apply, {"params": params}))
        check_grads(apply, (x,), order=1, modes=("fwd", "rev"))


def test_a_dense_layer_acts_on_each_pixel(rng):
    x = jnp.asarray(rng.standard_normal((2, 3, 4, 5)), jnp.float32)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.dense(6, jnp.float32, "dense")(x)

    y, variables = Layer().init_with_output(jax.random.key(0), x)
    expected = np.einsum("bhwc,cf->bhwf", x, variables["params"]["dense"]["kernel"])
    np.testing.assert_allclose(y, expected, atol=1e-5)


class TestSinusoidalEmbedding:
    @pytest.mark.parametrize("features", [4, 128])
    def test_is_its_definition(self, features):
        """Sines then cosines, frequencies from 1 to 1/10000 with both ends included."""
        time = np.array([0.0, 0.5, 1.0, 17.0, 999.0])
        frequencies = np.geomspace(1, 1e-4, features // 2)
        angles = np.outer(time, frequencies)
        expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        embedding = layers.sinusoidal_embedding(jnp.asarray(time, jnp.float32), features)
        np.testing.assert_allclose(embedding, expected, atol=3e-4)

    def test_neighbouring_steps_differ(self):
        embedding = layers.sinusoidal_embedding(jnp.arange(1000.0), 128)
        distance = np.linalg.norm(np.diff(embedding, axis=0), axis=1)
        assert distance.min() > 0.5


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 4)])
def test_upsampling_is_a_convolution_of_each_pixel_repeated(rng, height, width):
    """Gradients agree too, though it is computed at the small size, and so do the edges."""
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, height, width, 3)))
        params = {"kernel": rng.standard_normal((3, 3, 3, 5)), "bias": rng.standard_normal(5)}
        params = jax.tree.map(jnp.asarray, params)
        cotangent = jnp.asarray(rng.standard_normal((2, 2 * height, 2 * width, 5)))

        def repeated(variables, x):
            large = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            return nn.Conv(5, (3, 3)).apply(variables, large)

        def value_and_gradients(function):
            y, pull_back = jax.vjp(function, {"params": params}, x)
            return y, pull_back(cotangent)

        ours = value_and_gradients(layers.UpsampleConv(5, jnp.float64).apply)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
            ours,
            value_and_gradients(repeated),
        )


@pytest.mark.parametrize(("stride", "pad"), [(1, (1, 1)), (2, (0, 1))])
def test_convolution_is_its_definition(rng, stride, pad):
    """Down-sampling pads below and to the right only, as Ho et al.'s code does."""
    x = rng.standard_normal((2, 4, 6, 3)).astype(np.float32)
    kernel, bias = rng.standard_normal((3, 3, 3, 5)), rng.standard_normal(5)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), {"kernel": kernel, "bias": bias})
    y = layers.conv(5, jnp.float32, "conv", stride=stride).apply({"params": params}, jnp.asarray(x))

    padded = np.pad(x, ((0, 0), pad, pad, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    expected = np.einsum("bhwcij,ijcf->bhwf", windows[:, ::stride, ::stride], kernel) + bias
    assert y.shape == (2, 4 // stride, 6 // stride, 5)
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("params", [{"kernel": jnp.zeros((4, 1)), "bias": jnp.zeros(1)}, {}])
def test_parameters_of_another_network_are_refused(params):
    """They are not broadcast where that happens to be possible."""
    layer = layers.dense(5, jnp.float32, "dense")
    with pytest.raises(ValueError, match=r"kernel should have shape \(4, 5\)"):
        layer.apply({"params": params}, jnp.zeros((2, 4)))


class TestDropout:
    rate = 0.3

    def drop(self, x, keys):
        return jax.jit(partial(layers.Dropout(self.rate).apply, {}))(x, keys)

    @pytest.mark.parametrize("shape", [(4, 4, 2), (3, 5, 1)])
    def test_depends_on_each_examples_key_alone(self, rng, shape):
        x = jnp.asarray(rng.standard_normal((6, *shape)), jnp.float32)
        keys = jax.random.split(jax.random.key(0), 6)
        whole = self.drop(x, keys)
        parts = [self.drop(x[i], keys[i]) for i in (slice(0, 3), slice(3, 6))]
        np.testing.assert_array_equal(whole, np.concatenate(parts))

    def test_keeps_the_expectation(self):
        """Kept values grow by 1/(1 - rate), and a share 1 - rate is kept."""
        y = np.asarray(
            self.drop(jnp.ones((4, 100, 100, 1)), jax.random.split(jax.random.key(0), 4))
        )
        np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - self.rate)], rtol=1e-6)
        standard_error = np.sqrt(self.rate / (1 - self.rate) / y.size)
        assert abs(y.mean() - 1) < 5 * standard_error

    @pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
    def test_drops_the_share_asked_for(self, rate):
        """It does to a few parts in 10⁵, though few bits decide: under 16 would show at 0.999."""
        size = 2**20
        x = jnp.ones((1, size))
        dropped = np.mean(
            layers.Dropout(rate).apply({}, x, jax.random.split(jax.random.key(1), 1)) == 0
        )
        standard_error = np.sqrt(rate * (1 - rate) / size)
        assert abs(dropped - rate) < 5 * standard_error + 2**-16

    def test_layers_and_examples_differ(self):
        class Two(nn.Module):
            @nn.compact
            def __call__(self, x, keys):
                return [layers.Dropout(0.5)(x, keys) for _ in range(2)]

        first, second = Two().apply(
            {}, jnp.ones((2, 8, 8, 1)), jax.random.split(jax.random.key(0), 2)
        )
        masks = np.array([*first, *second])
        assert len(np.unique(masks, axis=0)) == 4

    def test_without_keys_or_rate_is_the_identity(self, rng):
        x = jnp.asarray(rng.standard_normal((2, 4, 4, 2)), jnp.float32)
        keys = jax.random.split(jax.random.key(0), 2)
        assert layers.Dropout(self.rate).apply({}, x, None) is x
        assert layers.Dropout(0.0).apply({}, x, keys) is x


@pytest.mark.parametrize("features", [8, 16])
def test_residual_block_starts_as_its_shortcut(rng, features):
    x = jnp.asarray(rng.standard_normal((2, 4, 4, 8)), jnp.float32)
    embedding = jnp.asarray(rng.standard_normal((2, 12)), jnp.float32)
    block = layers.ResBlock(features, num_groups=4, dropout=0.0, dtype=jnp.float32)
    y, variables = jax.jit(block.init_with_output)(jax.random.key(0), x, embedding, None)
    shortcut = x if features == 8 else x @ variables["params"]["shortcut"]["kernel"]
    np.testing.assert_allclose(y, shortcut, atol=1e-3)
