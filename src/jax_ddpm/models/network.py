"""A Linen module as a pair of pure functions, which training and sampling see of a network; and
the networks of other runs."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jax_ddpm.errors import UserError
from jax_ddpm.models.initialisers import HostInitialiser, generator


class Network(NamedTuple):
    """The functions of a network.

    ``apply(params, *inputs) → output`` has the module's inputs and output, is pure, and is a stable
    object, so that programs compiled for it are found again; ``init(key) → params`` draws float32
    parameters.
    """

    init: Any
    apply: Any


class Frozen(NamedTuple):
    """A trained network of another run, which is read and never changed.

    Attributes:
      params: its parameters, a tree.
      model: the model that run trained, whose functions take them.
      record: their identity, as JSON.
    """

    params: Any
    model: Any
    record: dict[str, Any]


# The name of a config's field that holds the workdir of a run → its network.
Read = Callable[[str], Frozen]


def reads_nothing(field: str) -> Frozen:
    """The ``Read`` of a recipe that stands alone."""
    raise UserError(f"config.{field}: no other run is read here")


def make_network(module: nn.Module, *example_inputs: Any) -> Network:
    """``module`` for inputs of these shapes and dtypes, with a batch of any size."""

    def apply(params, *inputs, **named_inputs):
        return module.apply({"params": params}, *inputs, **named_inputs)

    def init(key: Any) -> Any:
        return _draw_parameters(module, key, *example_inputs)

    return Network(init, apply)


def _draw_parameters(module: nn.Module, key: Any, *inputs: Any) -> Any:
    """``module.init``, without compiling anything where all initialisers draw on the host.

    The forward pass is then only traced for shapes, and each layer noted by its path. Each
    parameter is drawn by its layer's own initialiser, from the key and its path. A network that has
    Flax's initialisers is initialised by a compiled program.
    """
    layers: dict[tuple[str, ...], nn.Module] = {}

    def note(call, args, kwargs, context):
        layers[context.module.path] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes = jax.eval_shape(module.init, key, *inputs)["params"]
    key_data = jax.random.key_data(key)

    def initialiser(path) -> Any:
        *layer, name = (entry.key for entry in path)
        return getattr(layers.get(tuple(layer)), f"{name}_init", None)

    def draw(path, leaf):
        name = "/".join(entry.key for entry in path)
        rng = generator(key_data, zlib.crc32(name.encode()))
        return initialiser(path).draw(rng, leaf.shape)

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    if not all(isinstance(initialiser(path), HostInitialiser) for path in paths):
        return jax.jit(module.init)(key, *inputs)["params"]
    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))
