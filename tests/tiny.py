"""Small stand-ins, so that tests compile in about a second what they do not test."""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jax_ddpm.codecs.pixels import Pixels
from jax_ddpm.config import default
from jax_ddpm.data.source import Spec, image_spec
from jax_ddpm.factory import Model
from jax_ddpm.models.network import Network


def quick_compilation():
    """The body of a fixture: XLA without its slow optimisations compiles 2-3 times as fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def no_file_grows_past(size):
    """Lets no file grow further, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


DROPOUT = 0.2


def config(**fields) -> ConfigDict:
    """The defaults with a tiny network and chain, and ``section__name=value`` changed."""
    result = default()
    result.update_from_flattened_dict(
        {
            "model.base_channels": 8,
            "model.channel_multipliers": (1, 2),
            "model.num_res_blocks": 1,
            "model.attention_resolutions": (4,),
            "model.num_groups": 4,
            "process.name": "cosine",
            "process.num_timesteps": 8,
            "training.batch_size": 8,
            "training.num_steps": 4,
            "training.warmup_steps": 0,
            "sampling.num_samples": 8,
            "sampling.batch_size": 8,
        }
    )
    result.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return result


def spec(shape=(4, 4, 1), num_levels=17, num_classes=3, class_names=()) -> Spec:
    return image_spec(
        shape, num_levels, num_classes, {"train": 40, "heldout": 10}, "tiny", class_names
    )


CODEC = Pixels((4, 4, 1), 17)  # that of the spec above


def batch(spec: Spec, size: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, spec.num_levels, (size, *spec.image_shape), dtype=np.uint8)
    return {"image": images, "label": rng.integers(0, 3, size, dtype=np.int32)}


def per_example(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]


def apply(params, x, time, conditioning, dropout_keys=None):
    """A "network" of a few parameters that uses all that a network is given."""
    h = per_example(params["gain"][None] * jnp.cos(time)) * x + params["bias"]
    if "label" in conditioning:
        null = len(params["label"]) - 1
        drop = conditioning.get("label_drop", jnp.zeros(len(x), bool))
        h += per_example(params["label"][jnp.where(drop, null, conditioning["label"])])
    if dropout_keys is not None and "label" in conditioning:
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - DROPOUT, x.shape[1:]))
        h = jnp.where(keep(dropout_keys), h / (1 - DROPOUT), 0)
    return h


def network(out_channels: int = 1, num_classes: int = 3) -> Network:
    def init(key):
        return {
            "gain": jnp.array(0.5, jnp.float32),
            "bias": jnp.full((1, 1, 1, out_channels), 0.1, jnp.float32),
            "label": jax.random.normal(key, (num_classes + 1,)),
        }

    return Network(init, apply)


def model(settings: ConfigDict, data: Spec) -> Model:
    """The model of the settings with the network replaced."""
    result = Model(settings, data)
    result.network = network(data.image_shape[-1], data.num_classes)
    return result
