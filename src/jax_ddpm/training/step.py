"""The train step: a pure function of (state, batch), compiled once over a mesh of all devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jax_ddpm.keys import StepKeys
from jax_ddpm.training.state import Metrics, Phase, Recipe, TrainState


def train_step(
    recipe: Recipe, state: TrainState, batch: dict[str, Array], seed: Any
) -> tuple[TrainState, Metrics]:
    """One update from a global batch under the run's seed key.

    Where the loss or a gradient is not finite nothing is updated but the step count, and the
    metric ``finite`` is below 1.
    """
    batch_size = len(jax.tree.leaves(batch)[0])
    keys = StepKeys(seed, state.step, jnp.arange(batch_size), batch_size)
    params, opt_state, extra = dict(state.params), list(state.opt_state), state.extra
    metrics: Metrics = {}
    finite = jnp.array(True)

    for i, phase in enumerate(recipe.phases):
        gradients, phase_metrics, extra = _gradients(
            phase, params, extra, batch, keys, state.step, recipe.accumulate
        )
        trained = {name: params[name] for name in phase.trains}
        updates, opt_state[i] = phase.optimiser.update(gradients, opt_state[i], trained)
        params |= optax.apply_updates(trained, updates)
        gradient_norm = optax.tree.norm(gradients)
        loss, _ = phase_metrics["loss"]
        finite &= jnp.isfinite(gradient_norm) & jnp.isfinite(loss)
        phase_metrics |= {
            "gradient_norm": _single(gradient_norm),
            "learning_rate": _single(phase.learning_rate(state.step)),
        }
        prefix = "" if len(recipe.phases) == 1 else "+".join(phase.trains) + "/"
        metrics |= {prefix + name: metric for name, metric in phase_metrics.items()}

    ema = {
        name: _moving_average(state.ema[name], params[average.source], average.decay(state.step))
        for name, average in recipe.averages.items()
    }
    proposed = state._replace(params=params, ema=ema, opt_state=tuple(opt_state), extra=extra)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, state)
    metrics["parameter_norm"] = _single(optax.tree.norm(state.params))
    metrics["finite"] = _single(finite.astype(jnp.float32))
    return state._replace(step=state.step + 1), metrics


def _gradients(
    phase: Phase,
    params: dict[str, Any],
    extra: Any,
    batch: dict[str, Array],
    keys: StepKeys,
    step: Array,
    accumulate: int,
) -> tuple[Any, Metrics, Any]:
    """Gradients of the mean loss, summed over ``accumulate`` micro-batches in turn."""
    trained = {name: params[name] for name in phase.trains}

    def summed_loss(trained, extra, part, part_keys):
        loss, metrics, extra = phase.objective(params | trained, extra, part, part_keys, step)
        metrics = {"loss": (loss, jnp.ones_like(loss))} | metrics
        return loss.sum(), (jax.tree.map(jnp.sum, metrics), extra)

    def part_gradients(extra, part):
        examples, index = part
        gradients, (metrics, extra) = jax.grad(summed_loss, has_aux=True)(
            trained, extra, examples, keys.take(index)
        )
        return extra, (gradients, metrics)

    def add_part(carry, part):
        extra, sums = carry
        extra, more = part_gradients(extra, part)
        return (extra, jax.tree.map(jnp.add, sums, more)), None

    # A micro-batch is every accumulate-th example, and so spread over all devices.
    parts = jax.tree.map(
        lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), (batch, keys.index)
    )
    # The first part stays out of the loop: in a loop XLA's CPU backend runs the gradients of
    # convolutions many times slower (jax issue 12868).
    carry = part_gradients(extra, jax.tree.map(lambda x: x[0], parts))
    if accumulate > 1:
        carry, _ = jax.lax.scan(add_part, carry, jax.tree.map(lambda x: x[1:], parts))
    extra, (gradients, metrics) = carry
    return jax.tree.map(lambda g: g / keys.batch_size, gradients), metrics, extra


def _single(value: Any) -> tuple[Array, Array]:
    return jnp.asarray(value, jnp.float32), jnp.ones(())


def _moving_average(average: Any, params: Any, decay: Any) -> Any:
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)


def data_mesh() -> Mesh:
    """All devices along one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(state: TrainState, mesh: Mesh) -> TrainState:
    """The state whole on every device."""
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


def compile_step(
    recipe: Recipe, mesh: Mesh
) -> Callable[[TrainState, dict[str, Any], Any], tuple[TrainState, Metrics]]:
    """``train_step`` over the mesh: batch split over devices, state whole on each and donated."""
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    return jax.jit(
        partial(train_step, recipe),
        in_shardings=(whole, split, whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )
