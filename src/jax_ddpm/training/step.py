"""The train step: a pure function of (state, batch), compiled once over a mesh of all devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jax_ddpm.keys import StepKeys
from jax_ddpm.training.state import Metrics, Phase, Recipe, TrainState


class CompiledStep(NamedTuple):
    """(state, global batch, seed) → (state, metrics).

    ``program`` is what jit or pmap made, ``arrange`` brings a batch into the shape that it takes.
    """

    program: jax.stages.Wrapped
    arrange: Callable[[dict[str, Any]], dict[str, Any]]

    def __call__(
        self, state: TrainState, batch: dict[str, Any], seed: Any
    ) -> tuple[TrainState, Metrics]:
        return self.program(state, self.arrange(batch), seed)

    def lower(self, state: TrainState, batch: dict[str, Any], seed: Any) -> jax.stages.Lowered:
        """The program before it is compiled, to ask what it will need."""
        return self.program.lower(state, self.arrange(batch), seed)


def train_step(
    recipe: Recipe,
    state: TrainState,
    batch: dict[str, Array],
    seed: Any,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update from a global batch under the run's seed key.

    Mapped over devices along ``axis_name``, ``batch`` is this device's share of the global batch,
    the next examples after those of the device before; the result is that of the whole.

    Where the loss or a gradient is not finite nothing is updated but the step count, and the
    metric ``finite`` is below 1.
    """
    keys = _step_keys(seed, state.step, len(jax.tree.leaves(batch)[0]), axis_name)
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


def _step_keys(seed: Any, step: Array, share: int, axis_name: str | None) -> StepKeys:
    """The keys of this device's share of the global batch: all of it where nothing is mapped."""
    if axis_name is None:
        return StepKeys(seed, step, jnp.arange(share), share)
    index = jax.lax.axis_index(axis_name) * share + jnp.arange(share)
    return StepKeys(seed, step, index, share * jax.lax.axis_size(axis_name), axis_name)


def _gradients(
    phase: Phase,
    params: dict[str, Any],
    extra: Any,
    batch: dict[str, Array],
    keys: StepKeys,
    step: Array,
    accumulate: int,
) -> tuple[Any, Metrics, Any]:
    """Gradients of the mean loss, summed over ``accumulate`` micro-batches in turn, then over the
    devices that the batch is mapped over."""
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
    extra, sums = carry
    if keys.axis_name is not None:
        sums = jax.lax.psum(sums, keys.axis_name)
    gradients, metrics = sums
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


def compile_step(recipe: Recipe, mesh: Mesh, parallel: str = "jit") -> CompiledStep:
    """``train_step`` over the mesh: batch split over devices, state whole on each and donated.

    Under "jit" XLA splits the step of the global batch; under "pmap" each device takes the step of
    its share, with explicit sums over devices. Both take the same global batch, from the host or
    already split over the mesh, and give the same result.
    """
    return {"jit": _jit_step, "pmap": _pmap_step}[parallel](recipe, mesh)


def _jit_step(recipe: Recipe, mesh: Mesh) -> CompiledStep:
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(
        partial(train_step, recipe),
        in_shardings=(whole, split, whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )
    return CompiledStep(step, lambda batch: batch)


def _pmap_step(recipe: Recipe, mesh: Mesh) -> CompiledStep:
    # Under the mesh's own name for the axis the state comes back in the mesh's own sharding, so
    # whatever else is compiled over the mesh takes it as it is.
    step = jax.pmap(
        partial(train_step, recipe, axis_name="data"),
        axis_name="data",
        in_axes=(None, 0, None),
        out_axes=None,
        devices=list(mesh.devices.flat),
        donate_argnums=0,
    )

    def shares(batch):
        return jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)

    return CompiledStep(step, shares)
