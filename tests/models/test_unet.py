"""The U-Net of the paper: its size, its start, and what its output may depend on."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.models.network import make_network
from jax_ddpm.models.unet import UNet


def shapes_of(unet, height, width, channels, batch=1):
    """Output and parameters of the network, traced but not run."""
    x, time = jnp.zeros((batch, height, width, channels)), jnp.zeros(batch)
    output, variables = jax.eval_shape(unet.init_with_output, jax.random.key(0), x, time, {})
    return output, variables["params"]


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("unet", "size", "expected"),
    [
        (UNet(3), 32, 35_746_307),
        (UNet(3, 128, (1, 1, 2, 2, 4, 4)), 256, 113_673_219),
    ],
    ids=["cifar10", "256"],
)
def test_has_the_papers_number_of_parameters(unet, size, expected):
    """Both confirmed with an independent implementation of the paper."""
    _, params = shapes_of(unet, size, size, 3)
    assert count(params) == expected


def test_classes_cost_one_embedding_each_and_one_for_null():
    _, without = shapes_of(UNet(1, 8, (1,), 1, (), 4), 8, 8, 1)
    _, with_classes = shapes_of(UNet(1, 8, (1,), 1, (), 4, num_classes=10), 8, 8, 1)
    assert count(with_classes) - count(without) == 11 * 4 * 8


@pytest.mark.parametrize(
    ("shape", "multipliers"), [((6, 6, 1), (1,)), ((8, 16, 3), (1, 2)), ((12, 4, 1), (2, 1, 3))]
)
def test_output_is_as_large_as_the_image(shape, multipliers):
    unet = UNet(2 * shape[-1], 8, multipliers, num_res_blocks=1, num_groups=4)
    output, params = shapes_of(unet, *shape, batch=5)
    assert output.shape == (5, *shape[:2], 2 * shape[-1])
    assert output.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_attention_is_where_asked_and_in_the_middle():
    def blocks(resolutions):
        _, params = shapes_of(UNet(1, 8, (1, 2), 1, resolutions, 4), 8, 16, 1)
        return {name for name in params if "attention" in name}

    assert blocks(()) == {"middle_attention"}
    assert blocks((8,)) - blocks(()) == {"down0_0_attention", "up0_0_attention", "up0_1_attention"}
    assert blocks((4,)) - blocks(()) == {"down1_0_attention", "up1_0_attention", "up1_1_attention"}


NUM_CLASSES = 3
TINY = {
    "out_channels": 1,
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "num_groups": 4,
    "dropout": 0.5,
    "num_classes": NUM_CLASSES,
}


ONE_LEVEL = TINY | {"channel_multipliers": (1,), "attention_resolutions": ()}


def make(**fields):
    """A U-Net on 8×8 images, compiled, and its parameters at the start."""
    network = make_network(UNet(**fields), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), {})
    return jax.jit(network.apply), network.init(jax.random.key(0))


def trained(params):
    """Parameters as after some training: no branch is ≈ 0 any more."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: p + 0.2 * rng.standard_normal(p.shape).astype("f"), params)


@pytest.fixture(scope="module")
def tiny():
    return make(**TINY)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(2)
    return {
        "x": rng.standard_normal((4, 8, 8, 1)).astype("f"),
        "time": np.array([0, 3, 400, 999], "f"),
        "conditioning": {
            "label": np.array([0, 1, 2, 0], np.int32),
            "label_drop": np.array([False, False, False, True]),
        },
        "dropout_keys": jax.random.split(jax.random.key(3), 4),
    }


class TestSelfConditioning:
    """x comes with an earlier estimate of the clean image."""

    def test_costs_the_first_convolution_twice_its_channels(self):
        _, without = shapes_of(UNet(3, 8, (1,), 1, (), 4), 8, 8, 3)
        _, with_estimate = shapes_of(UNet(3, 8, (1,), 1, (), 4, self_condition=True), 8, 8, 3)
        assert count(with_estimate) - count(without) == 3 * 3 * 3 * 8

    @pytest.fixture(scope="class")
    @staticmethod
    def network():
        apply, params = make(**ONE_LEVEL, self_condition=True)
        return apply, trained(params)

    def test_without_an_estimate_is_that_of_0(self, network, inputs):
        apply, params = network
        x, time, given = inputs["x"], inputs["time"], inputs["conditioning"]
        zero = apply(params, x, time, given | {"x0_estimate": np.zeros_like(x)})
        np.testing.assert_array_equal(apply(params, x, time, given), zero)

    def test_depends_on_each_examples_own_estimate(self, network, inputs):
        apply, params = network
        x, time, given = inputs["x"], inputs["time"], inputs["conditioning"]
        estimate = np.zeros_like(x)
        estimate[[0, 2]] = 0.5
        changed = apply(params, x, time, given | {"x0_estimate": estimate})
        difference = np.abs(changed - apply(params, x, time, given)).max(axis=(1, 2, 3))
        assert (difference > 1e-4).tolist() == [True, False, True, False]


def test_output_starts_near_0(tiny, inputs):
    apply, params = tiny
    assert np.abs(apply(params, **inputs)).max() < 1e-3


def test_examples_do_not_see_each_other(tiny, inputs):
    """Permuting images, times, labels and dropout keys permutes the output, and no more."""
    apply, params = tiny[0], trained(tiny[1])
    order = np.array([2, 0, 3, 1])
    output = apply(params, **inputs)
    permuted = apply(params, **jax.tree.map(lambda leaf: leaf[order], inputs))
    np.testing.assert_allclose(permuted, output[order], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("time", np.array([0, 3, 401, 999], "f"), [False, False, True, False]),
        ("dropout_keys", jax.random.split(jax.random.key(4), 4), [True] * 4),
        # The label of the last example is dropped, so there it does not matter.
        ("label", np.array([0, 1, 0, 1], np.int32), [False, False, True, False]),
        ("label_drop", np.array([False, False, True, True]), [False, False, True, False]),
    ],
    ids=["time", "dropout_keys", "label", "label_drop"],
)
def test_each_input_matters_to_its_example_alone(tiny, inputs, name, value, expected):
    apply, params, conditioning = tiny[0], trained(tiny[1]), inputs["conditioning"]
    if name in conditioning:
        name, value = "conditioning", conditioning | {name: value}
    difference = np.abs(apply(params, **inputs) - apply(params, **inputs | {name: value}))
    assert (difference.max(axis=(1, 2, 3)) > 1e-4).tolist() == expected


def test_unconditional_is_the_null_label(inputs):
    """No label at all, every label dropped, and the null label itself are the same."""
    apply, params = make(**ONE_LEVEL)
    label = inputs["conditioning"]["label"]
    all_of_it, none_of_it = np.ones(4, bool), np.zeros(4, bool)

    def output(**conditioning):
        return apply(trained(params), inputs["x"], inputs["time"], conditioning)

    unconditional = output()
    dropped = output(label=label, label_drop=all_of_it)
    null = output(label=np.full_like(label, NUM_CLASSES), label_drop=none_of_it)
    np.testing.assert_allclose(dropped, unconditional, atol=1e-5)
    np.testing.assert_allclose(null, unconditional, atol=1e-5)


def test_bfloat16_is_close_to_float32(inputs):
    inputs = inputs | {"dropout_keys": None}
    expected, output = (
        apply(trained(params), **inputs)
        for apply, params in (make(**ONE_LEVEL), make(**ONE_LEVEL, dtype=jnp.bfloat16))
    )
    assert output.dtype == jnp.float32
    assert np.any(output != expected)
    assert np.abs(output - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("policy", ["elementwise", "blocks"])
def test_rematerialisation_changes_neither_parameters_nor_outputs(inputs, policy):
    """The same units drop out, as follows from the layers' names."""
    (apply, params), (remat, remat_params) = (make(**ONE_LEVEL, remat=r) for r in ("", policy))
    jax.tree.map(np.testing.assert_array_equal, remat_params, params)
    params = trained(params)
    np.testing.assert_allclose(remat(params, **inputs), apply(params, **inputs), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "products_again"), [("elementwise", False), ("blocks", True)])
def test_rematerialisation_recomputes_the_same_gradients(inputs, policy, products_again):
    """Convolutions and matrix products are computed again only under "blocks"."""

    def gradients(remat):
        apply, params = make(**ONE_LEVEL, remat=remat)

        def loss(params, inputs):
            return jnp.mean(apply(params, **inputs) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(trained(params), inputs).compile()
        products = len(re.findall(r" (convolution|dot)\(", compiled.as_text()))
        return products, compiled.cost_analysis()["flops"], compiled(trained(params), inputs)

    (products, work, plain), (remat_products, remat_work, remat) = gradients(""), gradients(policy)
    assert products > 0
    assert remat_work > work
    assert (remat_products > products) == products_again
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), remat, plain)
