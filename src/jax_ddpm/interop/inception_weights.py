"""The weights of the Inception network of 2015, as pytorch-fid publishes them."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_ddpm.interop.weights import checked, fold_batch_norm
from jax_ddpm.models.inception import InceptionV3

_EPSILON = 1e-3
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
_UNUSED = re.compile(r"^AuxLogits\.|\.num_batches_tracked$|^fc\.bias$")


def inception_parameters(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of ``InceptionV3`` from the state dict of pytorch-fid's network.

    Both use the same names: ``Mixed_5b.branch1x1.conv.weight`` and the four arrays of
    ``Mixed_5b.branch1x1.bn`` become ``kernel`` and ``bias`` of ``branch1x1`` in ``Mixed_5b``. The
    batch counters, the auxiliary classifier and the classifier's bias are left out.

    Raises:
      UserError: naming the first array that is missing, misshapen or unknown.
    """
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
    params = flatten_dict(jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"])
    kernels = {path[:-1]: leaf.shape for path, leaf in params.items() if path[-1] == "kernel"}
    classifier = kernels.pop(("fc",))
    shapes = {"fc.weight": classifier[::-1]}
    for path, kernel in kernels.items():
        name = ".".join(path)
        height, width, inputs, outputs = (1, 1, *kernel)[-4:]
        shapes[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        shapes |= {f"{name}.bn.{array}": (outputs,) for array in _BATCH_NORM}

    used = {name: array for name, array in state_dict.items() if not _UNUSED.search(name)}
    arrays = checked(used, shapes)

    layers: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    for path, kernel in kernels.items():
        name = ".".join(path)
        scale, offset, mean, variance = (arrays[f"{name}.bn.{array}"] for array in _BATCH_NORM)
        weight = arrays[f"{name}.conv.weight"]
        layer = fold_batch_norm(weight, scale, offset, mean, variance, _EPSILON)
        layers[path] = layer | {"kernel": layer["kernel"].reshape(kernel)}
    layers["fc",] = {"kernel": arrays["fc.weight"].T.astype(np.float32)}
    return unflatten_dict(layers)
