"""All devices of all processes as one mesh, and the layout of arrays on it.

Examples are split over all axes of the mesh: "data" and, if the train state is split as well,
"fsdp" (fully sharded data parallelism: Rajbhandari et al. 2020, Zhao et al. 2023).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from jax_ddpm.errors import UserError


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices or these; ``fsdp`` neighbours share each large array of the state."""
    count = jax.device_count() if devices is None else len(devices)
    axes = {"data": count // fsdp} | ({"fsdp": fsdp} if fsdp > 1 else {})
    auto = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto, devices=devices)


def whole(mesh: Mesh) -> NamedSharding:
    """The sharding that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding that splits examples, which lie along ``axis``, over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The next multiple of the number of devices.

    Raises:
      UserError: where it is less than 1.
    """
    if batch_size < 1:
        raise UserError(f"--sample_batch={batch_size}: it must be at least 1")
    return -(-batch_size // mesh.size) * mesh.size


def place(tree: Any, sharding: Any) -> Any:
    """Lays out arrays that every process holds whole, or that already lie on the devices.

    ``sharding`` is one for all, or a tree of them (or of its upper part).
    """
    if all(part.is_fully_addressable for part in jax.tree.leaves(sharding)):
        return jax.device_put(tree, sharding)

    def lay_out(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf if leaf.sharding == sharding else _relay(leaf, sharding)
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = lay_out(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def lay_out_all(sharding: NamedSharding, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: lay_out(leaf, sharding), tree)

    return jax.tree.map(lay_out_all, sharding, tree)


def fetch(tree: Any) -> Any:
    """Arrays on the devices as NumPy, whole on every process; all processes must ask for them."""

    def local(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return _relay(leaf, whole(leaf.sharding.mesh))  # type: ignore[attr-defined]
        return leaf

    return jax.device_get(jax.tree.map(local, tree))


def _relay(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.jit(lambda x: x, out_shardings=sharding)(array)


def compile_over(
    function: Callable, in_shardings: tuple[NamedSharding, ...], out_shardings: NamedSharding
) -> Callable:
    """``function`` compiled for arguments in this layout; each call places them so."""
    compiled = jax.jit(function, in_shardings=in_shardings, out_shardings=out_shardings)
    return lambda *arguments: compiled(*place(arguments, in_shardings))


def own_rows(sharding: NamedSharding, batch_size: int) -> Int[np.ndarray, " rows"]:
    """The places in a global batch whose examples lie on this process's devices, ascending."""
    rows = np.arange(batch_size)
    found = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([rows[index] for index in found]))


def place_rows(tree: Any, sharding: NamedSharding) -> Any:
    """Global arrays, to which each process contributes its ``own_rows``."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)
