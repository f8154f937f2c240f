"""``--mode=eval``: measures a model, or images in files, and records how."""

import hashlib
import json
import pathlib
import time
from functools import partial
from typing import Any, NamedTuple

from jax_ddpm.data.source import Source
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation import record
from jax_ddpm.evaluation.bound import COLUMNS, measure_bound, write_curve
from jax_ddpm.evaluation.coding import draw_coding
from jax_ddpm.evaluation.metrics import METRICS
from jax_ddpm.evaluation.nll import SETTINGS, measure_nll
from jax_ddpm.evaluation.quality import Drawing, Evaluation, measure_quality
from jax_ddpm.images import note_of
from jax_ddpm.inference.outputs import beside, require_place, require_writable
from jax_ddpm.inference.trained import Trained
from jax_ddpm.options import did_you_mean
from jax_ddpm.runtime.distributed import from_first
from jax_ddpm.runtime.stopping import Poll, never

_PICTURES = ("", "_decoding", "_interpolation", "_nearest")
KNOWN = ("bpd", "nll", "coding", *METRICS)


class Report(NamedTuple):
    """The record of an evaluation, and where it lies; as text a table of its results."""

    path: pathlib.Path
    record: dict[str, Any]

    def __str__(self) -> str:
        return f"{record.show(self.record)}\n{self.path}"


def evaluate(
    what: Evaluation,
    metrics: list[str],
    folder: pathlib.Path,
    out: pathlib.Path | None = None,
    poll: Poll = never,
) -> Report:
    """Measures, and writes one record: ``out``, or a file in ``folder`` named after its content.

    Curves and pictures lie beside it. Finished parts stay in the cache, so that a killed evaluation
    goes on from there.

    Raises:
      UserError: where this cannot be measured so.
    """
    start = time.perf_counter()
    _check(what, metrics)
    if out is not None and out.suffix != ".json":
        raise UserError(f"--out={out}: give the name of a .json; curves and pictures go beside it")
    subject = _subject(what)
    request = {"subject": _digest(subject), "metrics": list(metrics)} | _settings(what)
    if out is None:
        require_writable(folder / "record.json", f"{folder}")
    else:
        require_place(out, request)
        _require_beside(out.with_suffix(""))
    result: dict[str, Any] = {"subject": subject, "measured": {}, "calibration": {}}
    drawings: list[Drawing] = []
    if "coding" in metrics:  # which may find that it cannot be drawn, before anything is
        assert what.trained is not None
        assert what.source is not None
        drawings.append(partial(draw_coding, what.trained, what.source, what.split))
    if "bpd" in metrics:
        result["measured"]["bpd"], drawing = _bound(what, poll)
        drawings.append(drawing)
    if "nll" in metrics:
        result["measured"]["nll"] = _nll(what, poll)
    if of_samples := [name for name in metrics if name in METRICS]:
        found, pictures = measure_quality(what, of_samples, poll)
        result |= found | {"measured": result["measured"] | found["measured"]}
        drawings += pictures

    if out is None:
        protocols = {name: found["protocol"] for name, found in result["measured"].items()}
        out = folder / f"{'-'.join(metrics)}_{_digest([result['subject'], protocols])[:8]}.json"
    for draw in drawings:
        draw(out.with_suffix(""))
    result["request"] = request
    result["provenance"] = record.provenance(time.perf_counter() - start)
    record.save_record(out, result)
    return Report(out, result)


def _settings(what: Evaluation) -> dict[str, Any]:
    """The rest of a request, besides its subject and its metrics."""
    return {
        "data": what.source.spec.identity if what.source else None,
        "num_samples": what.num_samples,
        "num_examples": what.num_examples,
        "split": what.split,
        "reference": what.reference,
        "extractor": what.extractor,
        "calibrate": what.calibrate,
    }


def _require_beside(stem: pathlib.Path) -> None:
    """Checks that curves and pictures beside a record are only of such."""
    if others := from_first(lambda: [str(path) for path in _others_beside(stem)]):
        raise UserError(f"--out={stem}.json: {others[0]} lies beside it; give another name")


def _others_beside(stem: pathlib.Path) -> list[pathlib.Path]:
    table = stem.with_name(f"{stem.name}.csv")
    pictures = [stem.with_name(f"{stem.name}{part}.png") for part in _PICTURES]
    others = [path for path in pictures if path.exists() and note_of(path) != beside(stem)]
    if table.exists() and not table.read_bytes().startswith(",".join(COLUMNS).encode()):
        others.append(table)
    return others


def _check(what: Evaluation, metrics: list[str]) -> None:
    """Raises UserError for a request that cannot be met, before anything is computed."""
    for name in metrics:
        if name not in KNOWN:
            near = did_you_mean(str(name), KNOWN)
            raise UserError(f"--metrics={name}: choose among {', '.join(KNOWN)}{near}")
    if not metrics:
        raise UserError(f"--metrics is missing; choose among {', '.join(KNOWN)}")
    for name in {"bpd", "nll", "coding"} & set(metrics):
        if what.trained is None or what.samples is not None:
            raise UserError(f"--metrics={name} measures a model: give --workdir, not --samples")
        if not what.trained.model.codec.bounded:
            raise UserError(
                f"--metrics={name} is of pixels, and this model diffuses something else; measure "
                "its samples, for example by --metrics=fid"
            )
    if set(METRICS) & set(metrics) and what.samples is None and what.num_samples is None:
        raise UserError(
            "--num_samples is missing; 50,000 are the custom, --metrics=kid takes fewer"
        )
    if what.source is None and what.calibrate:
        raise UserError("--calibrate measures real images: give --config of the data")
    compares = any(METRICS[name].needs_reference for name in metrics if name in METRICS)
    if what.source is None and compares and what.reference in ("train", "heldout"):
        raise UserError(
            "--reference is missing: give a folder or .npz, or --config of the real data"
        )


def _bound(what: Evaluation, poll: Poll) -> tuple[dict[str, Any], Drawing]:
    trained, source, count = _model_and_data(what)
    bound = measure_bound(trained, source, what.split, count, what.batch_size, what.cache, poll)
    protocol = _of_examples(what, count) | {"draws_per_term": 1}
    result = bound.total._asdict() | {
        "unit": "bits/dim",
        "prior": bound.prior._asdict(),
        "rate": bound.rate._asdict(),
        "distortion": bound.distortion._asdict(),
        "rmse": float(bound.rmse[0]),
    }
    return {"protocol": protocol, "result": result}, partial(write_curve, bound)


def _nll(what: Evaluation, poll: Poll) -> dict[str, Any]:
    trained, source, count = _model_and_data(what)
    nll = measure_nll(trained, source, what.split, count, what.batch_size, what.cache, poll)
    protocol = _of_examples(what, count) | SETTINGS
    return {"protocol": protocol, "result": nll._asdict() | {"unit": "bits/dim"}}


def _model_and_data(what: Evaluation) -> tuple[Trained, Source, int]:
    """The model and the data of a likelihood, and the number of examples."""
    assert what.source is not None
    size = what.source.spec.split_sizes[what.split]
    return what.model(), what.source, min(what.num_examples or size, size)


def _of_examples(what: Evaluation, count: int) -> dict[str, Any]:
    """The protocol of a likelihood, as far as all likelihoods share it."""
    trained, source, _ = _model_and_data(what)
    return {
        "data": source.spec.identity,
        "split": what.split,
        "num_examples": count,
        "num_levels": source.spec.num_levels,
        "given": ", ".join(trained.model.conditions.names) or None,
    }


def _subject(what: Evaluation) -> dict[str, Any]:
    """The subject of the record: the model or the images measured."""
    if what.trained is None or what.samples is not None:
        assert what.samples is not None
        assert what.files is not None
        return {"images": what.samples.name} | what.files.identity
    config = what.trained.config.to_dict()
    return what.trained.record | {
        "seeds": list(what.seeds),
        "config": config,
        "config_sha256": _digest(config),
    }


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
