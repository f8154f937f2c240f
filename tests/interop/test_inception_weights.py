"""FID's network against pytorch-fid's, and its parts against their definitions."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from jax_ddpm.errors import UserError
from jax_ddpm.interop.inception_weights import inception_parameters
from jax_ddpm.interop.weights import fold_batch_norm
from jax_ddpm.models.inception import InceptionV3, average_pool, max_pool, resize_bilinear

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def shapes():
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), images)["params"]


@pytest.fixture
def state_dict():
    """Arrays with the names and shapes of pytorch-fid's file."""
    arrays = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for (*path, layer, array), leaf in flatten_dict(shapes()).items():
        name = ".".join([*path, layer])
        if array == "kernel" and layer != "fc":
            height, width, inputs, outputs = (1, 1, *leaf.shape)[-4:]
            arrays[f"{name}.conv.weight"] = (outputs, inputs, height, width)
            arrays |= {f"{name}.bn.{norm}": (outputs,) for norm in BATCH_NORM}
            arrays[f"{name}.bn.num_batches_tracked"] = ()
    return {name: np.ones(shape, np.float32) for name, shape in arrays.items()}


@pytest.mark.parametrize(("channels", "dtype"), [(1, jnp.uint8), (3, jnp.float32)])
def test_takes_images_of_any_size(channels, dtype):
    images = jax.ShapeDtypeStruct((2, 8, 400, channels), dtype)
    features, logits = jax.eval_shape(InceptionV3().apply, {"params": shapes()}, images)
    assert features == jax.ShapeDtypeStruct((2, 2048), jnp.float32)
    assert logits == jax.ShapeDtypeStruct((2, 1008), jnp.float32)


class TestParameters:
    def test_are_as_many_as_published(self, state_dict):
        """94 convolutions with 21,751,136 weights in torchvision's Inception3."""
        convolutions = [a.size for name, a in state_dict.items() if name.endswith("conv.weight")]
        assert len(convolutions) == 94
        assert sum(convolutions) == 21_751_136

    def test_have_the_shapes_of_the_network(self, state_dict):
        params = inception_parameters(state_dict | {"AuxLogits.fc.bias": np.zeros(1008)})
        assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes())
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}

    @pytest.mark.parametrize(
        ("name", "array", "reason"),
        [
            ("Mixed_6b.branch7x7_2.conv.weight", None, r"absent .* \[128, 128, 1, 7\]"),
            ("Mixed_5b.branch1x1.bn.running_var", np.zeros(63), r"\[63\] .* \[64\]"),
            ("fc.weight", np.zeros((1000, 2048)), r"\[1000, 2048\] .* \[1008, 2048\]"),
            ("Mixed_8a.conv.weight", np.zeros(2), r"\[2\] .* absent"),
        ],
    )
    def test_of_another_architecture_are_refused(self, state_dict, name, array, reason):
        if array is None:
            del state_dict[name]
        else:
            state_dict[name] = array
        with pytest.raises(UserError, match=f"another architecture: {name} is {reason}") as caught:
            inception_parameters(state_dict)
        assert "\n" not in str(caught.value)


def test_folding_keeps_the_function(rng):
    """It is kept in double precision up to the float32 result, even at variances below ε."""
    weight = rng.standard_normal((5, 3, 1, 1))
    scale, offset, mean = rng.standard_normal((3, 5))
    variance = np.array([1e-9, 1e-3, 0.1, 1.0, 50.0])
    pixels = rng.standard_normal((20, 3))
    convolved = pixels @ weight[:, :, 0, 0].T
    expected = scale * (convolved - mean) / np.sqrt(variance + 1e-3) + offset

    layer = fold_batch_norm(weight, scale, offset, mean, variance, 1e-3)
    assert layer["kernel"].shape == (1, 1, 3, 5)
    folded = pixels @ layer["kernel"][0, 0].astype(np.float64) + layer["bias"]
    np.testing.assert_allclose(folded, expected, rtol=1e-5, atol=1e-5)


def windows(x, fill):
    """The 3×3 window around each pixel, in NumPy."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))


class TestPooling:
    @pytest.fixture
    def x(self, rng):
        return rng.normal(-5.0, 1.0, (2, 7, 9, 3)).astype(np.float32)

    def test_averages_leave_the_padding_out(self, x):
        expected = np.nanmean(windows(x, np.nan), axis=(-2, -1))
        np.testing.assert_allclose(average_pool(jnp.asarray(x)), expected, rtol=1e-6)

    def test_maxima_leave_the_padding_out(self, x):
        expected = windows(x, -np.inf).max(axis=(-2, -1))
        np.testing.assert_array_equal(max_pool(jnp.asarray(x)), expected)

    def test_maxima_with_stride(self, x):
        expected = windows(x, -np.inf).max(axis=(-2, -1))[:, 1:-1:2, 1:-1:2]
        np.testing.assert_array_equal(max_pool(jnp.asarray(x), stride=2), expected)


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (3, 29), (29, 29), (50, 31), (200, 60)])
def test_resizing_interpolates_neighbours(rng, shape):
    """It does where the image shrinks too: no average takes more than two pixels of an axis."""
    x = rng.uniform(0, 255, (2, *shape, 3)).astype(np.float32)

    def along(x, axis):
        length = x.shape[axis]
        position = np.clip((np.arange(29) + 0.5) * length / 29 - 0.5, 0, length - 1)
        low = np.floor(position).astype(int)
        high = np.minimum(low + 1, length - 1)
        fraction = np.expand_dims(position - low, [i for i in range(4) if i != axis])
        return (1 - fraction) * x.take(low, axis) + fraction * x.take(high, axis)

    y = resize_bilinear(jnp.asarray(x), 29)
    np.testing.assert_allclose(y, along(along(x, 1), 2), rtol=1e-5, atol=1e-3)


@pytest.mark.slow
def test_gray_is_a_colour_and_bytes_are_numbers(rng):
    def random(leaf):
        fan_in = np.prod(leaf.shape[:-1])
        return jnp.asarray(rng.normal(0, np.sqrt(2 / fan_in), leaf.shape), jnp.float32)

    params = jax.tree.map(random, shapes())
    gray = rng.integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    colour = np.repeat(gray, 3, axis=-1).astype(np.float32)
    network = jax.jit(InceptionV3().apply)
    features, logits = network({"params": params}, gray)
    assert np.std(features) > 0
    np.testing.assert_allclose(logits, features @ params["fc"]["kernel"], rtol=1e-4, atol=1e-5)
    for a, b in zip(network({"params": params}, colour), (features, logits), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def reference():
    """pytorch-fid's network and the whole network it takes its blocks from, at random weights."""
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    inception = pytest.importorskip("pytorch_fid.inception")
    torch.manual_seed(0)
    with (
        mock.patch.object(inception, "load_state_dict_from_url"),  # no download
        mock.patch.object(torchvision.models.Inception3, "load_state_dict"),
    ):
        whole = inception.fid_inception_v3().eval()
    for module in whole.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
            torch.nn.init.normal_(module.running_mean, std=0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    with mock.patch.object(inception, "fid_inception_v3", return_value=whole):
        return inception.InceptionV3().eval(), whole


@pytest.mark.parametrize(
    "shape",
    [
        (32, 32, 3),
        pytest.param((8, 8, 1), marks=pytest.mark.slow),
        pytest.param((299, 299, 3), marks=pytest.mark.slow),
        pytest.param((320, 200, 3), marks=pytest.mark.slow),
    ],
)
def test_agrees_with_pytorch_fid(reference, rng, shape):
    """Largest and root-mean-square error, of each image and of the difference between two."""
    import torch

    network, whole = reference
    noise = rng.integers(0, 256, shape)
    images = np.stack([noise, noise // 8 + 100]).astype(np.uint8)
    with torch.no_grad():
        colour = np.broadcast_to(images, (*images.shape[:-1], 3)).transpose(0, 3, 1, 2)
        features = network(torch.from_numpy(colour / np.float32(255)))[0][:, :, 0, 0]
        expected = features.numpy(), torch.nn.functional.linear(features, whole.fc.weight).numpy()

    weights = {name: array.numpy() for name, array in whole.state_dict().items()}
    params = jax.tree.map(jnp.asarray, inception_parameters(weights))
    ours = jax.jit(InceptionV3().apply)({"params": params}, images)
    for a, b in zip(ours, expected, strict=True):
        for measure in (np.linalg.norm, lambda x: np.abs(x).max()):
            assert measure(a - b) < 1e-5 * measure(b)
            assert measure((a[0] - a[1]) - (b[0] - b[1])) < 1e-3 * measure(b[0] - b[1])
