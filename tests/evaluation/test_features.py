"""Features streamed over devices and kept: each image once, in order, whatever happens.

The extractor is a projection by small whole numbers, whose float32 sums are exact, so that NumPy
gives the same bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation import features as module
from jax_ddpm.evaluation.features import Extractor, extract
from jax_ddpm.evaluation.image_sets import ImageSet
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.runtime.stopping import Stopped

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

WEIGHTS = np.random.default_rng(0).integers(-4, 5, (12, 5)).astype(np.float32)
PIXELS = np.random.default_rng(1).integers(0, 256, (103, 2, 3, 2), dtype=np.uint8)


class Killed(BaseException):
    """Caught as little as SIGKILL."""


def project(params, images):
    features = images.reshape(len(images), -1).astype(jnp.float32) @ params
    return features, features[:, :3] - 1


EXTRACTOR = Extractor("projection", project, WEIGHTS, {"name": "projection", "sha256": "0f"})


class Images:
    """The first ``count`` of PIXELS, noting which are read; dies before read number ``last``."""

    def __init__(self, count=103, last=None, **identity):
        self.reads, self.last = [], last
        self.set = ImageSet({"data": "pixels"} | identity, count, self._read)

    def _read(self, index):
        if len(self.reads) == self.last:
            raise Killed
        self.reads.append(index.tolist())
        return PIXELS[index]


def expected(count):
    return PIXELS[:count].reshape(count, -1).astype(np.float32) @ WEIGHTS


def assert_exact(found, count):
    features, logits = found.everything()
    assert (features.dtype, logits.dtype) == (np.float32, np.float32)
    np.testing.assert_array_equal(features, expected(count))
    np.testing.assert_array_equal(logits, expected(count)[:, :3] - 1)


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 7, 8, 64, 200])
@pytest.mark.parametrize("count", [1, 8, 9, 102, 103])
def test_are_of_exactly_these_images(tmp_path, monkeypatch, num_devices, batch_size, count):
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    monkeypatch.setattr(module, "make_mesh", lambda: mesh)
    found = extract(EXTRACTOR, Images().set, count, batch_size, tmp_path)
    assert found.count == count
    assert_exact(found, count)
    np.testing.assert_array_equal(found.pixels(), PIXELS[:count].reshape(count, -1))
    assert found.pixels().dtype == np.float32


def test_every_device_has_its_share(tmp_path):
    """A batch of 8 is 2 images on each of 4 devices."""
    sizes = []

    def apply(params, images):
        jax.debug.inspect_array_sharding(
            images, callback=lambda sharding: sizes.append(sharding.shard_shape(images.shape)[0])
        )
        return project(params, images)

    extract(EXTRACTOR._replace(apply=apply), Images().set, 20, 8, tmp_path)
    assert set(sizes) == {2}


def test_products_are_at_full_precision(tmp_path):
    precisions = []

    def apply(params, images):
        precisions.append(jax.config.jax_default_matmul_precision)
        return project(params, images)

    extract(EXTRACTOR._replace(apply=apply), Images().set, 8, 8, tmp_path)
    assert precisions == ["highest"]


def test_moments_are_numpys(tmp_path):
    found = extract(EXTRACTOR, Images().set, 97, 8, tmp_path).moments()
    features = expected(97).astype(np.float64)
    assert found.count == 97
    np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.T), rtol=1e-10)


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="104 images are wanted, but there are 103"):
        extract(EXTRACTOR, Images().set, 104, 8, tmp_path)


OTHERS = {
    "weights": ({"record": {"name": "projection", "sha256": "0e"}}, {}, 8),
    "name": ({"record": {"name": "other", "sha256": "0f"}}, {}, 8),
    "resize": ({"record": EXTRACTOR.record | {"resize": "299"}}, {}, 8),
    "data": ({}, {"data": "others"}, 8),
    "split": ({}, {"split": "heldout"}, 8),
    "noise": ({}, {"noise": 8}, 8),
    "seed": ({}, {"seed": 1}, 8),
    "batch_size": ({}, {}, 12),
}


class TestCache:
    def test_is_not_computed_again(self, tmp_path):
        extract(EXTRACTOR, Images().set, 103, 8, tmp_path)
        again = Images(last=0)
        assert_exact(extract(EXTRACTOR, again.set, 103, 8, tmp_path), 103)
        assert_exact(extract(EXTRACTOR, again.set, 20, 8, tmp_path), 20)

    @pytest.mark.parametrize(("few", "many"), [(8, 103), (12, 96), (20, 40)])
    def test_grows_with_what_is_asked_for(self, tmp_path, few, many):
        extract(EXTRACTOR, Images().set, few, 8, tmp_path)
        images = Images()
        assert_exact(extract(EXTRACTOR, images.set, many, 8, tmp_path), many)
        assert len(images.reads) == -(-many // 8) - -(-few // 8)

    @pytest.mark.parametrize(("few", "many"), [(8, 24), (20, 103), (4, 8), (16, 32)])
    @pytest.mark.parametrize("batch_size", [8, 12])
    def test_grows_with_the_set(self, tmp_path, few, many, batch_size):
        """Samples do; the last batch of fewer may be short of images."""
        assert_exact(extract(EXTRACTOR, Images(few).set, few, batch_size, tmp_path), few)
        assert_exact(extract(EXTRACTOR, Images(many).set, many, batch_size, tmp_path), many)
        assert_exact(extract(EXTRACTOR, Images(few).set, few, batch_size, tmp_path), few)

    @pytest.mark.parametrize("other", OTHERS)
    def test_holds_what_differs_apart(self, tmp_path, other):
        extractor, identity, batch_size = OTHERS[other]
        extract(EXTRACTOR, Images().set, 20, 8, tmp_path)
        images = Images(**identity)
        extract(EXTRACTOR._replace(**extractor), images.set, 20, batch_size, tmp_path)
        assert len(images.reads) == -(-20 // batch_size)
        assert len([*tmp_path.iterdir()]) == 2

    @pytest.mark.parametrize("last", range(13))
    def test_killed_goes_on(self, tmp_path, last):
        """Two batches at most were under way."""
        killed, images = Images(last=last), Images()
        with pytest.raises(Killed):
            extract(EXTRACTOR, killed.set, 103, 8, tmp_path)
        kept = len([*tmp_path.glob("*/*.npz")])
        assert kept >= last - 2
        assert_exact(extract(EXTRACTOR, images.set, 103, 8, tmp_path), 103)
        assert len(images.reads) == 13 - kept

    @pytest.mark.parametrize("polls", range(14))
    def test_stopped_keeps_all_that_was_begun(self, tmp_path, polls):
        begun, images, left = Images(), Images(), iter(range(polls))

        def poll():
            if next(left, None) is None:
                raise Stopped

        if polls < 13:
            with pytest.raises(Stopped):
                extract(EXTRACTOR, begun.set, 103, 8, tmp_path, poll)
        else:
            extract(EXTRACTOR, begun.set, 103, 8, tmp_path, poll)
        assert len(begun.reads) == min(polls, 13)
        assert_exact(extract(EXTRACTOR, images.set, 103, 8, tmp_path), 103)
        assert len(begun.reads) + len(images.reads) == 13
