"""The train step: a pure function of (state, batch), compiled once over a mesh of all devices.

The mean gradient is mapped over the devices with every collective written out. Parameters that are
split over "fsdp" are gathered before use; the transpose of that sums and scatters their gradients.
Gradients are summed over the other devices. The update that follows works on whole arrays element
by element, so XLA does it wherever an element lies.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jax_ddpm.keys import StepKeys, Stream, numbered_key
from jax_ddpm.runtime import devices
from jax_ddpm.tasks.objective import Metrics
from jax_ddpm.tasks.recipe import Phase, Recipe
from jax_ddpm.training.state import TrainState, readable

# An array of fewer elements is not worth a program, or a collective, of its own.
_SMALL = 2**12


class Held(NamedTuple):
    """What lies on the devices from step to step and never changes.

    Attributes:
      data: whole sets, from which ``batch["index"]`` picks the examples; {} where the batch holds
        them itself.
      frozen: the parameters of frozen networks by name.
    """

    data: dict[str, Any]
    frozen: dict[str, Any]


class CompiledStep(NamedTuple):
    """(state, batches, seed) → (state, metrics), of one or several steps in a row.

    Each array of ``batches`` is ``[steps, batch, …]``: this process's rows of every global batch
    from the host, or global arrays that are already split over the mesh. Each metric is
    ``[steps]``.

    ``program`` is the result of jit or pmap, ``arrange`` brings batches into its shape.
    """

    program: jax.stages.Wrapped
    arrange: Callable[[dict[str, Any]], dict[str, Any]]
    held: Held

    def __call__(
        self, state: TrainState, batches: dict[str, Any], seed: Any
    ) -> tuple[TrainState, Metrics]:
        return self.program(state, self.held, self.arrange(batches), seed)

    def lower(self, state: TrainState, batches: dict[str, Any], seed: Any) -> jax.stages.Lowered:
        """The program before it is compiled, for asking what it will need."""
        return self.program.lower(state, self.held, self.arrange(batches), seed)


def train_steps(
    step: Callable[..., tuple[TrainState, Metrics]],
    state: TrainState,
    held: Held,
    batches: dict[str, Array],
    seed: Any,
) -> tuple[TrainState, Metrics]:
    """One step for each batch, all in one program, so that no step waits for the host."""

    def one(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        return step(state, held, batch, seed)

    steps = len(jax.tree.leaves(batches)[0])
    # A single step compiles sooner outside of a loop.
    return jax.lax.scan(one, state, batches, unroll=steps == 1)


def mean_gradients(
    phase: Phase,
    accumulate: int,
    trained: dict[str, Any],
    read: dict[str, Any],
    extra: Any,
    data: dict[str, Array],
    batch: dict[str, Array],
    seed: Any,
    step: Array,
    axes: tuple[str, ...] = (),
    layout: Any = None,
) -> tuple[Any, Metrics, Any]:
    """Gradients of the mean loss over the global batch; metrics, as sums over it; the new extra.

    The gradients are those of ``trained``; the objective also gets what it only reads. ``data`` is
    that of ``Held``. The batch is taken in ``accumulate`` parts in turn.

    ``batch`` is this device's share of the global batch where this is mapped over the mesh axes
    ``axes``: the next examples after those of the device before. Arrays that ``layout``, a
    PartitionSpec for each one trained or read, splits over "fsdp" come as the device's part, and so
    do their gradients.
    """
    examples = {name: of[batch["index"]] for name, of in data.items()} or batch
    keys = _step_keys(seed, step, len(jax.tree.leaves(examples)[0]), axes)

    def share_of_mean(trained, extra, part, part_keys):
        everything = read | trained
        if layout is not None:
            everything = jax.tree.map(_gather, everything, layout)
        loss, metrics, extra = phase.objective(everything, extra, part, part_keys, step)
        metrics = {"loss": (loss, jnp.ones_like(loss))} | metrics
        return loss.sum() / keys.batch_size, (jax.tree.map(jnp.sum, metrics), extra)

    if layout is not None:
        share_of_mean = jax.checkpoint(share_of_mean, policy=_keep_ungathered)

    def part_gradients(extra, part):
        examples, index = part
        gradients, (metrics, extra) = jax.grad(share_of_mean, has_aux=True)(
            trained, extra, examples, keys.take(index)
        )
        return extra, (gradients, metrics)

    def add_part(carry, part):
        extra, sums = carry
        extra, more = part_gradients(extra, part)
        return (extra, jax.tree.map(jnp.add, sums, more)), None

    # A micro-batch is every accumulate-th example, and so spread over all devices.
    parts = jax.tree.map(
        lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), (examples, keys.index)
    )
    # The first part stays out of the loop: XLA's CPU backend runs the gradients of convolutions
    # many times slower in a loop (jax issue 12868).
    carry = part_gradients(extra, jax.tree.map(lambda x: x[0], parts))
    if accumulate > 1:
        carry, _ = jax.lax.scan(add_part, carry, jax.tree.map(lambda x: x[1:], parts))
    extra, (gradients, metrics) = carry
    if axes:
        metrics = jax.lax.psum(metrics, axes)
        whole = jax.tree.map(lambda _: PartitionSpec(), trained)
        trained_layout = whole if layout is None else {name: layout[name] for name in trained}
        gradients = jax.tree.map(partial(_sum_over, axes), gradients, trained_layout)
    return gradients, metrics, extra


def train_step(
    recipe: Recipe,
    state: TrainState,
    held: Held,
    batch: dict[str, Array],
    seed: Any,
    gradients_of: Callable[..., tuple[Any, Metrics, Any]] = mean_gradients,
) -> tuple[TrainState, Metrics]:
    """One update from a global batch, as ``mean_gradients`` takes it, under the run's seed key.

    A loss or gradient that is not finite stops all updates from its phase on, except the step
    count, and puts the metric ``finite`` below 1.
    """
    params, opt_state, extra = dict(state.params), list(state.opt_state), list(state.extra)
    metrics: Metrics = {}
    finite = jnp.array(True)

    for i, phase in enumerate(recipe.phases):
        known = readable(params, state.ema, held.frozen)
        read = {name: known[name] for name in phase.reads}
        keys = numbered_key(seed, Stream.PHASE, i)

        def update(before: PhaseState, phase=phase, read=read, keys=keys) -> _Updated:
            gradients, metrics, extra = gradients_of(
                phase,
                recipe.accumulate,
                before.params,
                read,
                before.extra,
                held.data,
                batch,
                keys,
                state.step,
            )
            return _update(phase, before, gradients, extra, metrics, state.step)

        before = PhaseState({n: params[n] for n in phase.trains}, opt_state[i], extra[i], finite)
        after, phase_metrics = _at_multiples_of(phase.every, state.step, update, before)
        params |= after.params
        opt_state[i], extra[i], finite = after.opt_state, after.extra, after.finite
        prefix = "" if len(recipe.phases) == 1 else f"{phase.name}/"
        metrics |= {prefix + name: metric for name, metric in phase_metrics.items()}

    with jax.named_scope("averages"):
        ema = {
            name: _moving_average(
                state.ema[name], params[average.source], average.decay(state.step), finite
            )
            for name, average in recipe.averages.items()
        }
    metrics["parameter_norm"] = _single(_norm(params))
    metrics["finite"] = _single(finite.astype(jnp.float32))
    return TrainState(state.step + 1, params, ema, tuple(opt_state), tuple(extra)), metrics


class PhaseState(NamedTuple):
    """What a phase changes: what it trains, its optimiser, its memory; whether all was finite."""

    params: dict[str, Any]
    opt_state: Any
    extra: Any
    finite: Array


_Updated = tuple[PhaseState, Metrics]


def _update(
    phase: Phase, before: PhaseState, gradients: Any, extra: Any, metrics: Metrics, step: Array
) -> _Updated:
    """The phase after one step along its gradients, unless something is not finite."""
    norm, (loss, _) = _norm(gradients), metrics["loss"]
    finite = before.finite & jnp.isfinite(norm) & jnp.isfinite(loss)
    with jax.named_scope("optimiser"):
        updates, opt_state = phase.optimiser.update(
            gradients, before.opt_state, before.params, norm=norm, finite=finite
        )
        params = phase.project(optax.apply_updates(before.params, updates))
    extra = jax.tree.map(lambda new, old: jnp.where(finite, new, old), extra, before.extra)
    metrics |= {"gradient_norm": _single(norm), "learning_rate": _single(phase.learning_rate(step))}
    return PhaseState(params, opt_state, extra, finite), metrics


def _at_multiples_of(
    every: int, step: Array, update: Callable[[PhaseState], _Updated], before: PhaseState
) -> _Updated:
    """The update at every ``every``-th step; at others nothing changes and no metric has weight."""
    if every == 1:
        return update(before)

    def skip(before: PhaseState) -> _Updated:
        _, metrics = jax.eval_shape(update, before)
        return before, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)

    return jax.lax.cond(step % every == 0, update, skip, before)


def _step_keys(seed: Any, step: Array, share: int, axes: tuple[str, ...]) -> StepKeys:
    """The keys of this device's share of the global batch: all of it if nothing is mapped."""
    if not axes:
        return StepKeys(seed, step, jnp.arange(share), share)
    index = jax.lax.axis_index(axes) * share + jnp.arange(share)
    return StepKeys(seed, step, index, share * jax.lax.axis_size(axes), axes)


def _gather(part: Array, spec: PartitionSpec) -> Array:
    if "fsdp" not in spec:
        return part
    return jax.lax.all_gather(part, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True)


def _keep_ungathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps all except gathered (and cast) parameters. The backward pass gathers them again, so
    that no device keeps the whole network meanwhile."""
    return primitive not in (jax.lax.all_gather_p, jax.lax.convert_element_type_p)


def _sum_over(axes: tuple[str, ...], gradient: Array, spec: PartitionSpec) -> Array:
    """Sums over the devices that hold the same elements; ``_gather`` has summed over "fsdp"."""
    return jax.lax.psum(gradient, tuple(axis for axis in axes if axis not in spec))


def _single(value: Any) -> tuple[Array, Array]:
    return jnp.asarray(value, jnp.float32), jnp.ones(())


def _norm(tree: Any) -> Array:
    """The norm of all arrays as one vector, with the many small ones joined first."""
    arrays = jax.tree.leaves(tree)
    large = [array for array in arrays if array.size >= _SMALL]
    small = [jnp.ravel(array) for array in arrays if array.size < _SMALL]
    joined = jnp.concatenate([jnp.zeros(0), *small])
    return jnp.sqrt(sum(jnp.sum(array**2) for array in [joined, *large]))


def _moving_average(average: Any, params: Any, decay: Any, finite: Array) -> Any:
    @jax.jit  # traced only once for all arrays of a shape
    def one(a: Array, p: Array) -> Array:
        return jnp.where(finite, a + (1 - decay) * (p - a), a)

    return jax.tree.map(one, average, params)


def fsdp_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Splits the longest axis that "fsdp" divides; small and indivisible arrays stay whole."""
    fsdp = mesh.shape.get("fsdp", 1)
    axes = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or not axes or np.prod(shape) < _SMALL:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * longest, "fsdp")


def spread(state: TrainState, mesh: Mesh) -> TrainState:
    """Splits parameters, averages and optimiser over "fsdp"; all else is whole on every device."""
    whole: Any = devices.whole(mesh)
    shardings = TrainState(
        step=whole,
        params=_shared(state.params, mesh),
        ema=_shared(state.ema, mesh),
        opt_state=_shared(state.opt_state, mesh),
        extra=whole,
    )
    return devices.place(state, shardings)


def _shared(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array of parameters."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, fsdp_spec(np.shape(leaf), mesh)), tree)


def compile_step(
    recipe: Recipe,
    state: TrainState,
    mesh: Mesh,
    parallel: str = "jit",
    data: dict[str, Any] | None = None,
) -> CompiledStep:
    """``train_step`` over the mesh: batch split over devices, the state donated.

    The state comes back in the layout of ``state``. ``data`` is put whole on every device, and the
    recipe's frozen networks are split as parameters are. "jit" maps the gradients over the mesh and
    lets XLA split the update; "pmap" makes each device do all of a step for its share, with the
    state whole on it. Both take the same batches and give the same result.
    """
    frozen = {name: network.params for name, network in recipe.frozen.items()}
    held = Held(
        devices.place(data or {}, devices.whole(mesh)),
        devices.place(frozen, _shared(frozen, mesh)),
    )
    return {"jit": _jit_step, "pmap": _pmap_step}[parallel](recipe, state, mesh, held)


def _jit_step(recipe: Recipe, state: TrainState, mesh: Mesh, held: Held) -> CompiledStep:
    whole, shared = PartitionSpec(), PartitionSpec(mesh.axis_names)

    # XLA's CPU backend makes a copy for a sum over one device alone.
    axes = tuple(axis for axis, size in mesh.shape.items() if size > 1)

    def gradients_of(phase, accumulate, trained, read, *rest):
        layouts = [
            jax.tree.map(lambda leaf: fsdp_spec(leaf.shape, mesh), tree) for tree in (trained, read)
        ]
        mapped = jax.shard_map(
            partial(
                mean_gradients,
                phase,
                accumulate,
                axes=axes,
                layout=layouts[0] | layouts[1] if "fsdp" in axes else None,
            ),
            mesh=mesh,
            in_specs=(*layouts, whole, whole, shared, whole, whole),
            out_specs=(layouts[0], whole, whole),
            check_vma=False,
        )
        return mapped(trained, read, *rest)

    laid_out, frozen = jax.tree.map(lambda leaf: leaf.sharding, (state, held.frozen))
    everywhere: Any = devices.whole(mesh)
    split = devices.split(mesh, axis=1)
    step = jax.jit(
        partial(train_steps, partial(train_step, recipe, gradients_of=gradients_of)),
        in_shardings=(laid_out, Held(everywhere, frozen), split, everywhere),
        out_shardings=(laid_out, everywhere),
        donate_argnums=0,
    )
    return CompiledStep(step, lambda batches: devices.place_rows(batches, split), held)


def _pmap_step(recipe: Recipe, state: TrainState, mesh: Mesh, held: Held) -> CompiledStep:
    gradients_of = partial(mean_gradients, axes=("data",))
    # The mesh's own name for the axis brings the state back in the mesh's own sharding, so that
    # whatever else is compiled over the mesh takes it unchanged.
    step = jax.pmap(
        partial(train_steps, partial(train_step, recipe, gradients_of=gradients_of)),
        axis_name="data",
        in_axes=(None, None, 1, None),
        out_axes=None,
        devices=list(mesh.devices.flat),
        donate_argnums=0,
    )

    def shares(batches):
        return jax.tree.map(lambda x: x.reshape(len(x), mesh.size, -1, *x.shape[2:]), batches)

    return CompiledStep(step, shares, held)
