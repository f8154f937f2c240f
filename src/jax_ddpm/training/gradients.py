"""The mean gradient over the global batch.

It is mapped over the devices with every collective written out. Parameters that are split over
"fsdp" are gathered before use; the transpose of that sums and scatters their gradients. Gradients
are summed over the other devices.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jax_ddpm.errors import UserError
from jax_ddpm.keys import StepKeys
from jax_ddpm.tasks.objective import Metrics
from jax_ddpm.tasks.recipe import Phase

# Metrics that training itself logs.
RESERVED = {"loss", "gradient_norm", "learning_rate", "parameter_norm", "finite"}


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
        loss, metrics, after = phase.objective(everything, extra, part, part_keys, step)
        _check_output(phase, loss, metrics, after, extra, part_keys.index.shape)
        metrics, extra = {"loss": (loss, jnp.ones_like(loss))} | metrics, after
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


def _step_keys(seed: Any, step: Array, share: int, axes: tuple[str, ...]) -> StepKeys:
    """The keys of this device's share of the global batch: all of it if nothing is mapped."""
    if not axes:
        return StepKeys(seed, step, jnp.arange(share), share)
    index = jax.lax.axis_index(axes) * share + jnp.arange(share)
    return StepKeys(seed, step, index, share * jax.lax.axis_size(axes), axes)


def _check_output(
    phase: Phase, loss: Any, metrics: Any, after: Any, before: Any, batch: tuple[int, ...]
) -> None:
    """Raises UserError, while the step is traced, where an objective gives what it must not."""
    where = f"the objective of phase {phase.name}"
    if jnp.shape(loss) != batch:
        raise UserError(f"{where}: its loss is {jnp.shape(loss)}; it must be one per example")
    if taken := ", ".join(RESERVED & metrics.keys()):
        raise UserError(f"{where}: rename its metric {taken}: training has one of that name")
    for name, metric in metrics.items():
        if not (isinstance(metric, tuple) and [jnp.shape(part) for part in metric] == [batch] * 2):
            raise UserError(f"{where}: its metric {name} must be values and weights per example")
    require_alike(f"{where}: its extra", after, before, "init() gives")


def require_alike(what: str, found: Any, needed: Any, of: str) -> None:
    """Raises UserError where two trees differ in their names, shapes or dtypes."""

    def described(tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]

    if described(found) != described(needed):
        raise UserError(f"{what} is not of the names, shapes and dtypes that {of}")


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
