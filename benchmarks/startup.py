"""From a command to its first train step: cold, and with JAX's persistent compilation cache.

    python benchmarks/startup.py --shape=cifar10 --batch_size 16

Every case is a process of its own. A cold one finds an empty cache; warm ones load what the cold
one left, as users of ``JAX_COMPILATION_CACHE_DIR`` do. ``seconds`` is initialise + trace + compile;
importing comes before it and the first step after it.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from typing import Any

import jax
from measuring import in_fresh_process, report
from setting import Setting, Training, make_parser


def main() -> None:
    """Prints JSON and a table."""
    arguments = make_parser(__doc__).parse_args()
    results = []
    for batch_size in arguments.batch_size:
        cases: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as cache:
                for rows in cases.values():
                    rows.append(
                        in_fresh_process(start_up, arguments, batch_size, cache, time.time())
                    )
        results += [{"case": case} | _middle(rows) for case, rows in cases.items()]
    report(__doc__, results)


def start_up(
    arguments: argparse.Namespace, batch_size: int, cache: str, launched: float
) -> dict[str, Any]:
    """The time of each part in this process, which was ``launched`` at that time."""
    imported = time.time()
    jax.config.update("jax_compilation_cache_dir", cache)
    setting = Setting(arguments, batch_size)
    clock = [time.perf_counter()]

    def lap() -> None:
        clock.append(time.perf_counter())

    training = Training(setting, stirred=False)
    jax.block_until_ready(training.state)
    lap()
    lowered = training.step.program.lower(*training.arguments())
    lap()
    step = lowered.compile()
    lap()
    jax.block_until_ready(step(*training.arguments()))
    lap()
    initialise, trace, compile_, first_step = (b - a for a, b in itertools.pairwise(clock))
    return setting.fields | {
        "seconds": initialise + trace + compile_,
        "import_seconds": imported - launched,
        "initialise_seconds": initialise,
        "trace_seconds": trace,
        "compile_seconds": compile_,
        "first_step_seconds": first_step,
    }


def _middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every time, and the range of the first."""
    times = {name: [row[name] for row in rows] for name in rows[0] if name.endswith("seconds")}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return rows[0] | medians | {"seconds_range": [min(times["seconds"]), max(times["seconds"])]}


if __name__ == "__main__":
    main()
