"""Moments in files: ours come back to the last bit, others' are read, wrong ones are named."""

import json

import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.features import Extractor, Features, FeatureSet
from jax_ddpm.evaluation.frechet import frechet_distance, moments
from jax_ddpm.evaluation.image_sets import ImageSet
from jax_ddpm.evaluation.reference import (
    holds_moments,
    load_moments,
    reference_of,
    save_moments,
)

WIDTH, COUNT = 4, 60
EXTRACTOR = Extractor("inception", print, None, {"name": "inception", "weights_sha256": "0f" * 32})
FEATURES = np.random.default_rng(0).standard_normal((COUNT, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def reference():
    images = ImageSet({"data": "digits", "split": "train"}, COUNT, print)
    batch = Features(FEATURES, FEATURES)
    return reference_of(FeatureSet(images, COUNT, lambda: iter([batch])))


@pytest.fixture
def path(tmp_path, reference):
    save_moments(tmp_path / "new" / "ours.npz", reference, EXTRACTOR)
    return tmp_path / "new" / "ours.npz"


def rewrite(path, **changes):
    with np.load(path) as stored:
        arrays = dict(stored) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_says_what_it_is(reference):
    assert reference.record == {"data": "digits", "split": "train", "count": COUNT}
    expected = moments(FEATURES)
    np.testing.assert_array_equal(reference.moments.mean, expected.mean)
    np.testing.assert_array_equal(reference.moments.covariance, expected.covariance)


def test_comes_back_to_the_last_bit(path, reference):
    """The record is the same, so that results over either compare."""
    found = load_moments(path, EXTRACTOR)
    assert found.record == json.loads(json.dumps(reference.record))
    assert found.real is None
    assert found.moments.count == COUNT
    assert found.moments.mean.dtype == found.moments.covariance.dtype == np.float64
    np.testing.assert_array_equal(found.moments.mean, reference.moments.mean)
    np.testing.assert_array_equal(found.moments.covariance, reference.moments.covariance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_those_of_other_projects_are_read(tmp_path, reference, dtype):
    path, others = tmp_path / "theirs.npz", reference.moments
    np.savez(path, mu=others.mean.astype(dtype), sigma=others.covariance.astype(dtype))
    found = load_moments(path, EXTRACTOR)
    assert found.moments.count is None
    assert found.record["count"] is None
    assert len(found.record["file_sha256"]) == 64
    samples = moments(FEATURES[: COUNT // 2] + 1)
    exact = frechet_distance(samples, others)
    assert frechet_distance(samples, found.moments) == pytest.approx(exact, rel=1e-5)


def test_ours_are_read_by_other_projects(path):
    with np.load(path, allow_pickle=False) as stored:
        np.testing.assert_allclose(stored["mu"], FEATURES.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(stored["sigma"], np.cov(FEATURES.T), rtol=1e-5)


def test_files_of_moments_are_told_from_those_of_images(path, tmp_path):
    assert holds_moments(path)
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 4, 4, 1), np.uint8))
    (tmp_path / "text.npz").write_text("no arrays")
    for other in ("images.npz", "text.npz", "nothing.npz", "."):
        assert not holds_moments(tmp_path / other)


def refuses(path, extractor=EXTRACTOR):
    with pytest.raises(UserError) as caught:
        load_moments(path, extractor)
    line = str(caught.value)
    assert "\n" not in line
    assert f"--reference={path}" in line
    return line


@pytest.mark.parametrize(
    "other",
    [
        {"name": "inception", "weights_sha256": "0e" * 32},
        {"name": "classifier", "sha256": "0f" * 32},
        EXTRACTOR.record | {"resize": "299"},
    ],
)
def test_of_another_extractor_are_refused(path, other):
    line = refuses(path, EXTRACTOR._replace(record=other))
    assert "inception (0f0f0f0f)" in line
    assert other["name"] in line


@pytest.mark.parametrize(
    ("mean", "covariance"),
    [((5,), (4, 4)), ((4,), (4, 5)), ((4,), (4,)), ((1, 4), (4, 4)), ((), ()), ((0,), (4, 4))],
)
def test_of_wrong_shapes_are_refused(path, mean, covariance):
    rewrite(path, mu=np.zeros(mean), sigma=np.zeros(covariance))
    line = refuses(path)
    assert f"mu is {list(mean)}" in line
    assert f"sigma {list(covariance)}" in line


ASYMMETRIC = np.eye(4) + np.diag([0.3, 0.3, 0.3], 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"mu": None},
        {"sigma": None},
        {"mu": np.array(["a"] * 4)},
        {"count": np.array([1, 2])},
        {"record": np.array("{")},
        {"record": np.array("[]")},
        {"record": np.array('"text"')},
        {"record": np.array("[1]")},
        {"record": np.array('{"reference": {}}')},
        {"record": np.array('{"reference": {}, "extractor": {"weights_sha256": "0f"}}')},
        {"record": np.array('{"reference": {}, "extractor": null}')},
        {"sigma": ASYMMETRIC},
        {"sigma": np.full((4, 4), np.nan)},
    ],
    ids=lambda changes: "-".join(f"{name}_{array}" for name, array in changes.items())[:40],
)
def test_damaged_ones_are_refused(path, changes):
    rewrite(path, **changes)
    refuses(path)


@pytest.mark.parametrize("damage", ["truncated", "text", "nothing"])
def test_what_is_no_file_of_arrays_is_refused(path, damage):
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-40], "text": b"no arrays", "nothing": b""}[damage])
    refuses(path)
