"""The training loop, top to bottom."""

import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_ddpm import factory, images
from jax_ddpm.data.plan import batch_indices
from jax_ddpm.data.source import Source
from jax_ddpm.errors import UserError
from jax_ddpm.generate import Generator
from jax_ddpm.keys import Stream, stream_key
from jax_ddpm.training import checkpoint
from jax_ddpm.training.heldout import HeldOut
from jax_ddpm.training.metrics import Meter, MetricWriter, Progress
from jax_ddpm.training.recipe import make_objective, make_recipe
from jax_ddpm.training.state import init_state
from jax_ddpm.training.step import compile_step, data_mesh, replicate


def train(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Trains into ``workdir`` and returns the path of the last sample grid.

    Writes ``config.json``, ``data.json``, ``metrics.jsonl``, ``tensorboard/``, ``samples/`` and, at
    the end, ``checkpoint/`` with the parameters and their averages. An unfinished run that lies
    there is started over.

    Raises:
      UserError: where the workdir holds a finished run, or a loss or gradient is not finite.
    """
    if checkpoint.exists(workdir):
        raise UserError(
            f"--workdir={workdir} already holds a finished run; sample from it with "
            f"--mode=sample --workdir={workdir}, or train into another --workdir"
        )
    source = factory.make_source(config)
    checkpoint.save_identity(workdir, config, source.spec)
    model = factory.Model(config, source.spec)
    objective = make_objective(config, model)
    recipe = make_recipe(config, objective)
    every, batch_size = config.training, config.training.batch_size
    num_steps, num_samples = config.training.num_steps, config.sampling.num_samples
    num_examples = source.spec.split_sizes["train"]

    mesh, seed = data_mesh(), jax.random.key(config.seed)
    params = {"network": model.network.init(stream_key(seed, Stream.PARAMETERS))}
    heldout = HeldOut(objective, source, seed, mesh, batch_size, every.heldout_examples)
    generator = Generator(model, config.sampling.batch_size, mesh)
    step_fn = compile_step(recipe, mesh)

    meter = Meter(batch_size)
    with MetricWriter(workdir) as writer, Progress(num_steps) as progress:
        progress.say(describe(params, source, mesh))
        state = replicate(init_state(recipe, params, objective.init()), mesh)
        for step in range(num_steps):
            indices = batch_indices(config.seed, step, batch_size, num_examples)
            state, metrics = step_fn(state, source.batch("train", indices), seed)
            meter.add(step, metrics)
            progress.advance()

            done, last = step + 1, step + 1 == num_steps
            if done % every.log_every == 0 or last:
                scalars = meter.means()
                writer.write(done, scalars)
                progress.show(done, scalars)
            if done % every.heldout_every == 0 or last:
                with meter.paused():
                    writer.write(done, heldout(state.ema))
            if done % every.sample_every == 0 or last:
                with meter.paused():
                    path = workdir / "samples" / f"step_{done:07}.png"
                    samples = generator(state.ema["network"], config.seed, num_samples)
                    images.save_grid(path, samples, generator.columns(num_samples))
                    progress.say(f"wrote {path}")
    checkpoint.save(workdir, {"params": state.params, "ema": state.ema})
    return path


def describe(params: dict[str, Any], source: Source, mesh: Mesh) -> str:
    """What is about to be trained on what, in a line."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    spec, device = source.spec, mesh.devices.flat[0]
    height, width, channels = spec.image_shape
    return (
        f"{count:,} parameters on {mesh.size} × {device.device_kind}; {spec.identity}: "
        f"{spec.split_sizes['train']:,} images of {height}×{width}×{channels}; "
        "compiling the first step …"
    )
