"""Bits/dim and the rate–distortion curve of a trained model (Ho et al. 2020, sections 4.2, 4.3)."""

import dataclasses
import io
import pathlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from jaxtyping import Float

from jax_ddpm import images
from jax_ddpm.data.source import Source
from jax_ddpm.evaluation.estimate import Estimate
from jax_ddpm.evaluation.finite import finite
from jax_ddpm.evaluation.result_cache import Arrays
from jax_ddpm.evaluation.split_terms import split_terms
from jax_ddpm.inference.outputs import beside
from jax_ddpm.inference.trained import Trained
from jax_ddpm.keys import Stream
from jax_ddpm.runtime.files import replacing
from jax_ddpm.runtime.stopping import Poll, never

COLUMNS = ("t", "term", "term_standard_error", "rate", "rmse")  # of the curve's table


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """The variational bound over ``count`` examples, in bits/dim with standard errors.

    Attributes:
      total: the bound on the negative log-likelihood: rate + distortion.
      prior: L_T.
      rate: L_T + Σ L_{t-1}, the cost of sending the first noisy state x_1.
      distortion: L_0, the cost of sending x_0 after it.
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
        """Bits/dim received once x_t is known: L_T and the terms of all later t."""
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

    Fewer than the split's size are picked at random, always the same. The noise depends only on the
    example's place in the split and t, so the same parameters give the same number whatever the
    batches and devices. A conditional model is told the truth.
    """
    model = trained.model
    count = min(num_examples, source.spec.split_sizes[split])

    def terms(denoiser, x0, keys, conditioning):
        return model.family.bound(denoiser, x0, keys, conditioning)._asdict()

    parts = split_terms(
        trained,
        source,
        split,
        count,
        batch_size,
        cache,
        poll,
        denoiser=model.denoiser(trained.params),
        terms=terms,
        stream=Stream.BOUND,
        names=("steps", "prior", "x0_mse"),
        identity={"computes": "variational bound"},
    )
    bound = reduce_terms(parts, count)
    assert bound.count == count
    return bound


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
        # Squares about the mean (Chan et al. 1983) lose nothing where the mean is large.
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
    """Writes the rate–distortion curve as ``<stem>.csv`` and as a plot, ``<stem>.png``.

    Each t has one row, the noisiest first: the term of t with its standard error, the bits/dim
    received once x_t is known, and the RMSE of the x_0 predicted from it.
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
    with replacing(stem.with_name(f"{stem.name}.csv")) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        writer.writerows(reversed(list(rows)))
        text.detach()
    with replacing(stem.with_name(f"{stem.name}.png")) as file:
        _plot(file, bound, images.noted(beside(stem)))


def _plot(file: BinaryIO, bound: Bound, metadata: dict[str, str]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(bound.cumulative_rate, bound.rmse)
    axes.set(xlabel="rate (bits/dim)", ylabel="distortion (RMSE, 0–255)", ylim=(0, None))
    figure.savefig(file, format="png", dpi=150, metadata=metadata)
