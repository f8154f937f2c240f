"""Which part of every array lies on which device."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ddpm.runtime import devices
from jax_ddpm.training.state import TrainState

# An array of fewer elements is not worth a program, or a collective, of its own.
SMALL = 2**12


def fsdp_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Splits the longest axis that "fsdp" divides; small and indivisible arrays stay whole."""
    fsdp = mesh.shape.get("fsdp", 1)
    axes = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or not axes or np.prod(shape) < SMALL:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * longest, "fsdp")


def spread(state: TrainState, mesh: Mesh) -> TrainState:
    """Splits parameters, averages and optimiser over "fsdp"; all else is whole on every device."""
    whole: Any = devices.whole(mesh)
    split = TrainState(
        step=whole,
        params=shardings(state.params, mesh),
        ema=shardings(state.ema, mesh),
        opt_state=shardings(state.opt_state, mesh),
        extra=whole,
    )
    return devices.place(state, split)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array of parameters."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, fsdp_spec(np.shape(leaf), mesh)), tree)
