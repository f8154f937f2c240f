"""A Linen module as a pair of pure functions: the one place where the network library is used."""

import zlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jax_ddpm.models.initialisers import HostInitialiser, generator


class Network(NamedTuple):
    """The functions of a network.

    ``apply(params, *inputs) → output`` takes and gives what the module does, is pure, and a stable
    object, so that programs compiled for it are found again; ``init(key) → params`` draws float32
    parameters.
    """

    init: Any
    apply: Any


def make_network(module: nn.Module, *example_inputs: Any) -> Network:
    """``module`` for inputs of the shapes and dtypes of these; batches may be of any size."""

    def apply(params, *inputs, **named_inputs):
        return module.apply({"params": params}, *inputs, **named_inputs)

    def init(key: Any) -> Any:
        return _draw_parameters(module, key, *example_inputs)

    return Network(init, apply)


def _draw_parameters(module: nn.Module, key: Any, *inputs: Any) -> Any:
    """``module.init`` without compiling anything.

    The forward pass is only traced for shapes, while each layer is noted by its path; then every
    parameter is drawn on the host by its layer's own initialiser, from the key and its path.
    """
    layers: dict[tuple[str, ...], nn.Module] = {}

    def note(call, args, kwargs, context):
        layers[context.module.path] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes = jax.eval_shape(module.init, key, *inputs)["params"]
    key_data = jax.random.key_data(key)

    def draw(path, leaf):
        *layer, name = (entry.key for entry in path)
        initialiser: HostInitialiser = getattr(layers[tuple(layer)], f"{name}_init")
        rng = generator(key_data, zlib.crc32("/".join((*layer, name)).encode()))
        return initialiser.draw(rng, leaf.shape)

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))
