"""The speed of FID beside pytorch-fid: Inception features, and the distance of 2048 of them.

    python benchmarks/features.py --batch_size=16 --rounds=6

Both networks have the same random weights and see the same images, in float32 throughout. The two
programs are timed in alternation, after one call each, until their results are NumPy arrays. Ours
shares a batch over all devices, as evaluation does; a CPU is one device per core here
(``JAX_NUM_CPU_DEVICES``), since XLA runs some convolutions on one core.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_ddpm.evaluation.frechet import frechet_distance, moments
from jax_ddpm.interop.inception import inception_parameters
from jax_ddpm.models.inception import InceptionV3
from jax_ddpm.training.step import data_mesh

Program = Callable[[], np.ndarray]


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6, help="of features")
    parser.add_argument("--distance_rounds", type=int, default=2)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    try:
        import pytorch_fid
        import torch
    except ImportError as error:
        sys.exit(f"{error}: pip install torch torchvision pytorch-fid")

    features = compare(*feature_programs(arguments.batch_size), arguments.rounds)
    for name in ("ours", "theirs"):
        features[f"{name}_features_per_second"] = arguments.batch_size / features[f"{name}_seconds"]
    report = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg(),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": {module.__name__: module.__version__ for module in (jax, torch, pytorch_fid)},
        "features": features | {"batch_size": arguments.batch_size},
        "frechet_distance": compare(*distance_programs(), arguments.distance_rounds),
    }
    print(json.dumps(report, indent=2))


def compare(ours: Program, theirs: Program, rounds: int) -> dict[str, Any]:
    """Median seconds, and the median over rounds of theirs/ours: above 1, ours is faster."""
    difference = np.linalg.norm(ours() - (expected := theirs())) / np.linalg.norm(expected)
    seconds: dict[Program, list[float]] = {ours: [], theirs: []}
    for _ in range(rounds):
        for program, measured in seconds.items():
            start = time.perf_counter()
            program()
            measured.append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    return {
        "ours_seconds": statistics.median(seconds[ours]),
        "theirs_seconds": statistics.median(seconds[theirs]),
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "relative_difference": float(difference),
        "rounds": rounds,
    }


def feature_programs(batch_size: int) -> tuple[Program, Program]:
    """Features of 32×32 images, ours from bytes, theirs from numbers in 0…1 on the device."""
    import torch
    import torchvision
    from pytorch_fid import inception

    with (
        mock.patch.object(inception, "load_state_dict_from_url"),  # no download
        mock.patch.object(torchvision.models.Inception3, "load_state_dict"),
    ):
        whole = inception.fid_inception_v3()
    weights = {name: array.numpy() for name, array in whole.state_dict().items()}
    with mock.patch.object(inception, "fid_inception_v3", return_value=whole):
        reference = inception.InceptionV3().eval()

    images = np.random.default_rng(0).integers(0, 256, (batch_size, 32, 32, 3), dtype=np.uint8)
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh = data_mesh()
    whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    network = jax.jit(
        lambda params, images: InceptionV3().apply({"params": params}, images)[0],
        in_shardings=(whole, split),
    )

    params = jax.device_put(inception_parameters(weights), whole)

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    reference.to(device)
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2) / np.float32(255)).to(device)

    @torch.no_grad()
    def theirs() -> np.ndarray:
        return reference(inputs)[0][:, :, 0, 0].cpu().numpy()

    return lambda: np.asarray(network(params, images)), theirs


def distance_programs() -> tuple[Program, Program]:
    """The distance of two normal samples of 4096 whose deviations fall from 1 to 1/100."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    rng = np.random.default_rng(0)
    deviations = np.geomspace(1, 0.01, 2048)
    a, b = (moments(rng.normal(mean, deviations, (4096, 2048))) for mean in (0.0, 0.01))
    return (
        lambda: np.asarray(frechet_distance(a, b)),
        lambda: np.asarray(calculate_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)),
    )


if __name__ == "__main__":
    main()
