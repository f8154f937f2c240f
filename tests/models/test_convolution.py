"""The convolution with derivative rules of its own against lax's, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.models.convolution import convolve

PLACES = {
    "same": (3, 1, None),
    "same, every second": (3, 2, None),
    "one side": (2, 1, ((1, 0), (0, 1))),
    "other side": (2, 1, ((0, 1), (1, 0))),
    "both sides, every second": (3, 2, ((1, 1), (1, 1))),
    "none": (3, 1, ((0, 0), (0, 0))),
    "leaving a rest": (2, 3, ((0, 0), (0, 0))),
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=[(4, 6), (5, 7)], ids=["even", "odd"])
def case(request, place):
    """Ours, lax's, and an input, a kernel and a tangent of each."""
    size, stride, padding = PLACES[place]
    rng = np.random.default_rng(0)
    x, dx = rng.standard_normal((2, 2, *request.param, 3))
    kernel, dkernel = rng.standard_normal((2, size, size, 3, 5))
    reference = partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=padding or "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    ours = partial(convolve, stride=stride, padding=padding)
    return (
        ours,
        reference,
        tuple(map(jnp.asarray, (x, kernel))),
        tuple(map(jnp.asarray, (dx, dkernel))),
    )


def assert_same(a, b):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-10), a, b)


@pytest.mark.parametrize("place", PLACES)
class TestConvolution:
    def test_forward_derivative_is_that_of_lax(self, case):
        ours, reference, primals, tangents = case
        assert_same(jax.jvp(ours, primals, tangents), jax.jvp(reference, primals, tangents))

    def test_gradients_are_those_of_lax(self, case):
        ours, reference, primals, _ = case
        y, pull_back = jax.vjp(ours, *primals)
        _, expected = jax.vjp(reference, *primals)
        assert_same(pull_back(jnp.sin(y)), expected(jnp.sin(y)))

    def test_gradients_of_gradients_are_those_of_lax(self, case):
        """Once through each rule's own derivative."""
        ours, reference, (x, kernel), _ = case

        def second(function):
            def inner(x, kernel):
                return jax.grad(lambda *p: jnp.sum(function(*p) ** 3), argnums=(0, 1))(x, kernel)

            def outer(x, kernel):
                return sum(jnp.sum(jnp.sin(g)) for g in inner(x, kernel))

            return jax.grad(outer, argnums=(0, 1))(x, kernel)

        assert_same(second(ours), second(reference))

    def test_many_at_once_are_those_one_by_one(self, case):
        """Kernels, images, and tangents of either, as exact divergences need."""
        ours, reference, (x, kernel), (dx, dkernel) = case
        kernels, images = jnp.stack([kernel, dkernel]), jnp.stack([x, dx])
        assert_same(
            jax.vmap(ours, (None, 0))(x, kernels), jnp.stack([reference(x, k) for k in kernels])
        )
        _, push = jax.linearize(ours, x, kernel)
        _, expected = jax.linearize(reference, x, kernel)
        assert_same(
            jax.vmap(push)(images, kernels),
            jnp.stack([expected(a, k) for a, k in zip(images, kernels, strict=True)]),
        )


def test_no_derivative_leaves_the_usual_order_of_axes():
    """XLA's CPU backend is fast at this order inside loops too."""

    def loss(x, kernel):
        return jnp.sum(convolve(x, kernel, 2) ** 2)

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
        jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    )
    convolutions = [
        line for line in traced.as_text().splitlines() if "stablehlo.convolution" in line
    ]
    assert len(convolutions) == 3
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in convolutions)
