"""Sample quality of one trained model over the ways to sample it.

    python experiments/sampling.py solvers --workdir=runs/digits_conditional \
        --extractor=runs/digits_classifier --out=experiments/results/digits_conditional/solvers

``solvers`` is every method at 5 to 100 evaluations of the network (1000 for two), ``guidance``
classifier-free guidance at every scale. Writes ``<out>.json``, the plot ``<out>.png``, and
``<out>_samples.png``, which has a row for each way of sampling, from the same noise, in the JSON's
order.

Seconds are of a batch, the fastest of three, after one that compiles. Samples and measurements stay
in ``evaluation/cache`` of the run, so that a stopped sweep goes on.
"""

import argparse
import pathlib
import time
from typing import Any

import numpy as np

import jax_ddpm
from jax_ddpm import images
from jax_ddpm.evaluation.quality import Evaluation, measure_quality
from jax_ddpm.evaluation.record import provenance, save_record
from jax_ddpm.factory import make_source
from jax_ddpm.inference.trained import Trained
from jax_ddpm.runtime.files import replacing

EVALUATIONS = (5, 10, 15, 20, 50, 100)
Fields = dict[str, Any]


def solvers() -> list[Fields]:
    """The fields of ``sampling`` for each method at each number of evaluations."""
    ways: dict[str, Fields] = {
        "ancestral": {"variance": "fixedsmall"},
        "ancestral, optimal variance": {"sampler": "ancestral", "variance": "optimal"},
        "ddim": {},
        "heun": {},
        "dpmpp_2m": {},
        "dpmpp_2m_sde": {},
        "unipc": {},
        "predictor_corrector": {},
    }
    per_step = {"heun": 2, "predictor_corrector": 2}
    rows = [
        {"sampler": name.partition(",")[0]}
        | fields
        | {"num_steps": -(-evaluations // per_step.get(name, 1))}
        for name, fields in ways.items()
        for evaluations in EVALUATIONS
    ]
    ends = [{"sampler": "ancestral", "variance": "fixedsmall"}, {"sampler": "ddim"}]
    return rows + [way | {"num_steps": 1000} for way in ends]


def guidance() -> list[Fields]:
    """The fields of ``sampling`` for each scale of classifier-free guidance."""
    scales = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
    way = {"sampler": "dpmpp_2m", "num_steps": 20}
    return [way | {"guidance_scale": scale} for scale in scales]


SWEEPS = {"solvers": solvers, "guidance": guidance}


def main() -> None:
    """Runs one sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--extractor", required=True, help="as --extractor of --mode=eval")
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()

    start, rows, pictures = time.perf_counter(), [], []
    for fields in SWEEPS[arguments.sweep]():
        trained = jax_ddpm.load(arguments.workdir, **fields)
        picture, seconds = draw(trained)
        pictures.append(picture)
        rows.append(
            {"sampling": fields, "seconds_per_batch": seconds} | measure(trained, arguments)
        )
        show(rows[-1])
    command = {"command": f"python experiments/sampling.py {' '.join(_given(arguments))}"}
    record = {
        "model": trained.model_record,
        "num_samples": arguments.num_samples,
        "seeds": list(range(arguments.num_seeds)),
        "batch_size": trained.config.sampling.batch_size,
        "rows": rows,
        "provenance": provenance(time.perf_counter() - start) | command,
    }
    save_record(arguments.out.with_suffix(".json"), record)
    plot = {"solvers": plot_solvers, "guidance": plot_guidance}[arguments.sweep]
    plot(rows, arguments.out.with_suffix(".png"))
    path = arguments.out.with_name(f"{arguments.out.name}_samples.png")
    images.save_png(path, images.grid(np.concatenate(pictures), len(pictures[0])))


def _given(arguments: argparse.Namespace) -> list[str]:
    flags = {name: value for name, value in vars(arguments).items() if name != "sweep"}
    return [arguments.sweep, *(f"--{name}={value}" for name, value in flags.items())]


def draw(trained: Trained) -> tuple[Any, float]:
    """Ten samples, and the seconds that a batch takes."""
    size = trained.config.sampling.batch_size
    generator = trained.generator(size)
    generator(trained.params, 0, size)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        samples = generator(trained.params, 0, size)
        seconds.append(time.perf_counter() - start)
    return trained.model.codec.decode(samples[:10]), min(seconds)


def measure(trained: Trained, arguments: argparse.Namespace) -> dict[str, Any]:
    """The number of evaluations, and the metrics."""
    what = Evaluation(
        cache=arguments.workdir / "evaluation" / "cache",
        trained=trained,
        source=make_source(trained.config),
        num_samples=arguments.num_samples,
        seeds=tuple(range(arguments.num_seeds)),
        extractor=arguments.extractor,
        batch_size=trained.config.sampling.batch_size,
    )
    metrics = ["fid", "kid", "prdc"] + ["agreement"] * ("label" in trained.model.conditions.names)
    found, _ = measure_quality(what, metrics)
    results = {name: measured["result"] for name, measured in found["measured"].items()}
    for result in results.values():
        for detail in ("per_seed", "class_names", "per_class", "confusion"):
            result.pop(detail, None)
    protocol = found["measured"]["recall"]["protocol"]
    return {
        "evaluations": trained.model.sampler().num_evaluations,
        "results": results,
        "protocol": protocol,
    }


def show(row: dict[str, Any]) -> None:
    """Prints one row."""
    values = {name.partition("/")[0]: f"{r['value']:.4f}" for name, r in row["results"].items()}
    print(
        row["evaluations"], f"{row['seconds_per_batch']:.2f} s", row["sampling"], values, flush=True
    )


def _series(rows: list[dict[str, Any]], metric: str) -> tuple[list[float], list[float]]:
    (name,) = [name for name in rows[0]["results"] if name.partition("/")[0] == metric]
    found = [row["results"][name] for row in rows]
    return [r["value"] for r in found], [r.get("std", 0.0) for r in found]


def plot_solvers(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Kernel and Fréchet distance over the evaluations, with a line for each method."""
    from matplotlib.figure import Figure

    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sampling = row["sampling"]
        name = sampling["sampler"] + (", σ*²" if sampling.get("variance") == "optimal" else "")
        lines.setdefault(name, []).append(row)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("fd", "kd"), strict=True):
        for name, line in lines.items():
            values, std = _series(line, metric)
            evaluations = [row["evaluations"] for row in line]
            axes.errorbar(evaluations, values, std, label=name, marker=".", capsize=2)
        axes.set(xscale="log", xlabel="evaluations of the network", ylabel=metric)
        axes.set_yscale("log" if metric == "fd" else "symlog", **_linear_below(metric))
    axes.legend()
    _save(figure, out)


def _linear_below(metric: str) -> dict[str, float]:
    return {} if metric == "fd" else {"linthresh": 1e-2}  # a kernel distance may be negative


def plot_guidance(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Agreement, recall and Fréchet distance over the scale."""
    from matplotlib.figure import Figure

    scales = [row["sampling"]["guidance_scale"] for row in rows]
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 3), ("agreement", "recall", "fd"), strict=True):
        values, std = _series(rows, metric)
        axes.errorbar(scales, values, std, marker=".", capsize=2)
        axes.set(xlabel="guidance scale", ylabel=metric)
    _save(figure, out)


def _save(figure: Any, out: pathlib.Path) -> None:
    with replacing(out) as file:
        figure.savefig(file, format="png", dpi=150)


if __name__ == "__main__":
    main()
