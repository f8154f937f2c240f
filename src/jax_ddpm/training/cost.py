"""The cost of a train step, counted before anything runs, and its predicted time.

experiments/scaling.py checks the counts against compiled programs; docs/scaling.md has the formulas
and the predictions.
"""

import math
import re
from collections import defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jax_ddpm.keys import StepKeys
from jax_ddpm.tasks.recipe import Phase, Recipe
from jax_ddpm.training.arithmetic import (
    activation_bytes,
    array_bytes,
    product_bytes,
    product_flops,
    total_of,
)
from jax_ddpm.training.layout import fsdp_spec
from jax_ddpm.training.state import TrainState, readable

# XLA joins collectives into one up to this many bytes (collective_utils.h).
_JOINED_BYTES = 30 * 2**20
# Normalisation and the rest read or write an activation as often as the products do.
_ELEMENTWISE = 2


# These options make XLA's CPU backend keep the collectives that others have. Up to jaxlib 0.10 it
# otherwise joins the gathers for the forward and for the backward pass.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander,optimization-barrier-expander"}
# XLA's form of a range of devices, reshaped and transposed.
_RANGE = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


class Collective(NamedTuple):
    """A collective operation among ``group`` devices, each ``stride`` devices from the next."""

    kind: str  # all-reduce | all-gather | reduce-scatter
    group: int
    stride: int = 1

    @property
    def passes(self) -> int:
        """How often the data goes round: an all-reduce scatters sums, then gathers them."""
        return 2 if self.kind == "all-reduce" else 1

    def sent(self, volume: int) -> float:
        """Bytes that each device sends, by algorithms that send the least possible.

        ``volume`` is the bytes of the whole array: summed, gathered, or before it is scattered
        (Patarasuk & Yuan 2009).
        """
        return self.passes * volume * (self.group - 1) / self.group


Volumes = dict[Collective, int]


class Work(NamedTuple):
    """The work of a device on its share of the batch.

    Attributes:
      flops: of convolutions and matrix products, recomputed ones included.
      product_bytes: operands and results of those, read or written once for each.
      activation_bytes: kept for the backward pass.
    """

    flops: int
    product_bytes: int
    activation_bytes: int


class StepCost(NamedTuple):
    """The cost of one train step on each device, and of one checkpoint.

    Attributes:
      state_bytes: parameters, averages, optimiser, and frozen networks.
      update_bytes: read and written by the optimiser and the averages.
      volumes: bytes of the arrays that pass through each kind of collective.
      checkpoint_bytes: of the whole state, once.
    """

    work: Work
    state_bytes: int
    update_bytes: int
    volumes: Volumes
    checkpoint_bytes: int


class Machine(NamedTuple):
    """A device and its links to others; bandwidths in bytes/s, of links as sent by one device.

    Attributes:
      flops: peak of matrix products in bfloat16, per second.
      memory, memory_bandwidth: of the device.
      domain: devices that fast links join: a node or a pod.
      link, outer_link: bandwidth within the domain and beyond it.
      latency, outer_latency: seconds for one pass of the smallest message over a domain, and
        between domains.
      flops_share, bandwidth_share: shares of the peaks that programs reach.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    domain: int
    link: float
    outer_link: float
    latency: float
    outer_latency: float
    flops_share: float = 0.5
    bandwidth_share: float = 0.8


class StepTime(NamedTuple):
    """Seconds of a step, and the parts that add up to it."""

    seconds: float
    parts: dict[str, float]

    @property
    def bound(self) -> str:
        """The largest part."""
        return max(self.parts, key=self.parts.__getitem__)


def gradient_work(recipe: Recipe, state: TrainState, batch: dict[str, Any]) -> Work:
    """The work of all gradients of a step, from shapes alone.

    ``batch`` is one device's share of one micro-batch.
    """
    rows = len(jax.tree.leaves(batch)[0])
    seed = jax.eval_shape(lambda: jax.random.key(0))
    works = []
    for phase, extra in zip(recipe.phases, state.extra, strict=True):

        def loss(trained, read, extra, batch, seed, step, phase=phase):
            keys = StepKeys(seed, step, jnp.arange(rows), rows)
            losses, _, _ = phase.objective(read | trained, extra, batch, keys, step)
            return losses.sum()

        arguments = *_parts(recipe, state, phase), extra, batch, seed, state.step
        gradients = jax.make_jaxpr(jax.grad(loss))(*arguments).jaxpr
        works.append(
            Work(
                recipe.accumulate * total_of(gradients, product_flops),
                recipe.accumulate * total_of(gradients, product_bytes),
                activation_bytes(loss, *arguments),
            )
        )
    flops, traffic, activations = zip(*works, strict=True)
    return Work(sum(flops), sum(traffic), max(activations))


def step_cost(recipe: Recipe, state: TrainState, work: Work, mesh: Mesh | AbstractMesh) -> StepCost:
    """The cost of a train step with its state, of arrays or only shapes, spread over ``mesh``."""
    volumes: Volumes = defaultdict(int)
    for phase in recipe.phases:
        trained, read = _parts(recipe, state, phase)
        for collective, volume in gradient_volumes(trained, mesh, recipe.accumulate, read).items():
            volumes[collective] += volume
    held = state.params, state.ema, state.opt_state
    return StepCost(
        work,
        state_bytes=_held_bytes((held, _frozen(recipe)), mesh),
        # The optimiser reads and writes the state; the gradient is read for its norm and for the
        # update, the parameters for their norm.
        update_bytes=2 * _held_bytes(held, mesh) + 3 * _held_bytes(state.params, mesh),
        volumes=dict(volumes),
        checkpoint_bytes=sum(map(array_bytes, jax.tree.leaves(held))),
    )


def _parts(
    recipe: Recipe, state: TrainState, phase: Phase
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a phase trains, and what it reads."""
    known = readable(state.params, state.ema, _frozen(recipe))
    trained, read = ({name: known[name] for name in names} for names in (phase.trains, phase.reads))
    return trained, read


def _frozen(recipe: Recipe) -> dict[str, Any]:
    return {name: network.params for name, network in recipe.frozen.items()}


def predict(cost: StepCost, machine: Machine) -> StepTime:
    """The seconds of a step, with no communication hidden behind arithmetic."""
    bandwidth = machine.memory_bandwidth * machine.bandwidth_share
    arithmetic = cost.work.flops / (machine.flops * machine.flops_share)
    traffic = _ELEMENTWISE * cost.work.product_bytes / bandwidth
    parts = {
        "arithmetic" if arithmetic > traffic else "memory": max(arithmetic, traffic),
        "update": cost.update_bytes / bandwidth,
        "collectives": sum(
            collective_seconds(collective, volume, machine)
            for collective, volume in cost.volumes.items()
        ),
    }
    return StepTime(sum(parts.values()), parts)


def collective_seconds(collective: Collective, volume: int, machine: Machine) -> float:
    """The time within each domain, then of each device's rest between the domains."""
    inner = min(collective.group, max(1, machine.domain // collective.stride))
    outer = collective.group // inner
    seconds = volume * (inner - 1) / inner / machine.link
    seconds += volume / inner * (outer - 1) / outer / machine.outer_link
    latency = (inner > 1) * machine.latency + (outer > 1) * machine.outer_latency
    messages = math.ceil(volume / _JOINED_BYTES)
    return collective.passes * (seconds / machine.bandwidth_share + messages * latency)


def gradient_volumes(
    trained: Any, mesh: Mesh | AbstractMesh, accumulate: int = 1, read: Any = ()
) -> Volumes:
    """Bytes through each collective of a phase; scalars for metrics and norms count nothing.

    Arrays split over "fsdp" are gathered once for all forward passes and once for each
    micro-batch's backward pass, and each micro-batch's gradients summed and scattered; the parts
    are then summed over the other devices. All other gradients are summed over all devices. What is
    only read is gathered as often, or less where no gradient passes through it.
    """
    fsdp = mesh.shape.get("fsdp", 1)
    volumes: Volumes = defaultdict(int)
    for leaf in filter(lambda leaf: _is_split(leaf, mesh), jax.tree.leaves(read)):
        volumes[Collective("all-gather", fsdp)] += (1 + accumulate) * array_bytes(leaf)
    for leaf in jax.tree.leaves(trained):
        if _is_split(leaf, mesh):
            volumes[Collective("all-gather", fsdp)] += (1 + accumulate) * array_bytes(leaf)
            volumes[Collective("reduce-scatter", fsdp)] += accumulate * array_bytes(leaf)
            across = Collective("all-reduce", mesh.size // fsdp, stride=fsdp)
            volumes[across] += array_bytes(leaf) // fsdp
        else:
            volumes[Collective("all-reduce", mesh.size)] += array_bytes(leaf)
    return {each: volume for each, volume in volumes.items() if each.group > 1}


def compiled_volumes(text: str) -> Volumes:
    """The same, read from a module compiled with ``COMPILER_OPTIONS`` by XLA's CPU backend.

    Collectives in a loop count as often as it runs.

    Raises:
      ValueError: where collectives lie in a loop of unknown length.
    """
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = found[2]
            entry = name if found[1] else entry
            computations[name] = []
        elif name:
            computations[name].append(line)

    def volumes_of(computation: str) -> Volumes:
        volumes: Volumes = defaultdict(int)
        for line in computations[computation]:
            if collective := _read_collective(line):
                volumes[collective[0]] += collective[1]
            for callee in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                for key, volume in volumes_of(callee).items():
                    volumes[key] += _read_runs(line) * volume
        return volumes

    return {each: volume for each, volume in volumes_of(entry).items() if each.group > 1}


def _read_runs(line: str) -> int:
    if " while(" not in line:
        return 1
    count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if count is None:
        raise ValueError(f"a loop of unknown length holds collectives: {line.strip()[:80]}")
    return int(count[1])


def _read_collective(line: str) -> tuple[Collective, int] | None:
    found = re.search(r"= (.*?) (all-reduce|all-gather|reduce-scatter)\(", line)
    if found is None:
        return None
    devices = _read_groups(line)
    group = devices.shape[1]
    stride = int(devices[0, 1] - devices[0, 0]) if group > 1 else 1
    arrays = re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", found[1])
    volume = sum(int(bits) // 8 * math.prod(_numbers(shape)) for bits, shape in arrays)
    if found[2] == "reduce-scatter":
        volume *= group
    return Collective(found[2], group, stride), volume


def _read_groups(line: str) -> np.ndarray:
    """The devices ``[groups, devices]``: written out, a transposed range, or axes of a mesh."""
    if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={_RANGE}", line):
        return _read_range(found[2], found[3]).reshape(_numbers(found[1]))
    mesh = rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({_RANGE}\))? \{{(.*?)\}}"
    found = re.search(mesh, line)
    assert found, line
    axes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
    lengths = [int(length) for length in axes.values()]
    devices = _read_range(found[2] or str(math.prod(lengths)), found[3]).reshape(lengths)
    across = [i for i, axis in enumerate(axes) if axis in found[4]]
    size = math.prod(lengths[i] for i in across)
    return np.moveaxis(devices, across, range(-len(across), 0)).reshape(-1, size)


def _read_range(shape: str, order: str | None) -> np.ndarray:
    lengths = _numbers(shape)
    devices = np.arange(math.prod(lengths)).reshape(lengths)
    return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _is_split(leaf: Any, mesh: Mesh | AbstractMesh) -> bool:
    return "fsdp" in fsdp_spec(leaf.shape, mesh)  # type: ignore[arg-type]


def _held_bytes(tree: Any, mesh: Mesh | AbstractMesh) -> int:
    """The bytes of a tree on one device."""
    fsdp = mesh.shape.get("fsdp", 1)
    return sum(
        array_bytes(leaf) // (fsdp if _is_split(leaf, mesh) else 1)
        for leaf in jax.tree.leaves(tree)
    )
