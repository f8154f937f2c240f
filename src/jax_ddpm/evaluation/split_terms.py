"""A model's terms for every example of a split, computed in parts that are kept."""

import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jax_ddpm.data.plan import batch_indices, padded_batches
from jax_ddpm.data.source import Source
from jax_ddpm.diffusion.denoiser import Denoiser
from jax_ddpm.evaluation.result_cache import Arrays, ResultCache
from jax_ddpm.inference.trained import Trained
from jax_ddpm.keys import Stream, example_keys, stream_key
from jax_ddpm.runtime.devices import compile_over, make_mesh, place, round_up, whole
from jax_ddpm.runtime.devices import split as over
from jax_ddpm.runtime.pipeline import run_ahead
from jax_ddpm.runtime.stopping import Poll


def split_terms(
    trained: Trained,
    source: Source,
    split: str,
    count: int,
    batch_size: int,
    cache: pathlib.Path,
    poll: Poll,
    *,
    denoiser: Denoiser,
    terms: Callable[..., dict[str, jax.Array]],
    stream: Stream,
    names: Iterable[str],
    identity: dict[str, Any],
) -> Iterator[Arrays]:
    """``terms(denoiser, x0, keys, conditioning)`` of ``count`` examples or more, part by part.

    The examples come in a random order, always the same, each once. The key of an example depends
    only on its place in the split, so that its terms are the same whatever the batches and devices.
    A conditional model is told the truth. ``names`` are those of the terms, and ``identity`` names
    the computation.
    """
    size = source.spec.split_sizes[split]
    order = batch_indices(0, 0, size, size)
    mesh = make_mesh()
    batch_size = round_up(batch_size, mesh)
    batches = padded_batches(size, batch_size)[: -(-count // batch_size)]
    model, key = trained.model, stream_key(jax.random.key(0), stream)
    denoiser = place(denoiser, whole(mesh))

    def of_batch(denoiser, index, batch):
        x0 = model.codec.encode(batch)
        return terms(denoiser, x0, example_keys(key, index), model.conditions.given(batch))

    of_batch = compile_over(of_batch, (whole(mesh), *[over(mesh)] * 2), over(mesh))

    def launch(part: int) -> dict[str, jax.Array]:
        index = order[batches[part][0]]
        with jax.default_matmul_precision("highest"):  # like ``extract``
            return of_batch(denoiser, index, source.batch(split, index))

    def compute(wanted: Iterable[int]) -> Iterator[tuple[int, Arrays]]:
        for part, found in run_ahead(launch, wanted, poll):
            inside = batches[part][1]
            yield part, {name: array[inside] for name, array in found.items()}

    of_data = {"data": source.spec.identity, "split": split, "batch_size": batch_size}
    parts = ResultCache(cache, identity | {"model": trained.model_record} | of_data, names)
    parts.complete(len(batches), compute, "bits/dim")
    return map(parts.load, range(len(batches)))
