"""How long training stands still for a checkpoint.

    python benchmarks/checkpoint.py --shape=cifar10 --batch_size 16

Saving blocks while the state is copied, then writes in the background, which steps that run
meanwhile may feel. The stall is both: the extra time of a checkpoint and of the steps during its
writing, against the same steps without, in alternation. ``--folder`` says on which disk.
"""

import math
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
from measuring import report, time_once
from setting import Setting, Training, make_parser, measure_each

from jax_ddpm.runs.checkpoint import Checkpoints
from jax_ddpm.training.state import to_items


def main() -> None:
    """Prints JSON and a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", help="to write in; by default where temporary files are")
    arguments = parser.parse_args()

    def measure(setting: Setting) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            return measure_stall(setting, pathlib.Path(folder), arguments.rounds)

    report(__doc__, measure_each(arguments, measure))


def measure_stall(setting: Setting, folder: pathlib.Path, rounds: int) -> dict[str, Any]:
    """Medians over rounds, in seconds."""
    training = Training(setting)
    with Checkpoints(folder, keep_last=1, keep_every=0) as checkpoints:

        def save() -> float:
            """Seconds until training may go on."""
            jax.block_until_ready(training.state)
            start = time.perf_counter()
            checkpoints.save(int(training.state.step), to_items(training.state), setting.config, {})
            return time.perf_counter() - start

        time_once(training.program)  # compiles
        step = time_once(training.program, 3)
        start = time.perf_counter()
        save()
        checkpoints.wait()
        written = time.perf_counter() - start
        while_written = math.ceil(written / step)

        blocked, stalls = [], []
        for _ in range(rounds):
            undisturbed = time_once(training.program, while_written)
            blocked.append(save())
            disturbed = time_once(training.program, while_written)
            stalls.append(blocked[-1] + while_written * (disturbed - undisturbed))
            checkpoints.wait()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(training.state))
    stall = statistics.median(stalls)
    return {
        "gigabytes": size / 1e9,
        "step_seconds": step / training.steps,
        "written_seconds": written,
        "blocked_seconds": statistics.median(blocked),
        "stall_seconds": stall,
        "stall_range": [min(stalls), max(stalls)],
        "stall_steps": stall / (step / training.steps),
    }


if __name__ == "__main__":
    main()
