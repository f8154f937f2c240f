"""Peak memory of the train step, under every policy of rematerialisation.

    python benchmarks/memory.py --shape=cifar10 --batch_size 16 --peer

Every case is a process of its own. The peak counts what steps hold beyond the memory in use before
the train state and beyond the program itself. A GPU's allocators report it; Linux reports it for
the whole process on a CPU, including what the libraries set aside for themselves.
``planned_gigabytes`` is XLA's plan: arguments, results not donated, temporaries.
"""

import argparse
import ctypes
import pathlib
import re
from typing import Any

import jax
from measuring import in_fresh_process, report, time_once
from peer import Peer
from setting import Setting, Training, make_parser

from jax_ddpm.models.remat import REMAT_POLICIES

_STEPS = 2


def main() -> None:
    """Prints JSON and a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--peer", action="store_true", help="diffusers' too")
    arguments = parser.parse_args()
    results = []
    for batch_size in arguments.batch_size:
        for policy in ("", *REMAT_POLICIES):
            results.append(in_fresh_process(measure_ours, arguments, batch_size, policy))
        if arguments.peer:
            results.append(in_fresh_process(measure_theirs, arguments, batch_size))
    report(__doc__, results)


def measure_ours(arguments: argparse.Namespace, batch_size: int, policy: str) -> dict[str, Any]:
    """The peak in this process, and what XLA planned."""
    arguments.override.append(f"model.remat={policy}")
    setting = Setting(arguments, batch_size)
    jax.block_until_ready(setting.params)  # the train state has its own copy of them
    before = _held()
    training = Training(setting)
    without_program = _held()
    step = training.step.program.lower(*training.arguments()).compile()
    before += _held() - without_program
    _forget_peak()
    for _ in range(_STEPS):
        training.state, _ = step(*training.arguments())
    jax.block_until_ready(training.state)
    plan = step.memory_analysis()
    assert plan is not None
    planned = (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
    )
    return {
        "program": "ours",
        "remat": policy or "none",
        **setting.fields,
        "peak_gigabytes": (_held(peak=True) - before) / 1e9,
        "planned_gigabytes": planned / 1e9,
    }


def measure_theirs(arguments: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """The peak of diffusers' train step in this process."""
    setting = Setting(arguments, batch_size)
    jax.block_until_ready(setting.params)  # the train state has its own copy of them
    before = _held()
    program = Peer(setting).training(steps=1)
    import torch

    time_once(program)
    _forget_peak()
    time_once(program, _STEPS)
    on_gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    peak = torch.cuda.max_memory_allocated() if on_gpu else _held(peak=True) - before
    return {"program": "theirs", "remat": "none", **setting.fields, "peak_gigabytes": peak / 1e9}


def _held(peak: bool = False) -> int:
    """Bytes on the device, or in this process on a CPU: now, or at most since reset."""
    if statistics := jax.devices()[0].memory_stats():
        return statistics["peak_bytes_in_use" if peak else "bytes_in_use"]
    if not peak:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what has been freed
    field = "VmHWM" if peak else "VmRSS"
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found
    return 1024 * int(found[1])


def _forget_peak() -> None:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # so that compiling does not count


if __name__ == "__main__":
    main()
