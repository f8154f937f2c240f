"""The train step compiled once over a mesh of all devices, by jit or by pmap."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from jax_ddpm.runtime import devices
from jax_ddpm.tasks.objective import Metrics
from jax_ddpm.tasks.recipe import Recipe
from jax_ddpm.training.gradients import mean_gradients
from jax_ddpm.training.layout import fsdp_spec, shardings
from jax_ddpm.training.state import TrainState
from jax_ddpm.training.step import Held, train_step


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
        devices.place(frozen, shardings(frozen, mesh)),
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
