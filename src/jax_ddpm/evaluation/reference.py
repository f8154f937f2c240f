"""The reference of samples: a set of images, or the moments of their features in a file."""

import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm.data.arrays import read_npz
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.features import Extractor, FeatureSet
from jax_ddpm.evaluation.frechet import Moments
from jax_ddpm.runtime.files import replacing


class Reference(NamedTuple):
    """Real data, as an extractor sees it.

    Attributes:
      record: its description, as JSON.
      moments: of the features.
      real: images and features; None where only the moments are known, from a file.
    """

    record: dict[str, Any]
    moments: Moments
    real: FeatureSet | None


def reference_of(real: FeatureSet) -> Reference:
    """The reference made of these images."""
    return Reference(real.images.identity | {"count": real.count}, real.moments(), real)


def holds_moments(path: pathlib.Path) -> bool:
    """Whether this is a file of moments and not of images."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return "mu" in stored.files
    except Exception:  # zipfile can raise anything on damaged bytes
        return False


def request_of(reference: dict[str, Any], extractor: Extractor) -> dict[str, Any]:
    """All that decides moments, as their file notes it."""
    return {"reference": reference, "extractor": extractor.record}


def save_moments(path: pathlib.Path, reference: Reference, extractor: Extractor) -> None:
    """Writes ``mu`` and ``sigma``, as other projects read them, with ``count`` and ``record``."""
    record = json.dumps(request_of(reference.record, extractor))
    with replacing(path) as file:
        np.savez(
            file,
            mu=reference.moments.mean,
            sigma=reference.moments.covariance,
            count=np.array(reference.moments.count),
            record=np.array(record),
        )


def load_moments(path: pathlib.Path, extractor: Extractor) -> Reference:
    """Reads what ``save_moments`` wrote, or the ``mu`` and ``sigma`` of another project.

    Raises:
      UserError: where the file has none, or another extractor made them.
    """
    try:
        arrays = read_npz(path)
        mean, covariance = np.float64(arrays["mu"]), np.float64(arrays["sigma"])
        count = int(arrays["count"]) if "count" in arrays else None
        known = {"file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "count": count}
        made_with = extractor.record
        if "record" in arrays:
            record = json.loads(str(arrays["record"]))
            known, made_with = dict(record["reference"]), record["extractor"]
        maker = _text(made_with)
    except Exception as error:  # a record of others can be anything
        raise UserError(
            f"--reference={path}: not statistics; it needs arrays 'mu' and 'sigma', as "
            "--mode=fid_stats writes them"
        ) from error
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise UserError(
            f"--reference={path}: mu is {list(mean.shape)} and sigma {list(covariance.shape)}; "
            "they must be [d] and [d, d]"
        )
    if not np.allclose(covariance, covariance.T):  # False where it is not finite, too
        raise UserError(f"--reference={path}: sigma is no covariance; make the file anew")
    if made_with != extractor.record:
        raise UserError(
            f"--reference={path}: made with extractor {maker}, but these features are of "
            f"{_text(extractor.record)}; use the same, or make it anew"
        )
    return Reference(known, Moments(mean, covariance, count), None)


def _text(record: dict[str, Any]) -> str:
    weights = record.get("weights_sha256") or record.get("sha256") or ""
    return f"{record['name']} ({weights[:8]})"
