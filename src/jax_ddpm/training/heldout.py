"""The objective measured on data that training never sees."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_ddpm.data.plan import batch_indices, padded_batches
from jax_ddpm.data.source import Source
from jax_ddpm.keys import StepKeys, Stream, stream_key
from jax_ddpm.runtime.devices import compile_over, fetch, place, split, whole
from jax_ddpm.runtime.stopping import Poll, never
from jax_ddpm.tasks.recipe import Recipe
from jax_ddpm.training.meter import weighted_means
from jax_ddpm.training.state import TrainState, readable


class HeldOut:
    """The mean loss of the held-out split, with the same random numbers at every call.

    The loss is that of the recipe's measured phase in its ``measuring()`` form, without
    augmentation and dropout, and with averages in place of networks, so that differences between
    calls are differences between parameters. At most ``max_examples`` are used,
    picked at random but always the same.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        seed: Any,
        mesh: Mesh,
        batch_size: int,
        max_examples: int,
    ):
        count = min(max_examples, source.spec.split_sizes["heldout"])
        measured = recipe.held_out().measuring()
        phase = recipe.phases[recipe.measured]
        self._names = (*phase.trains, *phase.reads)
        self._frozen = {name: network.params for name, network in recipe.frozen.items()}
        key = stream_key(seed, Stream.HELD_OUT)

        def evaluate(params, batch, index, mask):
            keys = StepKeys(key, jnp.zeros((), jnp.int32), index, count)
            loss, metrics, _ = measured(params, measured.init(), batch, keys, keys.step)
            metrics = {"loss": (loss, jnp.ones_like(loss))} | metrics
            return jax.tree.map(lambda values: jnp.sum(values * mask), metrics)

        self._mesh = mesh
        self._evaluate = compile_over(evaluate, (whole(mesh), *[split(mesh)] * 3), whole(mesh))
        chosen = batch_indices(0, 0, count, source.spec.split_sizes["heldout"])
        self._batches = [
            (source.batch("heldout", chosen[index]), index, mask)
            for index, mask in padded_batches(count, batch_size)
        ]

    def __call__(self, state: TrainState, poll: Poll = never) -> dict[str, float]:
        """``heldout_loss`` and the other metrics; ``poll`` is called before each batch."""
        # An average takes the place of the network of its name.
        known = readable(state.params, state.ema, self._frozen) | state.ema
        params = place({name: known[name] for name in self._names}, whole(self._mesh))
        parts = []
        for batch in self._batches:
            poll()
            parts.append(self._evaluate(params, *batch))
        sums = jax.tree.map(lambda *values: sum(values), *fetch(parts))
        return {f"heldout_{name}": mean for name, mean in weighted_means(sums).items()}
