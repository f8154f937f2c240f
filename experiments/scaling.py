"""The tables of docs/scaling.md: the cost model against compiled programs, and what it foretells.

    python experiments/scaling.py check
    python experiments/scaling.py tables

``check`` compiles train steps for 8 to 64 simulated CPU devices and notes their collectives,
arithmetic and memory beside the model's; nothing is run. Every case is added to
``experiments/results/scaling.json`` once it is compiled, and skipped if it is already there.
``tables`` adds the predictions and prints everything as Markdown.
"""

import argparse
import json
import pathlib
import runpy
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from ml_collections import ConfigDict

from jax_ddpm.data.source import image_spec
from jax_ddpm.evaluation.record import save_record
from jax_ddpm.factory import Model
from jax_ddpm.models.remat import REMAT_POLICIES
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.tasks.recipe import Recipe
from jax_ddpm.tasks.table import make_recipe
from jax_ddpm.training.compiled_step import compile_step
from jax_ddpm.training.cost import (
    COMPILER_OPTIONS,
    Machine,
    StepCost,
    Volumes,
    Work,
    compiled_volumes,
    gradient_work,
    predict,
    step_cost,
)
from jax_ddpm.training.layout import fsdp_spec
from jax_ddpm.training.state import TrainState, init_state

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments/results/scaling.json"

# Config, height and width of its images, and the fields that make it smaller.
NETWORKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "small": (
        "cifar10",
        8,
        {"base_channels": 64, "channel_multipliers": (1, 2), "num_res_blocks": 1},
    ),
    "CIFAR-10": ("cifar10", 32, {}),
    "256×256": ("celebahq256", 256, {}),
}
# Network, devices, number of them that share the state, micro-batches.
LAYOUTS = [
    *[("small", count, fsdp, 1) for count in (8, 16, 32, 64) for fsdp in (1, 8)],
    ("small", 64, 4, 3),
    *[("CIFAR-10", count, fsdp, 1) for count in (8, 64) for fsdp in (1, 8)],
]
GLOBAL_BATCH = {"small": 192, "CIFAR-10": 128, "256×256": 64}
# Steps of the paper's runs.
RUNS = {
    "CIFAR-10": {"": 800_000},
    "256×256": {"CelebA-HQ ": 500_000, "church ": 1_200_000, "cat ": 1_800_000,
                "bedroom ": 2_400_000},
}  # fmt: skip
_GPU = Machine(
    flops=989e12,
    memory=80e9,
    memory_bandwidth=3.35e12,
    domain=8,
    link=450e9,
    outer_link=50e9,
    latency=10e-6,
    outer_latency=20e-6,
)
_TPU = Machine(
    flops=197e12,
    memory=16e9,
    memory_bandwidth=819e9,
    domain=256,
    link=90e9,
    outer_link=3.125e9,
    latency=16e-6,
    outer_latency=100e-6,
)
MACHINES = {
    "H100": _GPU,
    "H200": _GPU._replace(memory=141e9, memory_bandwidth=4.8e12),
    "TPU v5e": _TPU,
    "TPU v6e": _TPU._replace(
        flops=918e12, memory=32e9, memory_bandwidth=1638e9, link=180e9, outer_link=12.5e9
    ),
}
DEVICES = {"H100": (8,), "H200": (8,), "TPU v5e": (8, 16, 32, 64, 128), "TPU v6e": (8, 32, 128)}
# Bytes/s, assumed: from one device to its host, and from one host to its disk or bucket.
TO_HOST, STORAGE = 15e9, 1e9
POLICIES = ("", *REMAT_POLICIES)


class Setting(NamedTuple):
    """The training, as shapes."""

    recipe: Recipe
    state: TrainState


@cache
def make_setting(
    network: str, dtype: str = "float32", remat: str = "", accumulate: int = 1
) -> Setting:
    """The recipe and the shapes of the state."""
    name, size, fields = NETWORKS[network]
    config: ConfigDict = runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"]()
    config.model.update(fields)
    config.model.update(dtype=dtype, remat=remat)
    sizes = {"train": 50_000, "heldout": 1000}
    model = Model(config, image_spec((size, size, 3), 256, 0, sizes, name))
    recipe = make_recipe(config, model)._replace(accumulate=accumulate)
    params = {name: each.init(jax.random.key(0)) for name, each in recipe.networks.items()}
    state = jax.eval_shape(partial(init_state, recipe), params)
    return Setting(recipe, state)


def make_batch(network: str, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of a batch."""
    size = NETWORKS[network][1]
    return {"image": jax.ShapeDtypeStruct((*shape, size, size, 3), jnp.uint8)}


@cache
def make_work(network: str, rows: int, **options: Any) -> Work:
    """The work of a device with ``rows`` images in a micro-batch, extrapolated from one and two."""
    if rows <= 2:
        setting = make_setting(network, **options)
        return gradient_work(setting.recipe, setting.state, make_batch(network, rows))
    one, two = (make_work(network, count, **options) for count in (1, 2))
    return Work(*(a + (rows - 1) * (b - a) for a, b in zip(one, two, strict=True)))


def compile_program(network: str, batch_size: int, devices: int, fsdp: int = 1, **options: Any):
    """The train step, compiled from the shapes of its arguments alone.

    Its machine code is not optimised: that takes most of the time, and changes nothing that is read
    here.
    """
    setting, mesh = make_setting(network, **options), make_mesh(fsdp, jax.devices()[:devices])

    def laid_out(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, fsdp_spec(leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(laid_out, setting.state)
    batch = make_batch(network, 1, batch_size)
    seed = jax.eval_shape(lambda: jax.random.key(0))
    step = compile_step(setting.recipe, state, mesh)
    return step.program.lower(state, step.held, batch, seed).compile(
        COMPILER_OPTIONS
        | {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    )


def check_layout(network: str, devices: int, fsdp: int, accumulate: int) -> dict[str, Any]:
    """Collectives, arithmetic and memory of a device: predicted and compiled."""
    batch_size = GLOBAL_BATCH[network]
    cost = abstract_cost(network, batch_size // devices, devices, fsdp, accumulate=accumulate)
    program = compile_program(network, batch_size, devices, fsdp, accumulate=accumulate)
    memory = program.memory_analysis()
    return {
        "sent_bytes": sent_by_kind(cost.volumes),
        "compiled_sent_bytes": sent_by_kind(compiled_volumes(program.as_text())),
        "flops": cost.work.flops,
        "compiled_flops": program.cost_analysis()["flops"],
        "state_bytes": cost.state_bytes,
        "compiled_argument_bytes": memory.argument_size_in_bytes,
        "compiled_temporary_bytes": memory.temp_size_in_bytes,
    }


def abstract_cost(
    network: str, batch_size: int, devices: int, fsdp: int, **options: Any
) -> StepCost:
    """The cost of a step on so many devices, with ``batch_size`` images each."""
    setting = make_setting(network, **options)
    mesh = AbstractMesh((devices // fsdp, fsdp), ("data", "fsdp"))
    work = make_work(network, batch_size // setting.recipe.accumulate, **options)
    return step_cost(setting.recipe, setting.state, work, mesh)


def sent_by_kind(volumes: Volumes) -> dict[str, float]:
    """Bytes that a device sends, by kind of collective and number of devices in it."""
    return {
        f"{each.kind} over {each.group}": each.sent(volume)
        for each, volume in sorted(volumes.items())
    }


def check() -> None:
    """Adds all cases to the results."""
    jax.config.update("jax_num_cpu_devices", 64)
    for layout in LAYOUTS:
        fields = dict(zip(("network", "devices", "fsdp", "accumulate"), layout, strict=True))
        results = load()
        rows = results.setdefault("layouts", [])
        if not any(fields.items() <= row.items() for row in rows):
            rows.append(fields | check_layout(*layout))
            save_record(RESULTS, results)
            print(json.dumps(rows[-1]), flush=True)


def load() -> dict[str, Any]:
    """The results so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("check", "tables"))
    {"check": check, "tables": tables}[parser.parse_args().part]()


def tables() -> None:
    """Prints every table and adds the predictions to the results."""
    results = load()
    print_layouts(results["layouts"])
    print_memory()
    results["predictions"] = [*predict_runs(), *predict_weak()]
    print_predictions(results["predictions"])
    print_breaks()
    save_record(RESULTS, results)


def print_layouts(rows: list[dict[str, Any]]) -> None:
    """Prints predicted and compiled counts, and the ratio of the compiled to the predicted."""
    print_row("network", "devices", "fsdp", "micro-batches", "MB sent", "compiled", "GFLOP")
    print_row(*["---"] * 7)
    for row in rows:
        sent, found = (sum(row[name].values()) for name in ("sent_bytes", "compiled_sent_bytes"))
        print_row(
            *(row[name] for name in ("network", "devices", "fsdp", "accumulate")),
            f"{sent / 1e6:.3f}",
            f"{found / 1e6:.3f}",
            f"{row['flops'] / 1e9:.2f} (×{row['compiled_flops'] / row['flops']:.3f})",
        )


def print_memory() -> None:
    """Prints the cost of one more image in the batch, under each policy."""
    print_row("network", *(remat or "none" for remat in POLICIES))
    print_row(*["---"] * (1 + len(POLICIES)))
    for network in RUNS:
        cells = []
        for remat in POLICIES:
            one, two = (
                make_work(network, count, dtype="bfloat16", remat=remat) for count in (1, 2)
            )
            kept = (two.activation_bytes - one.activation_bytes) / 1e6
            cells.append(f"{kept:,.0f} MB, {one.flops / 1e9:,.1f} GFLOP")
        print_row(network, *cells)


def predict_runs() -> list[dict[str, Any]]:
    """The paper's batch on more and more devices."""
    rows = []
    for network in RUNS:
        for machine, counts in DEVICES.items():
            for count in counts:
                if count <= GLOBAL_BATCH[network]:
                    rows.append(prediction(network, machine, count, GLOBAL_BATCH[network] // count))
    return rows


def predict_weak() -> list[dict[str, Any]]:
    """The same number of images on each device as on eight: the batch grows with the devices."""
    return [
        prediction(network, machine, count, GLOBAL_BATCH[network] // 8)
        for network in RUNS
        for machine in ("TPU v5e", "TPU v6e")
        for count in (256, 1024)
    ]


def prediction(network: str, machine: str, devices: int, batch_size: int) -> dict[str, Any]:
    """The better of two layouts: the state whole everywhere, or shared by eight."""
    options = []
    for fsdp in (1, 8):
        cost = abstract_cost(network, batch_size, devices, fsdp, dtype="bfloat16")
        options.append((predict(cost, MACHINES[machine]), fsdp, cost))
    found, fsdp, cost = min(options, key=lambda option: option[0].seconds)
    held = cost.state_bytes + cost.work.activation_bytes
    return {
        "network": network,
        "machine": machine,
        "devices": devices,
        "images_per_device": batch_size,
        "fsdp": fsdp,
        "milliseconds": {name: 1e3 * seconds for name, seconds in found.parts.items()},
        "steps_per_second": 1 / found.seconds,
        "images_per_second": devices * batch_size / found.seconds,
        "bound": found.bound,
        "memory_share": held / MACHINES[machine].memory,
    }


def print_predictions(rows: list[dict[str, Any]]) -> None:
    """Prints the predictions, with the hours of each run at the paper's batch."""
    print_row(
        "network", "devices", "images each", "fsdp", "step ms: network + update + collectives",
        "steps/s", "images/s", "run",
    )  # fmt: skip
    print_row(*["---"] * 8)
    for row in rows:
        parts = " + ".join(f"{ms:.2f}" for ms in row["milliseconds"].values())
        whole = row["devices"] * row["images_per_device"] == GLOBAL_BATCH[row["network"]]
        runs = ", ".join(
            f"{name}{steps / row['steps_per_second'] / 3600:.1f} h"
            for name, steps in RUNS[row["network"]].items()
        )
        print_row(
            row["network"],
            f"{row['devices']} {row['machine']}",
            row["images_per_device"],
            row["fsdp"],
            f"{parts} ({row['bound']})",
            f"{row['steps_per_second']:.1f}",
            f"{row['images_per_second']:,.0f}",
            runs if whole else "another batch",
        )


def print_breaks() -> None:
    """Prints the size of a checkpoint and of a batch, and their times."""
    print_row("network", "checkpoint GB", "to the host s", "written s", "input bytes per image")
    print_row(*["---"] * 5)
    for network in RUNS:
        cost = abstract_cost(network, 1, 8, 1, dtype="bfloat16")
        size = NETWORKS[network][1]
        print_row(
            network,
            f"{cost.checkpoint_bytes / 1e9:.2f}",
            f"{cost.checkpoint_bytes / TO_HOST:.2f}",
            f"{cost.checkpoint_bytes / STORAGE:.1f}",
            size * size * 3,
        )


def print_row(*cells: Any) -> None:
    """Prints a row of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
