"""The batched sampling driver."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, Shaped

from jax_ddpm.conditions.condition import NO_REQUEST
from jax_ddpm.diffusion.denoiser import Conditioning
from jax_ddpm.diffusion.samplers.scan import Snapshots, sample
from jax_ddpm.errors import UserError
from jax_ddpm.factory import Model
from jax_ddpm.keys import Stream, example_keys, seed_key, stream_key
from jax_ddpm.runtime.devices import compile_over, place, round_up, split, whole
from jax_ddpm.runtime.pipeline import run_ahead
from jax_ddpm.runtime.stopping import Poll, never

_MAX_COLUMNS = 10
_NAMED = 5  # of the examples that are not finite


class Diverged(UserError):
    """A model's outputs are not finite, and thus no images."""


def require_finite(outputs: Any, name: str, *, axis: int = 0, first: int = 0) -> None:
    """Checks arrays before they become images, where NaN would be black and infinity white.

    Raises:
      Diverged: naming the examples along ``axis``, counted from ``first``, that are not finite.
    """
    whole = [np.isfinite(np.moveaxis(x, axis, 0)) for x in jax.tree.leaves(outputs)]
    sound = np.logical_and.reduce([x.reshape(len(x), -1).all(axis=1) for x in whole])
    bad = np.flatnonzero(~sound) + first
    if bad.size:
        listed = ", ".join(map(str, bad[:_NAMED]))
        more = f" and {bad.size - _NAMED:,} more" if bad.size > _NAMED else ""
        raise Diverged(
            f"{name} are not finite: {listed}{more}; the parameters have diverged, or the sampler "
            "overflows: give an earlier --checkpoint_step, or another --sampler"
        )


class Generator:
    """Draws samples in batches of one compiled size, rounded up to share over all devices.

    It is compiled once: new parameters, seeds and requests reuse the program. The noise of sample i
    depends only on (seed, i), so it does not change with the batch size or the number of devices.
    A request holds what is asked for by the names of conditions, such as ``{"label": 3}``.
    """

    def __init__(self, model: Model, batch_size: int, mesh: Mesh, num_snapshots: int = 1):
        batch_size = round_up(batch_size, mesh)
        self._model, self._mesh, self.batch_size = model, mesh, batch_size
        sampler = model.sampler()
        self.num_evaluations = sampler.num_evaluations

        def run(denoiser, seed, index, conditioning) -> Snapshots:
            prior_keys = example_keys(stream_key(seed, Stream.SAMPLE_PRIOR), index)
            step_keys = example_keys(stream_key(seed, Stream.SAMPLE_STEPS), index)
            _, snapshots = sample(
                sampler,
                denoiser,
                sampler.start(prior_keys, model.codec.shape),
                step_keys,
                conditioning,
                num_snapshots,
                model.self_condition,
            )
            return snapshots

        self._run = compile_over(run, (*[whole(mesh)] * 2, *[split(mesh)] * 2), split(mesh, axis=1))

    def draw(
        self,
        params: Any,
        seed: int,
        starts: Iterable[int],
        request: Mapping[str, Any] = NO_REQUEST,
        poll: Poll = never,
    ) -> Iterator[tuple[int, Snapshots]]:
        """The samples ``start, …, start + batch_size - 1`` of the seed for each start, on the host.

        Batches and ``poll`` are those of ``run_ahead``.

        Raises:
          Diverged: naming samples of a batch, at whatever moment they are not finite.
        """
        model, key = self._model, seed_key(seed)
        denoiser = place(model.guided_denoiser(params), whole(self._mesh))

        def launch(start: int) -> Snapshots:
            index = np.arange(start, start + self.batch_size, dtype=np.int32)
            return self._run(denoiser, key, index, self.asked(index, request))

        for start, drawn in run_ahead(launch, starts, poll):
            require_finite(drawn, f"samples of seed {seed}", axis=1, first=start)
            yield start, drawn

    def __call__(
        self,
        params: Any,
        seed: int,
        num_samples: int,
        request: Mapping[str, Any] = NO_REQUEST,
        poll: Poll = never,
    ) -> Shaped[np.ndarray, "n *shape"]:
        """Samples 0, …, num_samples-1 of the seed, as they are diffused: the codec decodes them."""
        return self.snapshots(params, seed, num_samples, request, poll)[0][-1]

    def snapshots(
        self,
        params: Any,
        seed: int,
        num_samples: int,
        request: Mapping[str, Any] = NO_REQUEST,
        poll: Poll = never,
    ) -> tuple[Shaped[np.ndarray, "k n *shape"], Shaped[np.ndarray, "k n *shape"]]:
        """x_t and the predicted x_0 of each sample at evenly spaced steps; the last is its end."""
        starts = range(0, num_samples, self.batch_size)
        parts = [part for _, part in self.draw(params, seed, starts, request, poll)]
        x, x0 = (np.concatenate(part, axis=1)[:, :num_samples] for part in zip(*parts, strict=True))
        return x, x0

    def asked(
        self, index: Int[np.ndarray, " n"], request: Mapping[str, Any] = NO_REQUEST
    ) -> Conditioning:
        """The conditioning of the samples ``index``.

        Raises:
          UserError: where the model is not told such a thing.
        """
        return self._model.sampling_conditions.asked(request, index)

    def layout(
        self, num_samples: int, request: Mapping[str, Any] = NO_REQUEST
    ) -> tuple[int, tuple[str, ...]]:
        """Columns of a grid and their heads: a column for each turn that samples take.

        Without turns there are about as many columns as rows; of more than ten turns, several share
        a column.
        """
        heads = self._model.sampling_conditions.heads(request)
        if len(heads) > _MAX_COLUMNS:
            return _MAX_COLUMNS, ()
        return len(heads) or math.ceil(math.sqrt(num_samples)), heads
