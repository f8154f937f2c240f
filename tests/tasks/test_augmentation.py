"""Flips and shifts against what they should be done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.tasks import augmentation

SIZE, HEIGHT, WIDTH = 200, 5, 7


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(0), SIZE)


@pytest.fixture(scope="module")
def images():
    """No two pixels alike, and none of them black."""
    values = np.linspace(1, 2, SIZE * HEIGHT * WIDTH, dtype=np.float32)
    return jnp.asarray(values.reshape(SIZE, HEIGHT, WIDTH, 1))


def moved(image, down, across):
    """The images moved by loops over pixels; uncovered pixels are black."""
    result = np.zeros_like(image)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            if 0 <= row - down < HEIGHT and 0 <= column - across < WIDTH:
                result[row, column] = image[row - down, column - across]
    return result


def assert_uniform(counts):
    """No count of SIZE independent draws is more than five standard deviations off."""
    share = 1 / len(counts)
    deviation = np.sqrt(SIZE * share * (1 - share))
    assert np.all(np.abs(np.array([*counts.values()]) - SIZE * share) < 5 * deviation)


def test_flips_half_of_the_images(keys, images):
    before, after = np.asarray(images), np.asarray(jax.jit(augmentation.flip)(keys, images))
    counts = {"as they were": 0, "mirrored": 0}
    for old, new in zip(before, after, strict=True):
        flipped = np.any(new != old)
        np.testing.assert_array_equal(new, old[:, ::-1] if flipped else old)
        counts["mirrored" if flipped else "as they were"] += 1
    assert_uniform(counts)


@pytest.mark.parametrize("most", [1, 2])
def test_shifts_by_each_number_of_pixels_alike(keys, images, most):
    shift = jax.jit(augmentation.shift, static_argnums=2)
    before, after = np.asarray(images), np.asarray(shift(keys, images, most))
    reach = range(-most, most + 1)
    counts = {(down, across): 0 for down in reach for across in reach}
    for old, new in zip(before, after, strict=True):
        (found,) = (by for by in counts if np.array_equal(moved(old, *by), new))
        counts[found] += 1
    assert_uniform(counts)


@pytest.mark.parametrize("change", [augmentation.flip, lambda k, x: augmentation.shift(k, x, 1)])
def test_depend_on_each_examples_key_alone(keys, images, change):
    order = np.arange(SIZE)[::-1]
    expected = np.asarray(change(keys, images))[order]
    np.testing.assert_array_equal(change(keys[order], images[order]), expected)
