"""The classifier: what its features and logits depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.models.classifier import ResNet
from jax_ddpm.models.network import make_network

TINY = {
    "num_classes": 3,
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "num_groups": 4,
    "dropout": 0.5,
}


def make(told_time=False, **fields):
    """A network on 8×8 images, compiled, and parameters in which no branch is ≈ 0."""
    example = (jnp.zeros((1, 8, 8, 1)), None, jnp.zeros(1))
    network = make_network(ResNet(**TINY | fields), *example[: 3 if told_time else 1])
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda p: p + 0.2 * rng.standard_normal(p.shape).astype("f"),
        network.init(jax.random.key(0)),
    )
    return jax.jit(network.apply), params


@pytest.fixture(scope="module")
def tiny():
    return make()


@pytest.fixture(scope="module")
def inputs():
    x = np.random.default_rng(2).standard_normal((4, 8, 8, 1)).astype("f")
    return x, jax.random.split(jax.random.key(3), 4)


@pytest.mark.parametrize(
    ("multipliers", "shape"), [((1,), (6, 6, 3)), ((1, 2), (8, 4, 1)), ((1, 2, 4), (28, 28, 1))]
)
def test_there_are_as_many_features_as_channels_at_the_last_level(multipliers, shape):
    module = ResNet(**TINY | {"channel_multipliers": multipliers})
    features, logits = jax.eval_shape(
        module.init_with_output, jax.random.key(0), jnp.zeros((5, *shape))
    )[0]
    assert (features.shape, logits.shape) == ((5, 8 * multipliers[-1]), (5, 3))


def test_has_no_parameters_for_an_embedding(tiny):
    """Each level: a convolution at first or down, two norms and two convolutions, a shortcut."""
    _, params = tiny
    assert params.keys() == {
        "conv_in", "down0_0_res", "downsample0", "down1_0_res", "down1_0_attention",
        "norm_out", "logits",
    }  # fmt: skip
    assert params["down0_0_res"].keys() == {"norm1", "conv1", "norm2", "conv2"}
    assert params["down1_0_res"].keys() == {"norm1", "conv1", "norm2", "conv2", "shortcut"}


class TestOfNoisyImages:
    """The classifier is told the time of each image."""

    @pytest.fixture(scope="class")
    @staticmethod
    def noisy():
        return make(told_time=True)

    def test_embeds_the_time_in_every_block(self, noisy, tiny):
        _, params = noisy
        added = {"time1", "time2"}
        assert params.keys() == tiny[1].keys() | added
        for name in ("down0_0_res", "down1_0_res"):
            assert params[name].keys() == tiny[1][name].keys() | {"embedding"}
            assert params[name]["embedding"]["kernel"].shape[0] == 32

    def test_each_image_has_its_own_time(self, noisy, inputs):
        apply, params = noisy
        time = jnp.array([0.0, 10.0, 500.0, 999.0])
        logits = apply(params, inputs[0], time=time)[1]
        other = apply(params, inputs[0], time=time.at[1].set(20.0))[1]
        differs = np.abs(other - logits).max(axis=1) > 1e-4
        np.testing.assert_array_equal(differs, np.arange(4) == 1)

    def test_bfloat16_is_close_to_float32(self, noisy, inputs):
        time = jnp.array([0.0, 10.0, 500.0, 999.0])
        expected = noisy[0](noisy[1], inputs[0], time=time)
        output = make(told_time=True, dtype=jnp.bfloat16)[0](noisy[1], inputs[0], time=time)
        for one, other in zip(output, expected, strict=True):
            assert one.dtype == jnp.float32
            assert np.abs(one - other).max() < 0.05 * np.abs(other).max()


def test_logits_are_affine_in_the_features(tiny, inputs):
    apply, params = tiny
    features, logits = apply(params, inputs[0])
    layer = jax.tree.map(np.asarray, params["logits"])
    expected = np.asarray(features, np.float64) @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_examples_do_not_see_each_other(tiny, inputs):
    """Permuting images and dropout keys permutes the output, and no more."""
    apply, params = tiny
    order = np.array([2, 0, 3, 1])
    permuted = apply(params, *(array[order] for array in inputs))
    for output, one in zip(apply(params, *inputs), permuted, strict=True):
        np.testing.assert_allclose(one, output[order], atol=1e-5)


def test_dropout_needs_keys(tiny, inputs):
    apply, params = tiny
    x, keys = inputs
    without, dropped = apply(params, x)[0], apply(params, x, keys)[0]
    assert np.all(np.abs(dropped - without).max(axis=1) > 1e-4)
    apply, _ = make(dropout=0.0)
    np.testing.assert_allclose(apply(params, x, keys)[0], without, atol=1e-5)


def test_bfloat16_is_close_to_float32(tiny, inputs):
    apply, params = tiny
    expected = apply(params, inputs[0])
    output = make(dtype=jnp.bfloat16)[0](params, inputs[0])
    for one, other in zip(output, expected, strict=True):
        assert one.dtype == jnp.float32
        assert np.any(one != other)
        assert np.abs(one - other).max() < 0.05 * np.abs(other).max()


@pytest.mark.parametrize("policy", ["elementwise", "blocks"])
def test_rematerialisation_changes_nothing(tiny, inputs, policy):
    apply, params = tiny
    remat, same_params = make(remat=policy)
    jax.tree.map(np.testing.assert_array_equal, same_params, params)
    for one, other in zip(remat(params, *inputs), apply(params, *inputs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
