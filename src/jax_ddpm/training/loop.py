"""The training loop, top to bottom."""

import json
import pathlib
import sys
from typing import Any

import jax
from jax.profiler import TraceAnnotation
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_ddpm import factory, images
from jax_ddpm.data.plan import batch_indices
from jax_ddpm.data.source import Source
from jax_ddpm.errors import UserError
from jax_ddpm.generate import Diverged, Generator
from jax_ddpm.keys import seed_key
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.checkpoint import Checkpoints
from jax_ddpm.runs.frozen import save_frozen
from jax_ddpm.runs.identity import require_same_run, save_identity, to_json
from jax_ddpm.runs.workdir import claimed
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.runtime.distributed import from_first, is_first, own_folder, require_agreement
from jax_ddpm.runtime.stopping import Poll, Stopped, never
from jax_ddpm.tasks.recipe import never_warm
from jax_ddpm.tasks.table import task_of
from jax_ddpm.training.compiled_step import compile_step
from jax_ddpm.training.feed import Feed
from jax_ddpm.training.heldout import HeldOut
from jax_ddpm.training.kept_averages import KeptAverages, kept_averages
from jax_ddpm.training.meter import Meter, MetricWriter, NonFinite, Progress
from jax_ddpm.training.prepare import Prepared, prepare
from jax_ddpm.training.profile import Profiler
from jax_ddpm.training.state import from_items, to_items


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    accept_changes: bool = False,
    profile: bool = False,
    poll: Poll = never,
) -> pathlib.Path:
    """Trains into ``workdir`` up to ``training.num_steps``.

    Writes ``config.json``, ``data.json``, ``metrics.jsonl``, ``tensorboard/``, ``samples/`` and
    ``checkpoints/``, and what a recipe may have beside: ``frozen.json``, ``averages/``. A run that
    lies there goes on from its newest whole checkpoint, to the same parameters and the same
    ``metrics.jsonl`` as if it had never been interrupted. All of several processes write the
    checkpoints; the first writes everything else.

    Args:
      accept_changes: go on although the config differs in meaning from the run's.
      profile: write a trace of a few steps into ``profile/``.
      poll: called after every dispatch of steps; all is saved before its Stopped passes on.

    Returns:
      The path of the last sample grid; for a classifier, of the last checkpoint.

    Raises:
      UserError: where the workdir cannot be written or holds another run, or a loss or gradient is
        not finite.
    """
    source = factory.make_source(config)
    place = {"--workdir": workdir.absolute(), "data set": source.spec.meaning()}
    require_agreement({"config": config.to_dict()} | place)
    try:
        with claimed(workdir), own_folder(workdir) as own:
            require_same_run(workdir, config, source.spec, accept_changes)
            mesh = make_mesh(config.fsdp)
            prepared = prepare(config, source.spec, mesh, workdir, accept_changes)
            try:
                return _train(config, workdir, own, source, mesh, prepared, profile, poll)
            except NonFinite as error:
                path = _note_batch(error, own, config, source)
                again = from_first(lambda: _step_back(workdir, error.step))
                raise UserError(f"{error}. The batch is noted in {path}; {again}") from error
    except OSError as error:
        raise UserError(
            f"{error.filename or workdir}: {error.strerror or error}; the checkpoints in {workdir} "
            "are unharmed: mend this and give the same command again"
        ) from error


def _note_batch(
    error: NonFinite, own: pathlib.Path, config: ConfigDict, source: Source
) -> pathlib.Path:
    path = own / f"nonfinite_step_{error.step}.json"
    num_examples = source.spec.split_sizes["train"]
    batch = batch_indices(config.seed, error.step, config.training.batch_size, num_examples)
    report = {"step": error.step, "not_finite": error.quantities, "examples": batch.tolist()}
    path.write_text(json.dumps(report) + "\n")
    return path


def _step_back(workdir: pathlib.Path, step: int) -> str:
    """Sets aside what led to a step that is not finite; says where training can go on."""
    spoilt = checkpoint.set_aside(workdir, step)
    checkpoint.set_aside(kept_averages(workdir), step)
    told = f"checkpoint {step} led to it and is set aside in damaged/; " if spoilt else ""
    left = checkpoint.steps(workdir)
    if not left:
        return f"{told}training starts over"
    return f"{told}training goes on from checkpoint {left[-1]} with --accept_changes"


def _train(
    config: ConfigDict,
    workdir: pathlib.Path,
    own: pathlib.Path,
    source: Source,
    mesh: Mesh,
    prepared: Prepared,
    profile: bool,
    poll: Poll,
) -> pathlib.Path:
    """Trains; ``own`` is the folder of all that this process writes except checkpoints."""
    model, recipe, state, origin, frozen = prepared
    every, batch_size = config.training, config.training.batch_size
    num_steps, num_samples = config.training.num_steps, config.sampling.num_samples
    task, seed = task_of(config), seed_key(config.seed)

    def picture(done: int) -> pathlib.Path:
        return own / "samples" / f"step_{done:07}.png"

    with (
        Checkpoints(workdir, every.keep_last, every.keep_every) as checkpoints,
        KeptAverages(workdir, recipe, config) as kept,
    ):
        done, items, resumed = checkpoints.restore(to_items(state))
        state = from_items(done, items, state)
        kept.forget_after(done)
        if done > num_steps:
            raise UserError(f"--workdir={workdir}: {done} steps are done; raise training.num_steps")
        save_identity(own, config, source.spec)
        save_frozen(own, frozen)
        if done == num_steps and from_first(picture(done).exists):
            if is_first():
                print(f"all {num_steps:,} steps of {workdir} are done", file=sys.stderr)
            return picture(done)

        heldout = HeldOut(recipe, source, seed, mesh, batch_size, every.heldout_examples)
        generator = Generator(model, config.sampling.batch_size, mesh) if task.draws else None
        with (
            MetricWriter(own, done, resumed.get("position", 0)) as writer,
            Progress(num_steps, done, silent=not is_first()) as bar,
            Feed(config, source, mesh, done) as feed,
        ):
            step_fn = compile_step(recipe, state, mesh, config.parallel, feed.data)
            profiler = Profiler(own / "profile" if profile else None)

            def log(step: int, scalars: dict[str, float]) -> None:
                writer.write(step, scalars)
                bar.show(step, scalars)

            meter = Meter(batch_size, every.log_every, log)
            meter.restore(done, resumed.get("unlogged", {}))

            def save() -> None:
                with meter.paused():
                    progress = {"unlogged": meter.state(), "position": writer.position}
                    data = to_json(source.spec)
                    checkpoints.save(done, to_items(state), config, progress, data=data)

            def due(interval: int) -> bool:
                return done > 0 and (done % interval == 0 or done == num_steps)

            def stride() -> int:
                """The steps of one dispatch, or 1 where something is due before its end."""
                intervals = every.heldout_every, every.sample_every, every.checkpoint_every
                intervals += tuple(kept.intervals.values())
                left = min(num_steps - done, *(n - done % n for n in intervals))
                return every.steps_per_dispatch if every.steps_per_dispatch <= left else 1

            def evaluate() -> None:
                """Writes only after all is measured, so that it can be repeated."""
                drawer = generator if due(every.sample_every) else None
                if not (due(every.heldout_every) or drawer):
                    return
                with meter.paused():
                    if done == num_steps:
                        meter.finish()
                    if drawer:
                        params = state.ema[task.serves]
                        try:
                            samples = drawer(params, config.seed, num_samples, poll=poll)
                        except Diverged as error:
                            if done == num_steps:
                                raise
                            bar.say(f"no picture of step {done:,}: {error}")
                            drawer = None
                    if due(every.heldout_every):
                        writer.write(done, heldout(state, poll))
                    if drawer:
                        drawn = model.codec.decode(samples)
                        images.save_grid(picture(done), drawn, *drawer.layout(num_samples))
                        bar.say(f"wrote {picture(done)}")

            for remark in filter(None, (origin, never_warm(config))):
                bar.say(remark)
            bar.say(describe(state.params, source, mesh, done))
            try:
                evaluate()  # an interrupted run may have stopped right before it
                while done < num_steps:
                    count = stride()
                    with profiler.step(done):
                        with TraceAnnotation("feed"):
                            batches = feed.take(count)
                        state, metrics = step_fn(state, batches, seed)
                        with TraceAnnotation("metrics"):
                            meter.add(done, metrics)
                    done += count
                    bar.advance(count)
                    checkpoints.check()
                    kept.keep(done, state.ema)
                    if due(every.checkpoint_every):
                        save()
                    poll()
                    evaluate()
            except Stopped:
                if checkpoints.last != done:
                    save()
                checkpoints.wait()  # or a failed save would go unnoticed
                raise
    return picture(done) if generator else checkpoint.folder(workdir) / str(done)


def describe(params: dict[str, Any], source: Source, mesh: Mesh, done: int) -> str:
    """What is trained, and on which devices and data, in a line."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    spec, device = source.spec, mesh.devices.flat[0]
    height, width, channels = spec.image_shape
    begin = f"going on after step {done:,}; " if done else ""
    return (
        f"{count:,} parameters on {mesh.size} × {device.device_kind}; {spec.identity}: "
        f"{spec.split_sizes['train']:,} images of {height}×{width}×{channels}, {spec.classes()}; "
        f"{begin}compiling the first step …"
    )
