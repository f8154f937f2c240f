"""The training loop, top to bottom."""

import pathlib
import shutil
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
from jax_ddpm.training.state import init_state
from jax_ddpm.training.step import compile_step, data_mesh, replicate


def train(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Trains into ``workdir`` and returns the path of the last sample grid.

    Writes ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``samples/`` and, at the end,
    ``checkpoint/`` with the parameters and their averages.

    Raises:
      UserError: where the workdir holds a finished run, or a loss or gradient is not finite.
    """
    if checkpoint.exists(workdir):
        raise UserError(
            f"--workdir={workdir} already holds a finished run; sample from it with "
            f"--mode=sample --workdir={workdir}, or train into another --workdir"
        )
    make_workdir(workdir, config)
    source = factory.make_source(config)
    model = factory.Model(config, source.spec)
    recipe = factory.make_recipe(config, model)
    every, batch_size = config.training, config.training.batch_size
    num_steps, num_examples = config.training.num_steps, source.spec.split_sizes["train"]

    num_samples = config.sampling.num_samples

    mesh, seed = data_mesh(), jax.random.key(config.seed)
    params = {"network": model.network.init(stream_key(seed, Stream.PARAMETERS))}
    objective = recipe.phases[0].objective
    heldout = HeldOut(objective, source, seed, batch_size, every.heldout_examples)
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
                    samples = generator(state.ema["network"], config.seed, num_samples).x[-1]
                    images.save_grid(path, samples, generator.columns(num_samples))
                    progress.say(f"wrote {path}")
    checkpoint.save(workdir, {"params": state.params, "ema": state.ema})
    return path


def make_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Makes the folder of a run and notes its config; an unfinished run there is started over."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
        checkpoint.save_config(workdir, config)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error


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
