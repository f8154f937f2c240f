"""The speed of FID beside pytorch-fid: Inception features, and the distance of 2048 of them.

    python benchmarks/features.py --batch_size=16 --rounds=6

Both networks have the same random weights and see the same images, in float32 throughout. The two
programs are timed in alternation, after one call each, until their results are NumPy arrays. Ours
shares a batch over all devices, as evaluation does; a CPU is one device per core here
(``jax_num_cpu_devices``), since XLA runs some convolutions on one core.
"""

import argparse
import os
import sys
from typing import Any
from unittest import mock

import jax
import numpy as np
from measuring import Program, alternate, compared, report

from jax_ddpm.evaluation.frechet import frechet_distance, moments
from jax_ddpm.interop.inception_weights import inception_parameters
from jax_ddpm.models.inception import InceptionV3
from jax_ddpm.runtime.devices import compile_over, make_mesh, place, split, whole


def main() -> None:
    """Prints JSON and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6, help="of features")
    parser.add_argument("--distance_rounds", type=int, default=2)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    try:
        import pytorch_fid  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        sys.exit(f"error: {error}; pip install torch torchvision pytorch-fid")

    features = compare(*feature_programs(arguments.batch_size), arguments.rounds)
    features["images_per_second"] = arguments.batch_size / features["seconds"]
    distance = compare(*distance_programs(), arguments.distance_rounds)
    report(
        __doc__,
        [
            {"what": "features", "batch_size": arguments.batch_size} | features,
            {"what": "Fréchet distance"} | distance,
        ],
    )


def compare(ours: Program, theirs: Program, rounds: int) -> dict[str, Any]:
    """Seconds and speed-up, and the difference between the results by norm."""
    difference = np.linalg.norm(ours.launch() - (expected := theirs.launch()))
    row = compared(alternate({"ours": ours, "theirs": theirs}, rounds))
    return row | {"relative_difference": float(difference / np.linalg.norm(expected))}


def feature_programs(batch_size: int) -> tuple[Program, Program]:
    """Features of 32×32 images, ours from bytes, theirs from numbers in 0…1 on the device."""
    import torch
    import torchvision
    from pytorch_fid import inception

    with (
        mock.patch.object(inception, "load_state_dict_from_url"),  # no download
        mock.patch.object(torchvision.models.Inception3, "load_state_dict"),
    ):
        complete = inception.fid_inception_v3()
    weights = {name: array.numpy() for name, array in complete.state_dict().items()}
    with mock.patch.object(inception, "fid_inception_v3", return_value=complete):
        reference = inception.InceptionV3().eval()

    images = np.random.default_rng(0).integers(0, 256, (batch_size, 32, 32, 3), dtype=np.uint8)
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh = make_mesh()
    network = compile_over(
        lambda params, images: InceptionV3().apply({"params": params}, images)[0],
        (whole(mesh), split(mesh)),
        split(mesh),
    )
    params = place(inception_parameters(weights), whole(mesh))

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    reference.to(device)
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2) / np.float32(255)).to(device)

    @torch.no_grad()
    def theirs() -> np.ndarray:
        return reference(inputs)[0][:, :, 0, 0].cpu().numpy()

    return Program(lambda: np.asarray(network(params, images))), Program(theirs)


def distance_programs() -> tuple[Program, Program]:
    """The distance of two normal samples of 4096 whose deviations fall from 1 to 1/100."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    rng = np.random.default_rng(0)
    deviations = np.geomspace(1, 0.01, 2048)
    a, b = (moments(rng.normal(mean, deviations, (4096, 2048))) for mean in (0.0, 0.01))
    return (
        Program(lambda: np.asarray(frechet_distance(a, b))),
        Program(lambda: np.asarray(calculate_frechet_distance(*a[:2], *b[:2]))),
    )


if __name__ == "__main__":
    main()
