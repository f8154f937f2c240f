"""The objective measured on data that training never sees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ddpm.data.plan import batch_indices, padded_batches
from jax_ddpm.data.source import Source
from jax_ddpm.diffusion.time_sampling import Stratified
from jax_ddpm.keys import StepKeys, Stream, stream_key
from jax_ddpm.stopping import Poll, never
from jax_ddpm.training.metrics import weighted_means
from jax_ddpm.training.objective import DiffusionObjective


class HeldOut:
    """The mean loss of the held-out split, under the same times and noise at every call.

    Flips, dropout and label drop are off, and times are spread evenly over the examples, so that
    differences between calls are differences between parameters. At most ``max_examples`` are used,
    picked at random but always the same.
    """

    def __init__(
        self,
        objective: DiffusionObjective,
        source: Source,
        seed: Any,
        mesh: Mesh,
        batch_size: int,
        max_examples: int,
    ):
        count = min(max_examples, source.spec.split_sizes["heldout"])
        sampler = Stratified(objective.chain.num_timesteps)
        measured = dataclasses.replace(objective, augment=False, time_sampler=sampler)
        key = stream_key(seed, Stream.HELD_OUT)

        def evaluate(params, batch, index, mask):
            keys = StepKeys(key, jnp.zeros((), jnp.int32), index, count)
            loss, metrics, _ = measured(params, sampler.init(), batch, keys, keys.step)
            metrics = {"loss": (loss, jnp.ones_like(loss))} | metrics
            return jax.tree.map(lambda values: jnp.sum(values * mask), metrics)

        whole = NamedSharding(mesh, PartitionSpec())
        split = NamedSharding(mesh, PartitionSpec("data"))
        self._evaluate = jax.jit(evaluate, in_shardings=(whole, split, split, split))
        chosen = batch_indices(0, 0, count, source.spec.split_sizes["heldout"])
        self._batches = [
            (source.batch("heldout", chosen[index]), index, mask)
            for index, mask in padded_batches(count, batch_size)
        ]

    def __call__(self, params: dict[str, Any], poll: Poll = never) -> dict[str, float]:
        """``heldout_loss`` and its quarters of t; ``poll`` is called before each batch."""
        parts = []
        for batch in self._batches:
            poll()
            parts.append(self._evaluate(params, *batch))
        sums = jax.tree.map(lambda *values: sum(values), *jax.device_get(parts))
        return {f"heldout_{name}": mean for name, mean in weighted_means(sums).items()}
