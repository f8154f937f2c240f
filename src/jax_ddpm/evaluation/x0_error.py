"""``--mode=variance``: the statistic of the optimal variance, stored with a checkpoint."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm.data.plan import batch_indices, padded_batches
from jax_ddpm.data.source import Source
from jax_ddpm.diffusion.optimal_variance import X0Error, visited_times, x0_error
from jax_ddpm.evaluation.finite import finite
from jax_ddpm.inference.companions import x0_error_path
from jax_ddpm.inference.outputs import require_writable
from jax_ddpm.inference.trained import Trained
from jax_ddpm.keys import Stream, example_keys, stream_key
from jax_ddpm.runs.checkpoint import digest
from jax_ddpm.runtime.devices import compile_over, make_mesh, place, round_up, split, whole
from jax_ddpm.runtime.files import replacing
from jax_ddpm.runtime.pipeline import run_ahead
from jax_ddpm.runtime.stopping import Poll, never


def estimate_x0_error(
    trained: Trained, source: Source, num_examples: int, batch_size: int, poll: Poll = never
) -> X0Error:
    """E‖x_0 - x̂_0‖²/d at every visited time, over ``num_examples`` of the training split."""
    model, times = trained.model, visited_times(trained.model.process)
    size = source.spec.split_sizes["train"]
    chosen = batch_indices(0, 0, min(num_examples, size), size)
    mesh, key = make_mesh(), stream_key(jax.random.key(0), Stream.OPTIMAL_VARIANCE)
    batches = padded_batches(len(chosen), round_up(batch_size, mesh))

    def summed(denoiser, index, mask, batch):
        x0 = model.codec.encode(batch)
        t, keys = jnp.asarray(times, x0.dtype), example_keys(key, index)
        found = x0_error(model.process, denoiser, x0, t, keys, model.conditions.given(batch))
        return jnp.sum(jnp.where(mask[None], found, 0), axis=1)

    run = compile_over(summed, (whole(mesh), *[split(mesh)] * 3), whole(mesh))
    denoiser = place(model.denoiser(trained.params, clip=False), whole(mesh))

    def launch(part: int):
        index, mask = batches[part]
        return run(denoiser, index, mask, source.batch("train", chosen[index]))

    sums = [found for _, found in run_ahead(launch, range(len(batches)), poll)]
    mean = finite(np.stack(sums).astype(np.float64).sum(axis=0) / len(chosen), "errors")
    rising = np.argsort(model.process.log_snr(times))
    return X0Error(model.process.log_snr(times)[rising], mean[rising])


def store_x0_error(
    trained: Trained,
    source: Source,
    workdir: pathlib.Path,
    num_examples: int,
    batch_size: int,
    poll: Poll = never,
) -> pathlib.Path:
    """Writes the statistic beside its parameters, and returns its path."""
    out = x0_error_path(workdir, trained.step, trained.item)
    require_writable(out, f"--workdir={workdir}")
    statistic = estimate_x0_error(trained, source, num_examples, batch_size, poll)
    record = {
        "computes": "E‖x_0 - x̂_0‖²/d at rising λ",
        "model": trained.model_record,
        "data": source.spec.identity,
        "num_examples": min(num_examples, source.spec.split_sizes["train"]),
        "sha256": digest(statistic),
    }
    columns = {name: column.tolist() for name, column in statistic._asdict().items()}
    with replacing(out) as file:
        file.write((json.dumps(record | columns, ensure_ascii=False) + "\n").encode())
    return out
