"""The batched sampling driver."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from jax_ddpm.diffusion.process import per_example_normal
from jax_ddpm.diffusion.samplers.loop import Snapshots, sample
from jax_ddpm.errors import UserError
from jax_ddpm.factory import Model
from jax_ddpm.keys import Stream, example_keys, stream_key

_MAX_COLUMNS = 10


class Generator:
    """Draws samples in batches of one compiled size, rounded up to share over all devices.

    Compiled once: new parameters, seeds and labels reuse the program. The noise of sample i depends
    on (seed, i) alone, so it does not change with the batch size or the number of devices.
    """

    def __init__(self, model: Model, batch_size: int, mesh: Mesh, num_snapshots: int = 1):
        batch_size = -(-batch_size // mesh.size) * mesh.size
        self._model, self._batch_size = model, batch_size
        whole = NamedSharding(mesh, PartitionSpec())
        split = NamedSharding(mesh, PartitionSpec("data"))
        by_snapshot = NamedSharding(mesh, PartitionSpec(None, "data"))
        sampler = model.sampler()

        def run(denoiser, seed, index, conditioning) -> Snapshots:
            prior_keys = example_keys(stream_key(seed, Stream.SAMPLE_PRIOR), index)
            step_keys = example_keys(stream_key(seed, Stream.SAMPLE_STEPS), index)
            x = jnp.zeros((batch_size, *model.spec.image_shape))
            x = model.chain.prior_std * per_example_normal(prior_keys, x)
            _, snapshots = sample(sampler, denoiser, x, step_keys, conditioning, num_snapshots)
            return snapshots

        self._run = jax.jit(
            run, in_shardings=(whole, whole, split, split), out_shardings=by_snapshot
        )

    def __call__(
        self, params: Any, seed: int, num_samples: int, label: int | None = None
    ) -> Float[np.ndarray, "n h w c"]:
        """Samples 0, …, num_samples-1 of the seed, float in about [-1, 1].

        With a conditional model sample i is of class ``label``, or where that is None of the class
        of its column in the grid.
        """
        return self.snapshots(params, seed, num_samples, label)[0][-1]

    def snapshots(
        self, params: Any, seed: int, num_samples: int, label: int | None = None
    ) -> tuple[Float[np.ndarray, "k n h w c"], Float[np.ndarray, "k n h w c"]]:
        """x_t and the predicted x_0 of each sample at evenly spaced steps, the last one its end."""
        denoiser, key = self._model.denoiser(params), jax.random.key(seed)
        labels = self._labels(num_samples, label)
        parts = []
        for start in range(0, num_samples, self._batch_size):
            index = np.arange(start, start + self._batch_size, dtype=np.int32)
            rows = {name: array[index % num_samples] for name, array in labels.items()}
            parts.append(jax.device_get(self._run(denoiser, key, index, rows)))
        x, x0 = (np.concatenate(part, axis=1)[:, :num_samples] for part in zip(*parts, strict=True))
        return x, x0

    def columns(self, num_samples: int, label: int | None = None) -> int:
        """Columns of a grid: a class in each, or about as many as rows."""
        if self._model.num_classes and label is None:
            return min(self._model.num_classes, _MAX_COLUMNS)
        return math.ceil(math.sqrt(num_samples))

    def _labels(self, num_samples: int, label: int | None) -> dict[str, np.ndarray]:
        classes = self._model.num_classes
        if label is not None and not 0 <= label < classes:
            raise UserError(
                f"--class={label}: this model has classes 0 to {classes - 1}"
                if classes
                else f"--class={label}: this model has no classes; leave --class out"
            )
        if not classes:
            return {}
        by_column = np.arange(num_samples, dtype=np.int32) % self.columns(num_samples)
        return {"label": by_column if label is None else np.full_like(by_column, label)}
