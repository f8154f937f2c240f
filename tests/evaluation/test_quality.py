"""Sets of samples against real images, end to end: the numbers are those of the images."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from jax_ddpm.codecs.pixels import PICTURES
from jax_ddpm.data.source import ArraySource
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation import quality
from jax_ddpm.evaluation.features import Extractor
from jax_ddpm.evaluation.frechet import frechet_distance, moments
from jax_ddpm.evaluation.image_sets import file_set, noised, split_set
from jax_ddpm.evaluation.inception_score import inception_score
from jax_ddpm.evaluation.kernel import kernel_distance
from jax_ddpm.evaluation.memorisation import memorisation
from jax_ddpm.evaluation.quality import Evaluation, measure_quality
from jax_ddpm.evaluation.reference import reference_of, save_moments
from jax_ddpm.images import load_png, save_png
from jax_ddpm.inference.trained import Trained

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

LEVELS, WIDTH, TRAIN, HELDOUT, N, SIZE = 17, 5, 40, 32, 22, 8
WEIGHTS = np.random.default_rng(0).integers(-2, 3, (16, WIDTH)).astype(np.float32)


def project(params, images):
    features = images.reshape(len(images), -1).astype(jnp.float32) @ params / 100
    return features, features[:, :3]


def in_numpy(images):
    features = images.reshape(len(images), -1).astype(np.float32) @ WEIGHTS / np.float32(100)
    return features.astype(np.float64)


@pytest.fixture(scope="module")
def source():
    def split(seed, count):
        batch = tiny.batch(tiny.spec((4, 4, 1), LEVELS), count, seed)
        return batch | {"label": np.arange(count, dtype=np.int32) % 3}

    return ArraySource({"train": split(0, TRAIN), "heldout": split(1, HELDOUT)}, LEVELS, "tiny")


@pytest.fixture(scope="module")
def trained(source):
    config = tiny.config(model__class_conditional=True)
    params = jax.device_get(tiny.network(1, 3).init(jax.random.key(0)))
    result = Trained(config, source.spec, 4, "ema", params)
    result.model = tiny.model(config, source.spec)
    return result


@pytest.fixture
def extractor(monkeypatch):
    """Stands in for a classifier's run."""
    found = Extractor("classifier", project, WEIGHTS, {"name": "classifier", "sha256": "0f"})
    monkeypatch.setattr(quality, "make_extractor", lambda choice, shape: found)
    return found


@pytest.fixture
def what(source, trained, extractor, tmp_path):
    return lambda **changes: Evaluation(
        **{
            "cache": tmp_path / "cache",
            "trained": trained,
            "source": source,
            "num_samples": N,
            "batch_size": SIZE,
        }
        | changes
    )


def samples(trained, seed=0):
    return trained.sample(N + -N % SIZE, seed=seed, batch_size=SIZE)[:N]


def real(source, split):
    images = split_set(source, split)
    return images.read(np.arange(images.count))


def values(measured):
    return {name: found["result"]["value"] for name, found in measured.items()}


ALL = ["fid", "kid", "is", "prdc", "memorisation", "agreement"]


def results(*arguments):
    """The results by name, each with its protocol."""
    record, _ = measure_quality(*arguments)
    return record["measured"]


class TestSamplesOfAModel:
    def test_are_measured_as_the_images_are(self, what, trained, source):
        record, drawings = measure_quality(what(), ALL)
        measured, calibration = record["measured"], record["calibration"]
        assert calibration == {}
        assert len(drawings) == 1
        fake, train, heldout = map(
            in_numpy, (samples(trained), real(source, "train"), real(source, "heldout"))
        )
        found = values(measured)
        exact = frechet_distance(moments(fake), moments(train))
        assert found["fd/classifier"] == pytest.approx(exact, rel=1e-5)
        assert found["kd/classifier"] == pytest.approx(kernel_distance(fake, train).value, rel=1e-4)
        score = inception_score(fake[:, :3]).value
        assert found["is/classifier"] == pytest.approx(score, rel=1e-5)
        closer = memorisation(fake, train, heldout).closer_share.value
        assert found["closer_than_heldout/features"] == pytest.approx(closer)
        pixels = [
            images.reshape(len(images), -1).astype(float)
            for images in (samples(trained), real(source, "train"), real(source, "heldout"))
        ]
        closer = memorisation(*pixels).closer_share.value
        assert found["closer_than_heldout/pixels"] == pytest.approx(closer)
        right = fake[:, :3].argmax(axis=1) == np.arange(N) % 3
        assert found["agreement"] == pytest.approx(right.mean())
        assert set(found) >= {"precision", "recall", "density", "coverage"}

    def test_of_several_seeds(self, what, trained, source):
        measured = results(what(seeds=(3, 4, 5)), ["fid", "agreement"])
        train = moments(in_numpy(real(source, "train")))
        each = [
            frechet_distance(moments(in_numpy(samples(trained, seed))), train) for seed in (3, 4, 5)
        ]
        result = measured["fd/classifier"]["result"]
        assert result["value"] == pytest.approx(np.mean(each), rel=1e-5)
        assert result["std"] == pytest.approx(np.std(each, ddof=1), rel=1e-4)
        assert measured["agreement"]["result"]["count"] == 3 * N

    def test_growing_gives_what_measuring_anew_does(self, what, tmp_path):
        for number in (11, 16, N):
            grown = results(what(num_samples=number), ["fid", "is"])
        anew = results(what(cache=tmp_path / "new"), ["fid", "is"])
        assert grown == anew

    def test_the_cache_may_be_anothers(self, what, trained, source, tmp_path):
        """Measured before: another model, other data, other batches."""
        params = trained.params | {"bias": trained.params["bias"] + np.float32(0.2)}
        changed = Trained(trained.config, trained.spec, 4, "ema", params)
        changed.model = trained.model
        images = {split: source.batch(split, np.arange(20)) for split in ("train", "heldout")}
        for other in (
            {"trained": changed},
            {"source": ArraySource(images, LEVELS, "few")},
            {"batch_size": 12},
            {"seeds": (1,)},
        ):
            measure_quality(what(**other), ["fid", "kid"])
        shared = results(what(), ["fid", "kid"])
        alone = results(what(cache=tmp_path / "new"), ["fid", "kid"])
        assert shared == alone

    def test_protocol(self, what, extractor):
        measured = results(what(), ["fid", "kid", "prdc"])
        protocol = measured["fd/classifier"]["protocol"]
        assert protocol["num_images"] == N
        assert protocol["image_shape"] == [4, 4, 1]
        assert protocol["extractor"] == extractor.record
        assert protocol["reference"] == {"data": "tiny", "split": "train", "count": TRAIN}
        assert measured["kd/classifier"]["protocol"].keys() - protocol.keys() == {"kernel"}
        assert measured["recall"]["protocol"]["neighbours"] == 5
        assert json.loads(json.dumps(measured)) == measured

    @pytest.mark.parametrize("metric", ["is", "agreement"])
    def test_protocol_is_of_the_metric_alone(self, what, metric):
        """It does not depend on what else is measured, nor against what."""
        alone = results(what(), [metric])
        beside = results(what(), ["fid", metric])
        for name, found in alone.items():
            assert beside[name] == found

    def test_the_nearest_are_drawn(self, what, trained, source, tmp_path):
        _, (draw,) = measure_quality(what(), ["memorisation"])
        draw(tmp_path / "new" / "record")
        picture = load_png(tmp_path / "new" / "record_nearest.png")
        fake, train = samples(trained), real(source, "train")
        distances = np.linalg.norm(in_numpy(fake)[:, None] - in_numpy(train), axis=-1)
        cell = picture[4:68, 4:68].reshape(4, 16, 4, 16)[:, 0, :, 0]
        near = np.isclose(distances.min(axis=1), distances.min())
        assert any(np.array_equal(cell, image[..., 0]) for image in fake[near])


class TestCalibration:
    @pytest.mark.parametrize(("reference", "split"), [("train", "heldout"), ("heldout", "train")])
    def test_measures_other_real_images(self, what, source, reference, split):
        given = what(calibrate=True, reference=reference)
        found = measure_quality(given, ["fid", "is"])[0]["calibration"]
        assert [*found] == [split, f"{split} + noise 8", f"{split} + noise 32"]
        against = moments(in_numpy(real(source, reference)))
        images = split_set(source, split)
        for row, these in zip(found, (images, noised(images, 8), noised(images, 32)), strict=True):
            exact = frechet_distance(moments(in_numpy(these.read(np.arange(N)))), against)
            assert found[row]["fd/classifier"]["value"] == pytest.approx(exact, rel=1e-4)
            assert "is/classifier" in found[row]

    def test_takes_no_more_images_than_there_are(self, what, tmp_path):
        """Known before anything is sampled."""
        with pytest.raises(UserError, match="--calibrate") as caught:
            measure_quality(what(calibrate=True, num_samples=HELDOUT + 1), ["fid"])
        assert "\n" not in str(caught.value)
        computed = [path.read_text() for path in tmp_path.glob("cache/*/identity.json")]
        assert not [text for text in computed if '"computes": "samples"' in text]


class TestImagesInFiles:
    @pytest.fixture
    def folder(self, trained, tmp_path):
        for i, image in enumerate(samples(trained)):
            save_png(tmp_path / "folder" / f"{i:06}.png", image)
        return tmp_path / "folder"

    @pytest.fixture
    def npz(self, trained, tmp_path):
        labels = np.arange(N, dtype=np.int32) % 3
        np.savez(tmp_path / "file.npz", images=samples(trained), labels=labels)
        return tmp_path / "file.npz"

    @pytest.mark.parametrize("kind", ["folder", "npz"])
    def test_give_the_results_of_the_model(self, what, request, kind):
        path = request.getfixturevalue(kind)
        metrics = ["fid", "kid", "prdc", "memorisation"]
        files = results(what(samples=path, trained=None, num_samples=None), metrics)
        model = results(what(), metrics)
        assert values(files) == pytest.approx(values(model), rel=1e-6)
        assert all(files[name]["protocol"] == model[name]["protocol"] for name in model)

    def test_with_labels_give_agreement(self, what, npz, folder):
        files = results(what(samples=npz, trained=None), ["agreement"])
        assert files == results(what(), ["agreement"])
        with pytest.raises(UserError, match="--metrics=agreement"):
            measure_quality(what(samples=folder), ["agreement"])

    def test_some_of_them(self, what, folder, source, trained):
        files = results(what(samples=folder, num_samples=9), ["fid"])
        train = moments(in_numpy(real(source, "train")))
        exact = frechet_distance(moments(in_numpy(file_set(folder).read(np.arange(9)))), train)
        assert values(files)["fd/classifier"] == pytest.approx(exact, rel=1e-4)
        assert files["fd/classifier"]["protocol"]["num_images"] == 9

    def test_their_names_decide_nothing(self, what, folder):
        settings = {"samples": folder, "trained": None, "num_samples": 12}
        first = results(what(**settings), ["fid", "is"])
        for path in list(folder.iterdir()):
            path.rename(folder / f"{path.stem[::-1]}.png")
        assert results(what(**settings), ["fid", "is"]) == first

    def test_more_than_there_are_is_refused(self, what, folder):
        with pytest.raises(UserError, match="23 images are wanted, but there are 22"):
            measure_quality(what(samples=folder, num_samples=N + 1), ["fid"])

    def test_against_files(self, what, folder, source, tmp_path):
        for i, image in enumerate(real(source, "train")):
            save_png(tmp_path / "train" / f"{i:06}.png", image)
        given = what(samples=folder, reference=str(tmp_path / "train"), source=None, trained=None)
        found = results(given, ["fid", "prdc"])
        expected = results(what(), ["fid", "prdc"])
        assert values(found) == pytest.approx(values(expected), rel=1e-6)
        assert found["recall"]["protocol"] != expected["recall"]["protocol"]

    def test_against_moments(self, what, folder, source, extractor, tmp_path):
        """The very same result, and protocol, as against the images."""
        images = split_set(source, "train")
        features = quality.extract(extractor, images, TRAIN, SIZE, tmp_path / "cache")
        save_moments(tmp_path / "train.npz", reference_of(features), extractor)
        given = what(reference=str(tmp_path / "train.npz"), source=None)
        assert results(given, ["fid"]) == results(what(), ["fid"])

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_against_moments_of_another_project(self, what, folder, source, tmp_path, dtype):
        train = in_numpy(real(source, "train"))
        mean, covariance = train.mean(axis=0).astype(dtype), np.cov(train.T).astype(dtype)
        np.savez(tmp_path / "train.npz", mu=mean, sigma=covariance)
        given = what(reference=str(tmp_path / "train.npz"), source=None)
        found = results(given, ["fid"])
        expected = results(what(), ["fid"])
        assert values(found) == pytest.approx(values(expected), rel=1e-3)

    def test_moments_of_another_width_are_refused(self, what, folder, tmp_path):
        np.savez(tmp_path / "train.npz", mu=np.zeros(7), sigma=np.eye(7))
        with pytest.raises(UserError, match="moments of 5 and of 7 features"):
            measure_quality(what(samples=folder, reference=str(tmp_path / "train.npz")), ["fid"])

    @pytest.mark.parametrize("kind", ["RGB", "P"])  # palettes of grays
    @pytest.mark.parametrize("of", ["samples", "real"])
    def test_gray_images_kept_in_colour_are_gray(self, what, folder, source, tmp_path, kind, of):
        for i, image in enumerate(real(source, "train")):
            save_png(tmp_path / "train" / f"{i:06}.png", image)
        settings = {"samples": folder, "reference": str(tmp_path / "train")}
        settings |= {"source": None, "trained": None}
        expected = values(results(what(**settings), ["fid", "kid"]))
        for path in (folder if of == "samples" else tmp_path / "train").iterdir():
            Image.open(path).convert(kind).save(path)
        found = values(results(what(**settings), ["fid", "kid"]))
        assert found == pytest.approx(expected, rel=1e-5)

    def test_images_in_colour_are_none(self, what, folder):
        save_png(folder / "000000.png", np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
        with pytest.raises(UserError, match="of 8 of them 1 show more than grays"):
            measure_quality(what(samples=folder), ["fid"])

    @pytest.mark.parametrize("shape", [(4, 5, 3), (4, 5, 1), (8, 8, 1)])
    def test_real_images_of_another_size_are_refused(self, what, folder, tmp_path, shape):
        save_png(tmp_path / "real" / "0.png", np.zeros(shape, np.uint8))
        with pytest.raises(UserError, match="samples are 4×4×1, real images") as caught:
            measure_quality(what(samples=folder, reference=str(tmp_path / "real")), ["fid"])
        assert "×".join(map(str, shape)) in str(caught.value)


def test_the_codec_rounds_alike_everywhere(what, trained, source):
    """Samples and data alike: to the nearest of 0…255."""
    floats = trained.generator(SIZE)(trained.params, 0, SIZE)
    nearest = np.abs(np.clip((floats + 1) * 127.5, 0, 255) - PICTURES.decode(floats))
    assert nearest.max() <= 0.5 + 1e-4
    np.testing.assert_array_equal(PICTURES.decode(floats), samples(trained)[:SIZE])
