"""Sampling, from noise to images on the host.

    python benchmarks/sampling.py --shape=cifar10 --batch_size 16 --peer --timed_steps=20
    python benchmarks/sampling.py --shape=cifar10 --batch_size 16 --peer --sampler=dpmpp_2m
    python benchmarks/sampling.py --platform=gpu --batch_size 256 --peer

Ancestral sampling takes 1,000 steps, DPM-Solver++ (2M) 15. All steps of a sampler run the same
compiled body, so ``--timed_steps`` runs and times a coarser grid of that many steps.
``projected_seconds`` is that time multiplied up, not measured.
"""

from typing import Any

from measuring import Program, alternate, compared, matmul_peak, report
from peer import Peer
from setting import Setting, make_parser, measure_each

from jax_ddpm.generate import Generator
from jax_ddpm.runtime.devices import place, whole
from jax_ddpm.training.arithmetic import flops

NUM_STEPS = {"ancestral": 1000, "dpmpp_2m": 15}


def main() -> None:
    """Prints JSON and a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--peer", action="store_true", help="in alternation with diffusers")
    parser.add_argument("--sampler", choices=NUM_STEPS, default="ancestral")
    parser.add_argument("--timed_steps", type=int, help="by default all of the sampler's")
    arguments = parser.parse_args()
    num_steps = NUM_STEPS[arguments.sampler]
    timed_steps = arguments.timed_steps or num_steps
    arguments.override += [
        f"sampling.sampler={arguments.sampler}",
        f"sampling.num_steps={timed_steps}",
    ]

    def measure(setting: Setting) -> dict[str, Any]:
        peak = matmul_peak(setting.mesh, setting.config.model.dtype)
        generator = Generator(setting.model, setting.batch_size, setting.mesh)
        params = place(setting.params, whole(setting.mesh))
        ours = Program(lambda: generator(params, 0, setting.batch_size))
        programs = {"ours": ours, "peak": peak.program}
        if arguments.peer:
            programs["theirs"] = Peer(setting).sampling()
        seconds = alternate(programs, arguments.rounds)
        row = {"sampler": arguments.sampler, "steps": num_steps, "timed_steps": timed_steps}
        row |= compared(seconds)
        if timed_steps < num_steps:
            row["projected_seconds"] = row["seconds"] * num_steps / timed_steps
        evaluations = generator.num_evaluations
        one = flops(setting.model.network.apply, setting.params, *setting.inputs(), {})
        return row | {
            "evaluations": evaluations,
            "images_per_second": setting.batch_size * timed_steps / num_steps / row["seconds"],
            **peak.share(seconds, one * evaluations),
        }

    report(__doc__, measure_each(arguments, measure))


if __name__ == "__main__":
    main()
