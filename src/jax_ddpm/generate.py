"""The batched sampling driver."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jax_ddpm.diffusion.process import per_example_normal
from jax_ddpm.diffusion.samplers.scan import Snapshots, sample
from jax_ddpm.errors import UserError
from jax_ddpm.factory import Model
from jax_ddpm.keys import Stream, example_keys, stream_key
from jax_ddpm.runtime.devices import compile_over, place, round_up, split, whole
from jax_ddpm.runtime.pipeline import run_ahead
from jax_ddpm.runtime.stopping import Poll, never

_MAX_COLUMNS = 10


class Generator:
    """Draws samples in batches of one compiled size, rounded up to share over all devices.

    It is compiled once: new parameters, seeds and labels reuse the program. The noise of sample i
    depends only on (seed, i), so it does not change with the batch size or the number of devices.
    """

    def __init__(self, model: Model, batch_size: int, mesh: Mesh, num_snapshots: int = 1):
        batch_size = round_up(batch_size, mesh)
        self._model, self._mesh, self.batch_size = model, mesh, batch_size
        sampler = model.sampler()
        self.num_evaluations = sampler.num_evaluations

        def run(denoiser, seed, index, conditioning) -> Snapshots:
            prior_keys = example_keys(stream_key(seed, Stream.SAMPLE_PRIOR), index)
            step_keys = example_keys(stream_key(seed, Stream.SAMPLE_STEPS), index)
            x = jnp.zeros((batch_size, *model.spec.image_shape))
            x = model.sampling_process.prior_std * per_example_normal(prior_keys, x)
            _, snapshots = sample(
                sampler,
                denoiser,
                x,
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
        label: int | None = None,
        poll: Poll = never,
    ) -> Iterator[tuple[int, Snapshots]]:
        """The samples ``start, …, start + batch_size - 1`` of the seed for each start, on the host.

        Batches and ``poll`` are those of ``run_ahead``.
        """
        model, key = self._model, jax.random.key(seed)
        denoiser = place(model.guided_denoiser(params), whole(self._mesh))

        def launch(start: int) -> Snapshots:
            index = np.arange(start, start + self.batch_size, dtype=np.int32)
            labels = self.labels(index, label)
            conditioning = {} if labels is None else {"label": labels}
            return self._run(denoiser, key, index, conditioning)

        return run_ahead(launch, starts, poll)

    def __call__(
        self,
        params: Any,
        seed: int,
        num_samples: int,
        label: int | None = None,
        poll: Poll = never,
    ) -> Float[np.ndarray, "n h w c"]:
        """Samples 0, …, num_samples-1 of the seed, float in about [-1, 1].

        Sample i of a conditional model is of class ``label``, or of class i modulo the number of
        classes if that is None.
        """
        return self.snapshots(params, seed, num_samples, label, poll)[0][-1]

    def snapshots(
        self,
        params: Any,
        seed: int,
        num_samples: int,
        label: int | None = None,
        poll: Poll = never,
    ) -> tuple[Float[np.ndarray, "k n h w c"], Float[np.ndarray, "k n h w c"]]:
        """x_t and the predicted x_0 of each sample at evenly spaced steps; the last is its end."""
        starts = range(0, num_samples, self.batch_size)
        parts = [part for _, part in self.draw(params, seed, starts, label, poll)]
        x, x0 = (np.concatenate(part, axis=1)[:, :num_samples] for part in zip(*parts, strict=True))
        return x, x0

    def labels(
        self, index: Int[np.ndarray, " n"], label: int | None = None
    ) -> Int[np.ndarray, " n"] | None:
        """The class of each sample; None where the model has none.

        Raises:
          UserError: where the model has no such class.
        """
        classes = self._model.label_classes
        if label is not None and not 0 <= label < classes:
            raise UserError(
                f"--class={label}: this model has classes 0 to {classes - 1}"
                if classes
                else f"--class={label}: this model has no classes; leave --class out"
            )
        if not classes:
            return None
        return index % classes if label is None else np.full_like(index, label)

    def columns(self, num_samples: int, label: int | None = None) -> int:
        """Columns of a grid: one for each class, or about as many as rows."""
        if self._model.label_classes and label is None:
            return min(self._model.label_classes, _MAX_COLUMNS)
        return math.ceil(math.sqrt(num_samples))
