"""The forward pass of the network.

    python benchmarks/forward.py --shape=cifar10 --batch_size=16 --peer

Images and times lie on the devices, dropout is off. FLOPs, here and elsewhere, are those of the
convolutions and matrix products as our network does them, which can be fewer than the peer's.
"""

from typing import Any

import jax
import numpy as np
from measuring import Program, alternate, compared, matmul_peak, report
from peer import Peer
from setting import Setting, make_parser, measure_each

from jax_ddpm.runtime.devices import place, whole
from jax_ddpm.training.arithmetic import flops


def main() -> None:
    """Prints JSON and a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--peer", action="store_true", help="in alternation with diffusers")
    arguments = parser.parse_args()

    def measure(setting: Setting) -> dict[str, Any]:
        peak = matmul_peak(setting.mesh, setting.config.model.dtype)
        programs = {"ours": forward(setting), "peak": peak.program}
        row = {}
        if arguments.peer:
            programs["theirs"] = Peer(setting).forward()
            row["relative_difference"] = difference(programs["ours"], programs["theirs"])
        seconds = alternate(programs, arguments.rounds)
        row |= compared(seconds)
        count = flops(setting.model.network.apply, setting.params, *setting.inputs(), {})
        return row | {
            "images_per_second": setting.batch_size / row["seconds"],
            "gflop_per_image": count / setting.batch_size / 1e9,
            **peak.share(seconds, count),
        }

    report(__doc__, measure_each(arguments, measure))


def forward(setting: Setting) -> Program:
    """Our network's program."""
    params, inputs = place(setting.params, whole(setting.mesh)), setting.inputs()
    apply = jax.jit(setting.model.network.apply)
    return Program(lambda: apply(params, *inputs, {}))


def difference(ours: Program, theirs: Program) -> float:
    """The difference of the outputs, by norm; PyTorch has the channels first."""
    expected = theirs.launch().cpu().numpy().transpose(0, 2, 3, 1)
    return float(np.linalg.norm(ours.launch() - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    main()
