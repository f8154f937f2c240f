"""Bits/dim and the rate–distortion curve of a trained model (Ho et al. 2020, sections 4.2, 4.3)."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from jax_ddpm.data.plan import batch_indices, padded_batches
from jax_ddpm.data.source import Source
from jax_ddpm.diffusion.likelihood import BoundTerms, variational_bound
from jax_ddpm.evaluation.estimate import Estimate
from jax_ddpm.evaluation.finite import finite
from jax_ddpm.evaluation.parts import Arrays, Parts
from jax_ddpm.files import replacing
from jax_ddpm.images import from_levels
from jax_ddpm.keys import Stream, example_keys, stream_key
from jax_ddpm.pipeline import run_ahead
from jax_ddpm.stopping import Poll, never
from jax_ddpm.trained import Trained
from jax_ddpm.training.step import data_mesh


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """The variational bound over ``count`` examples, in bits/dim with standard errors.

    Attributes:
      total: the bound on the negative log-likelihood: rate + distortion.
      prior: L_T.
      rate: L_T + Σ L_{t-1}, what it costs to send the first noisy state x_1.
      distortion: L_0, what it costs to send x_0 after it.
      steps, steps_error: means and standard errors of L_0 (at 0) and the L_{t-1}.
      rmse: root of the mean squared error of the x_0 predicted from x_t, images on 0…255.
    """

    count: int
    total: Estimate
    prior: Estimate
    rate: Estimate
    distortion: Estimate
    steps: Float[np.ndarray, " T"]
    steps_error: Float[np.ndarray, " T"]
    rmse: Float[np.ndarray, " T"]

    @property
    def cumulative_rate(self) -> Float[np.ndarray, " T"]:
        """Bits/dim received by the time that x_t is known: L_T and the terms of all later t."""
        later = np.cumsum(self.steps[::-1])[::-1] - self.steps
        return self.prior.value + later


def measure_bound(
    trained: Trained,
    source: Source,
    split: str,
    num_examples: int,
    batch_size: int,
    cache: pathlib.Path,
    poll: Poll = never,
) -> Bound:
    """The bound over ``num_examples`` of the split, each exactly once.

    Below the split's size they are picked at random, always the same. The noise depends on the
    example's place in the split and t alone, so the same parameters give the same number whatever
    the batches and devices; a class-conditional model is given the labels.
    """
    size = source.spec.split_sizes[split]
    count = min(num_examples, size)
    order = batch_indices(0, 0, size, size)
    mesh = data_mesh()
    batch_size = -(-batch_size // mesh.size) * mesh.size
    batches = padded_batches(size, batch_size)[: -(-count // batch_size)]
    terms = _compile_terms(trained, mesh)
    denoiser = jax.device_put(
        trained.model.denoiser(trained.params), NamedSharding(mesh, PartitionSpec())
    )

    def launch(part: int) -> BoundTerms:
        index = order[batches[part][0]]
        with jax.default_matmul_precision("highest"):  # as ``extract`` does
            return terms(denoiser, index, source.batch(split, index))

    def compute(wanted: Iterable[int]) -> Iterator[tuple[int, Arrays]]:
        for part, found in run_ahead(launch, wanted, poll):
            inside = batches[part][1]
            yield part, {name: array[inside] for name, array in found._asdict().items()}

    identity = {
        "computes": "variational bound",
        "model": trained.model_record,
        "data": source.spec.identity,
        "split": split,
        "batch_size": batch_size,
    }
    parts = Parts(cache, identity)
    parts.complete(len(batches), compute, "bits/dim")
    bound = reduce_terms(map(parts.load, range(len(batches))), count)
    assert bound.count == count
    return bound


def _compile_terms(trained: Trained, mesh: Mesh) -> Callable[..., BoundTerms]:
    """(denoiser, index in the split, batch) → the terms of each example."""
    model, key = trained.model, stream_key(jax.random.key(0), Stream.BOUND)

    def terms(denoiser, index, batch):
        return variational_bound(
            model.chain,
            denoiser,
            from_levels(batch["image"], model.spec.num_levels),
            example_keys(key, index),
            {"label": batch["label"]} if model.num_classes else {},
            model.variance,
            model.spec.num_levels,
        )

    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    return jax.jit(terms, in_shardings=(whole, split, split), out_shardings=split)


def reduce_terms(parts: Iterable[Arrays], count: int) -> Bound:
    """The bound from the terms of its first ``count`` examples, in nats/dim, part by part.

    Raises:
      UserError: where a term is not finite.
    """
    seen, mean, squares = 0, np.zeros(()), np.zeros(())
    for part in parts:
        steps, prior, x0_mse = (
            finite(part[name][: count - seen], "terms of the bound")
            for name in ("steps", "prior", "x0_mse")
        )
        if not len(prior):
            break
        rate = prior + steps[:, 1:].sum(axis=1)
        bits = np.column_stack([rate + steps[:, 0], prior, rate, steps]) / np.log(2)
        rows = np.column_stack([bits, x0_mse])
        # Squares about the mean (Chan et al. 1983), which lose nothing where it is large.
        share = len(rows) / (seen + len(rows))
        apart = rows.mean(axis=0) - mean
        squares = squares + len(rows) * rows.var(axis=0) + seen * share * apart**2
        mean = mean + share * apart
        seen += len(rows)
    error = np.sqrt(squares / max(seen - 1, 1) / seen)
    num_timesteps = (len(mean) - 3) // 2
    of_steps, of_errors = slice(3, 3 + num_timesteps), slice(3 + num_timesteps, None)
    return Bound(
        count=seen,
        total=Estimate(mean[0], error[0]),
        prior=Estimate(mean[1], error[1]),
        rate=Estimate(mean[2], error[2]),
        distortion=Estimate(mean[3], error[3]),
        steps=mean[of_steps],
        steps_error=error[of_steps],
        rmse=127.5 * np.sqrt(mean[of_errors]),
    )


def write_curve(bound: Bound, stem: pathlib.Path) -> None:
    """The rate–distortion curve as ``<stem>.csv`` and as a plot, ``<stem>.png``.

    One row for each t, the noisiest first: the term of t with its standard error, the bits/dim
    received by the time that x_t is known, and the RMSE of the x_0 predicted from it.
    """
    import csv

    rows = zip(
        range(len(bound.steps)),
        bound.steps,
        bound.steps_error,
        bound.cumulative_rate,
        bound.rmse,
        strict=True,
    )
    with replacing(stem.with_name(f"{stem.name}.csv")) as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["t", "term", "term_standard_error", "rate", "rmse"])
        writer.writerows(reversed(list(rows)))
    with replacing(stem.with_name(f"{stem.name}.png")) as path:
        _plot(path, bound)


def _plot(path: pathlib.Path, bound: Bound) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(bound.cumulative_rate, bound.rmse)
    axes.set(xlabel="rate (bits/dim)", ylabel="distortion (RMSE, 0–255)", ylim=(0, None))
    figure.savefig(path, format="png", dpi=150)
