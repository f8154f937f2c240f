"""What is measured: the network, data and train step of one of the project's own configs.

Images are random bytes, so no data set is needed, only the imports of the programs themselves: jax,
flax, optax, jaxtyping, ml_collections (and its PyYAML) and pillow; orbax for ``checkpoint.py``,
grain for ``input_pipeline.py``, and torch and diffusers for the peer. The folder ``src`` must be
importable, as ``pip install --no-deps -e .`` or ``PYTHONPATH=src`` makes it.
"""

import argparse
import ast
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import Program
from ml_collections import ConfigDict

from jax_ddpm.data.source import ArraySource
from jax_ddpm.factory import Model
from jax_ddpm.runtime.backend import keep_memory, set_flags
from jax_ddpm.runtime.devices import make_mesh, place, split
from jax_ddpm.training.compiled_step import CompiledStep, compile_step
from jax_ddpm.training.feed import Feed
from jax_ddpm.training.prepare import prepare

# The config, the shape of an image, its levels and the number of training images.
SHAPES = {
    "digits": ("digits", (8, 8, 1), 17, 1438),
    "cifar10": ("cifar10", (32, 32, 3), 256, 50_000),
    "256": ("celebahq256", (256, 256, 3), 256, 1000),
}
_CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def make_parser(doc: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks of a setting share."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="cifar10")
    parser.add_argument(
        "--batch_size", type=int, nargs="+", default=[0], help="one or several; 0: the config's"
    )
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), help="refuse any other")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of computation; by default float32 on a CPU and bfloat16 elsewhere",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--override",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="such as model.remat=blocks",
    )
    return parser


class Setting:
    """A config on this machine's devices.

    Attributes:
      config, mesh: as in training.
      source: random images of the config's shape.
      model: the network and the meaning of its output.

    Raises:
      SystemExit: in one line, where the platform asked for is not available.
    """

    def __init__(self, arguments: argparse.Namespace, batch_size: int = 0):
        _choose_platform(arguments.platform)
        name, image_shape, num_levels, num_images = SHAPES[arguments.shape]
        config = _load_config(name)
        on_cpu = jax.default_backend() == "cpu"
        config.model.dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
        if batch_size:
            config.training.batch_size = config.sampling.batch_size = batch_size
        config.update_from_flattened_dict(dict(map(_parse_override, arguments.override)))
        images = np.random.default_rng(0).integers(
            0, num_levels, (num_images, *image_shape), dtype=np.uint8
        )
        splits = {"train": {"image": images}, "heldout": {"image": images[:100]}}
        self._shape = arguments.shape
        self.config: ConfigDict = config
        self.source = ArraySource(splits, num_levels, "random bytes")
        self.mesh = make_mesh(config.fsdp)
        self.model = Model(config, self.source.spec)

    @property
    def batch_size(self) -> int:
        return self.config.training.batch_size

    @cached_property
    def params(self) -> Any:
        """The network's parameters, none of them 0: multiplying zeros can be faster than training.

        Convolutions that start from 0 would also stop all gradients.
        """
        rng = np.random.default_rng(0)

        def stir(leaf: jax.Array) -> jax.Array:
            return leaf + 0.02 * rng.standard_normal(leaf.shape, np.float32)

        return jax.tree.map(stir, self.model.network.init(jax.random.key(0)))

    def inputs(self) -> tuple[jax.Array, jax.Array]:
        """A batch of noisy images and times for the network, split over the devices."""
        rng = np.random.default_rng(1)
        x = rng.standard_normal((self.batch_size, *self.source.spec.image_shape), np.float32)
        time = rng.integers(0, 1000, self.batch_size).astype(np.float32)
        return place((x, time), split(self.mesh))

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that identify this setting in a report."""
        return {
            "shape": self._shape,
            "batch_size": self.batch_size,
            "dtype": self.config.model.dtype,
            "devices": f"{self.mesh.size} × {jax.devices()[0].device_kind}",
        }


class Training:
    """The train step of a setting, ready to run.

    Attributes:
      state, step, feed: as in the training loop; the batches lie on the devices if they fit.
        ``stirred`` parameters are ``setting.params``, others those that a run begins with.
      steps: in one dispatch.
    """

    def __init__(self, setting: Setting, stirred: bool = True):
        config, mesh = setting.config, setting.mesh
        prepared = prepare(config, setting.source.spec, mesh, pathlib.Path("no run"))
        recipe, self.state = prepared.recipe, prepared.state
        if stirred:
            laid_out = jax.tree.map(lambda leaf: leaf.sharding, self.state.params)
            params = jax.tree.map(jnp.copy, setting.params)  # the step donates them
            everything = place(dict.fromkeys(recipe.networks, params), laid_out)
            self.state = self.state._replace(params=everything)
        self.feed = Feed(config, setting.source, setting.mesh, start=0)
        self.step: CompiledStep = compile_step(
            recipe, self.state, setting.mesh, config.parallel, self.feed.data
        )
        self.steps: int = config.training.steps_per_dispatch
        self._seed = jax.random.key(config.seed)

    def arguments(self) -> tuple[Any, ...]:
        """The next arguments of ``step.program``; the state among them is donated."""
        batches = self.step.arrange(self.feed.take(self.steps))
        return self.state, self.step.held, batches, self._seed

    def advance(self) -> Any:
        """Dispatches one program of ``steps`` steps and returns its metrics."""
        self.state, metrics = self.step(self.state, self.feed.take(self.steps), self._seed)
        return metrics

    @property
    def program(self) -> Program:
        return Program(self.advance)


def measure_each(
    arguments: argparse.Namespace, measure: Callable[[Setting], dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row of results for each batch size, or "out_of_memory" where memory is short.

    The row with the most images a second is marked as the best of several.
    """
    rows = []
    for batch_size in arguments.batch_size:
        setting = Setting(arguments, batch_size)
        try:
            rows.append(setting.fields | measure(setting))
        except RuntimeError as error:
            if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error)):
                raise
            rows.append(setting.fields | {"out_of_memory": True})
    if len(rows) > 1:
        max(rows, key=lambda row: row.get("images_per_second", 0))["best"] = True
    return rows


def _load_config(name: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(name, _CONFIGS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _parse_override(text: str) -> tuple[str, Any]:
    field, _, value = text.partition("=")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field, value


def _choose_platform(platform: str | None) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory too
    set_flags()
    keep_memory()
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif platform and jax.default_backend() != platform:
        sys.exit(
            f"error: --platform={platform}: none is at hand, JAX sees {jax.device_count()} × "
            f"{jax.devices()[0].device_kind}; nothing was measured"
        )
