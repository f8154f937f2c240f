"""The train step, all of it: gather, flip, noise, gradients, clipped Adam, moving average.

    python benchmarks/train_step.py --shape=cifar10 --batch_size 16 --peer
    python benchmarks/train_step.py --platform=gpu --batch_size 128 256 512 1024 --peer

FLOPs are those of the network's convolutions and matrix products and of their gradients; operations
that rematerialisation repeats do not count (Chowdhery et al. 2022, appendix B).
"""

from typing import Any

import jax
import jax.numpy as jnp
from measuring import alternate, compared, matmul_peak, report
from peer import Peer
from setting import Setting, Training, make_parser, measure_each

from jax_ddpm.factory import Model
from jax_ddpm.training.arithmetic import flops


def main() -> None:
    """Prints JSON and a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--peer", action="store_true", help="in alternation with diffusers")
    arguments = parser.parse_args()

    def measure(setting: Setting) -> dict[str, Any]:
        peak = matmul_peak(setting.mesh, setting.config.model.dtype)
        training = Training(setting)
        programs = {"ours": training.program, "peak": peak.program}
        if arguments.peer:
            programs["theirs"] = Peer(setting).training(training.steps)
        seconds = alternate(programs, arguments.rounds)
        row = compared(seconds)
        count = gradient_flops(setting) * training.steps
        return row | {
            "steps": training.steps,
            "steps_per_second": training.steps / row["seconds"],
            "images_per_second": setting.batch_size * training.steps / row["seconds"],
            "gflop_per_image": count / (setting.batch_size * training.steps) / 1e9,
            **peak.share(seconds, count),
        }

    report(__doc__, measure_each(arguments, measure))


def gradient_flops(setting: Setting) -> float:
    """The FLOPs of the network and its gradient on one batch."""
    config = setting.config.copy_and_resolve_references()
    config.model.remat = ""
    network = Model(config, setting.source.spec).network

    def loss(params: Any, *inputs: jax.Array) -> jax.Array:
        return jnp.sum(network.apply(params, *inputs, {}) ** 2)

    return flops(jax.grad(loss), setting.params, *setting.inputs())


if __name__ == "__main__":
    main()
