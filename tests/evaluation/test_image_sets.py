"""Sets of images: which image is which, and that the cache never gives another's."""

import io
import pathlib
import zlib

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from jax_ddpm.data.digits import digits
from jax_ddpm.data.source import ArraySource
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.image_sets import ImageSet, file_set, noised, sample_set, split_set
from jax_ddpm.generate import Generator
from jax_ddpm.images import save_png
from jax_ddpm.inference import trained as trained_module
from jax_ddpm.inference.trained import Trained
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.runtime.stopping import Stopped

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

# A chain of 8 steps whose β can be changed.
pytestmark = pytest.mark.filterwarnings("ignore:the schedule leaves signal")
SPEC = tiny.spec((4, 4, 1))


def trained(step=4, item="ema", spec=SPEC, shift=0.0, **fields) -> Trained:
    """A model of a few parameters; conditional where the data has classes."""
    usual = {"model__class_conditional": spec.num_classes > 0, "process__name": "linear"}
    usual |= {"process__beta_start": 1e-4, "process__beta_end": 2e-3}
    config = tiny.config(**usual | fields)
    params = tiny.network(spec.image_shape[-1], spec.num_classes).init(jax.random.key(0))
    params = jax.device_get(params) | {"bias": np.float32(params["bias"] + shift)}
    result = Trained(config, spec, step, item, params)
    result.model = tiny.model(config, spec)
    return result


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture
def drawn(monkeypatch):
    """The first number of each batch that a generator is asked for."""
    starts, draw = [], Generator.draw

    def noted(wanted):
        for start in wanted:
            starts.append(start)
            yield start

    def spy(self, params, seed, wanted, *rest, **named):
        return draw(self, params, seed, noted(wanted), *rest, **named)

    monkeypatch.setattr(Generator, "draw", spy)
    return starts


def everything(images: ImageSet):
    return images.read(np.arange(images.count))


OTHERS = {
    "checkpoint": {"step": 8},
    "raw": {"item": "params"},
    "parameters": {"shift": 0.1},
    "clip": {"sampling__clip": False},
    "steps": {"sampling__num_steps": 3},
    "guidance": {"sampling__guidance_scale": 2.0},
    "unconditional": {"sampling__guidance_scale": 0.0},
    "schedule": {"process__name": "cosine"},
    "chain": {"process__num_timesteps": 9},
    "first_beta": {"process__beta_start": 2e-4},
    "last_beta": {"process__beta_end": 3e-3},
    "target": {"parameterisation__target": "v"},
    "variance": {"parameterisation__variance": "fixedsmall"},
    "dtype": {"model__dtype": "bfloat16"},
}


class TestSampleSet:
    @pytest.mark.parametrize(("number", "size"), [(8, 8), (11, 4), (11, 8), (3, 3), (20, 6)])
    @pytest.mark.parametrize("seed", [0, 7])
    def test_is_what_the_model_samples(self, model, tmp_path, number, size, seed):
        """They agree to the last bit, where the batches have the same size."""
        found = sample_set(model, seed, number, size, tmp_path)
        whole = model.generator(size).batch_size
        expected = model.sample(found.count, seed=seed, batch_size=whole)
        assert number <= found.count < number + whole
        np.testing.assert_array_equal(everything(found), expected)

    def test_of_a_diverged_model_is_none(self, model, tmp_path, monkeypatch):
        broken = jax.tree.map(lambda x: np.full_like(x, np.nan), model.params)
        monkeypatch.setattr(model, "params", broken)
        with pytest.raises(UserError, match=r"^samples of seed 3 are not finite: 0, 1"):
            sample_set(model, 3, 8, 4, tmp_path)
        assert not [*tmp_path.rglob("*.npz")]

    def test_an_image_does_not_depend_on_the_batches(self, model, tmp_path, monkeypatch):
        expected = model.sample(12).astype(int)
        for size in (4, 8, 12):
            found = everything(sample_set(model, 0, 12, size, tmp_path))[:12]
            np.testing.assert_allclose(found, expected, atol=1)
        mesh = make_mesh(devices=jax.devices()[:1])
        monkeypatch.setattr(trained_module, "make_mesh", lambda: mesh)
        found = everything(sample_set(trained(), 0, 12, 3, tmp_path))
        np.testing.assert_allclose(found, expected, atol=1)

    def test_is_read_in_any_order(self, model, tmp_path):
        found = sample_set(model, 0, 24, 4, tmp_path)
        order = np.random.default_rng(0).integers(0, 24, 50)
        np.testing.assert_array_equal(found.read(order), everything(found)[order])

    def test_classes_take_turns(self, model, tmp_path):
        found = sample_set(model, 0, 11, 4, tmp_path)
        np.testing.assert_array_equal(found.labels, np.arange(12) % 3)
        assert (
            sample_set(trained(spec=tiny.spec((4, 4, 1), 17, 0)), 0, 3, 4, tmp_path).labels is None
        )

    def test_shape_is_that_of_the_data(self, tmp_path):
        colour = trained(spec=tiny.spec((4, 6, 3)))
        assert sample_set(colour, 0, 2, 4, tmp_path).shape() == (4, 6, 3)

    def test_grows_by_what_is_missing(self, model, tmp_path, drawn):
        few = everything(sample_set(model, 0, 6, 4, tmp_path))
        assert drawn == [0, 4]
        many = everything(sample_set(model, 0, 15, 4, tmp_path))
        assert drawn == [0, 4, 8, 12]
        np.testing.assert_array_equal(many[:8], few)
        np.testing.assert_array_equal(everything(sample_set(model, 0, 3, 4, tmp_path)), few[:4])
        assert drawn == [0, 4, 8, 12]
        np.testing.assert_array_equal(many, model.sample(16, batch_size=4))

    @pytest.mark.parametrize("other", OTHERS)
    def test_of_another_model_is_not_taken_from_the_cache(self, model, tmp_path, other):
        sample_set(model, 0, 8, 8, tmp_path / "shared")
        changed = trained(**OTHERS[other])
        shared, alone = (sample_set(changed, 0, 8, 8, tmp_path / c) for c in ("shared", "alone"))
        assert len([*(tmp_path / "shared").iterdir()]) == 2
        np.testing.assert_array_equal(everything(shared), everything(alone))

    @pytest.mark.parametrize("other", [{"seed": 1}, {"batch_size": 4}])
    def test_of_another_seed_or_batch_size_neither(self, model, tmp_path, other):
        usual = {"seed": 0, "num_samples": 8, "batch_size": 8}
        first = sample_set(model, **usual, cache=tmp_path)
        second = sample_set(model, **usual | other, cache=tmp_path)
        assert len([*tmp_path.iterdir()]) == 2
        assert first.identity != second.identity

    def test_of_another_random_number_generator_neither(self, model, tmp_path):
        """The record names the one in force, so the samples must be its own."""
        with jax.default_prng_impl("rbg"):
            alone = everything(sample_set(model, 0, 8, 8, tmp_path / "alone"))
        usual = everything(sample_set(model, 0, 8, 8, tmp_path / "shared"))
        with jax.default_prng_impl("rbg"):
            shared = everything(sample_set(model, 0, 8, 8, tmp_path / "shared"))
        assert np.any(alone != usual)
        np.testing.assert_array_equal(shared, alone)

    @pytest.mark.parametrize("polls", range(5))
    def test_stopped_keeps_what_was_drawn(self, model, tmp_path, drawn, polls):
        expected = everything(sample_set(model, 0, 16, 4, tmp_path / "undisturbed"))
        del drawn[:]
        left = iter(range(polls))

        def poll():
            if next(left, None) is None:
                raise Stopped

        if polls < 4:
            with pytest.raises(Stopped):
                sample_set(model, 0, 16, 4, tmp_path / "cache", poll)
        del drawn[polls:]  # what it was about to draw
        found = sample_set(model, 0, 16, 4, tmp_path / "cache")
        assert drawn == [0, 4, 8, 12]
        np.testing.assert_array_equal(everything(found), expected)


class TestSplitSet:
    @pytest.mark.parametrize("split", ["train", "heldout"])
    def test_has_every_image_once(self, split):
        source = digits()
        size = source.spec.split_sizes[split]
        found = split_set(source, split)
        assert found.count == size
        levels = source.batch(split, np.arange(size))["image"]
        expected = np.floor(levels * (255 / 16) + 0.5).astype(np.uint8)
        order = lambda images: images[np.lexsort(images.reshape(size, -1).T)]  # noqa: E731
        np.testing.assert_array_equal(order(everything(found)), order(expected))

    def test_order_is_random_and_always_the_same(self):
        source, again = digits(), split_set(digits(), "train")
        found = everything(split_set(source, "train"))
        np.testing.assert_array_equal(everything(again), found)
        assert np.any(found[:8] != split_set(source, "train").read(np.arange(8))[::-1])
        levels = source.batch("train", np.arange(8))["image"]
        assert np.any(found[:8] != np.round(levels * (255 / 16)))
        np.testing.assert_array_equal(again.read(np.array([9, 2, 9])), found[[9, 2, 9]])

    def test_bytes_stay_as_they_are(self):
        levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
        source = ArraySource({"train": {"image": levels}}, 256, "levels")
        np.testing.assert_array_equal(everything(split_set(source, "train")), levels)

    def test_identity_tells_data_and_split_apart(self):
        image = {"image": np.zeros((2, 4, 4, 1), np.uint8)}
        sources = [ArraySource({"train": image, "heldout": image}, 256, name) for name in "ab"]
        identities = [
            str(split_set(source, split).identity)
            for source in sources
            for split in ("train", "heldout")
        ]
        assert len(set(identities)) == 4


def png(pixels, mode=None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, "PNG")
    return file.getvalue()


def colours(seed, size=(4, 6)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


IMAGES = np.zeros((3, 4, 4, 1), np.uint8)
WRONG = {
    "float": {"images": IMAGES / 255},
    "levels_of_int64": {"images": IMAGES.astype(np.int64)},
    "flat": {"images": IMAGES.reshape(3, -1)},
    "without_channels": {"images": IMAGES[..., 0]},
    "empty": {"images": IMAGES[:0]},
    "no_images": {"a": IMAGES, "b": IMAGES},
    "objects": {"images": np.array([IMAGES, None], object)},
    "two_channels": {"images": IMAGES.repeat(2, axis=-1)},
    "four_channels": {"images": IMAGES.repeat(4, axis=-1)},
    "no_pixels": {"images": IMAGES[:, :0]},
    "too_few_labels": {"images": IMAGES, "labels": np.arange(2)},
    "too_many_labels": {"images": IMAGES, "labels": np.arange(4)},
    "labels_of_floats": {"images": IMAGES, "labels": np.arange(3.0)},
    "one_hot_labels": {"images": IMAGES, "labels": np.eye(3, dtype=int)},
}


def in_order(images):
    """The images as rows, in an order of their own."""
    rows = images.reshape(len(images), -1)
    return rows[np.lexsort(rows.T)]


class TestFileSet:
    @pytest.fixture
    def folder(self, tmp_path):
        """Five colour images whose order by name is not that of their making."""
        folder = tmp_path / "folder"
        for i in (3, 0, 4, 1, 2):
            save_png(folder / f"{i:06}.png", colours(i))
        return folder

    @pytest.mark.parametrize("channels", [1, 3])
    def test_folder_has_every_image_once(self, tmp_path, channels):
        images = np.random.default_rng(0).integers(0, 256, (12, 4, 6, channels), dtype=np.uint8)
        for i, image in enumerate(images):
            save_png(tmp_path / f"{i:06}.png", image)
        found = file_set(tmp_path)
        assert (found.count, found.shape(), found.labels) == (12, (4, 6, channels), None)
        np.testing.assert_array_equal(in_order(everything(found)), in_order(images))

    @pytest.mark.parametrize("name", ["images", "arr_0", "samples"])
    def test_npz(self, tmp_path, name):
        images = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
        np.savez(tmp_path / "file.npz", **{name: images})
        found = file_set(tmp_path / "file.npz")
        assert found.labels is None
        np.testing.assert_array_equal(in_order(everything(found)), in_order(images))

    def test_npz_of_guided_diffusion(self, tmp_path):
        images, labels = np.zeros((3, 4, 4, 3), np.uint8), np.array([2, 0, 1])
        np.savez(tmp_path / "file.npz", images, labels)
        assert sorted(file_set(tmp_path / "file.npz").labels) == [0, 1, 2]

    def test_other_arrays_of_an_npz_are_named(self, tmp_path):
        np.savez(tmp_path / "file.npz", images=IMAGES, label=np.arange(3))
        with pytest.warns(UserWarning, match="left out: label$"):
            assert file_set(tmp_path / "file.npz").labels is None

    def test_npz_with_labels(self, tmp_path):
        """Each stays with its image, also where one image has two."""
        labels = np.array([2, 0, 1, 7, 8, 9], np.int32)
        images = np.zeros((6, 4, 4, 1), np.uint8)
        images[:3, 0, 0, 0] = labels[:3]
        parts = []
        for order in ([0, 1, 2, 3, 4, 5], [4, 0, 5, 3, 1, 2]):
            np.savez(tmp_path / "file.npz", images=images[order], labels=labels[order])
            found = file_set(tmp_path / "file.npz")
            pixels = everything(found)[:, 0, 0, 0]
            assert sorted(found.labels) == sorted(labels)
            np.testing.assert_array_equal(pixels, np.where(found.labels < 3, found.labels, 0))
            parts.append(found.labels)
        np.testing.assert_array_equal(*parts)

    @pytest.mark.parametrize("kind", ["folder", "npz"])
    def test_names_and_places_of_images_change_nothing(self, tmp_path, kind):
        """Sorted by brightness as they are, the first hundred are no part of it to measure."""
        brightness = np.arange(200, dtype=np.uint8).reshape(-1, 1, 1, 1)
        images = np.broadcast_to(brightness, (200, 2, 2, 1))
        found, straight = [], np.arange(200)
        for order in (straight, straight[::-1], np.random.default_rng(0).permutation(200)):
            path = tmp_path / f"set{len(found)}"
            if kind == "npz":
                np.savez(path := path.with_suffix(".npz"), images=images[order])
            else:
                for i, image in enumerate(images[order]):
                    save_png(path / f"{i:03}.png", image)
            found.append(file_set(path))
        for other in found[1:]:
            np.testing.assert_array_equal(everything(other), everything(found[0]))
            assert kind == "npz" or other.identity == found[0].identity
        means = [part.mean() for part in np.split(everything(found[0]), 4)]
        np.testing.assert_allclose(means, brightness.mean(), atol=4 * 57.7 / np.sqrt(50))
        assert found[0].identity["order"] == "shuffled by contents"

    def test_copies_are_spread_like_other_images(self, tmp_path):
        images = np.zeros((400, 2, 2, 1), np.uint8)
        images[:200, 0, 0, 0] = np.arange(200) + 1
        np.savez(tmp_path / "file.npz", images=images)
        copies = everything(file_set(tmp_path / "file.npz")).reshape(4, 100, -1).max(-1) == 0
        np.testing.assert_allclose(copies.mean(axis=1), 0.5, atol=0.2)

    def test_transparency_is_laid_on_white(self, tmp_path):
        pixels = np.zeros((4, 6, 4), np.uint8)
        (tmp_path / "a.png").write_bytes(png(pixels))
        np.testing.assert_array_equal(everything(file_set(tmp_path)), np.full((1, 4, 6, 3), 255))

    def test_identity_is_of_the_content(self, folder, tmp_path):
        first = file_set(folder).identity
        assert file_set(folder.rename(tmp_path / "elsewhere")).identity == first
        save_png(tmp_path / "elsewhere" / "000002.png", colours(7))
        assert file_set(tmp_path / "elsewhere").identity != first

    def test_identity_tells_every_content_apart(self, folder, tmp_path):
        path, identities = tmp_path / "file.npz", [file_set(folder).identity]
        (folder / "000003.png").unlink()
        identities.append(file_set(folder).identity)
        for images in (IMAGES, IMAGES + 1):
            np.savez(path, images=images)
            identities.append(file_set(path).identity)
        assert len({str(identity) for identity in identities}) == 4

    @pytest.mark.parametrize("first", ["gray", "colour"])
    def test_colour_is_never_lost(self, folder, first):
        """One gray file, which some encoders make of a gray colour image, decides nothing."""
        gray = np.full((4, 6), 77, np.uint8)
        name = "000000.png" if first == "gray" else "000004.png"
        (folder / name).write_bytes(png(gray))
        found = in_order(everything(file_set(folder))).tolist()
        for i in range(1, 4):
            assert colours(i).ravel().tolist() in found

    @staticmethod
    def refuses(path):
        with pytest.raises(UserError) as caught:
            everything(file_set(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("place", ["000000.png", "000003.png"])
    @pytest.mark.parametrize("damage", ["truncated", "empty", "text", "bomb"])
    def test_unreadable_files_are_named(self, folder, place, damage):
        content = (folder / place).read_bytes()
        header = bytearray(png(colours(0)))
        header[16:24] = (100_000).to_bytes(4, "big") * 2  # pixels a side, in IHDR
        header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
        bad = {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "text": b"no picture",
            "bomb": bytes(header),
        }
        (folder / place).write_bytes(bad[damage])
        assert place in self.refuses(folder)

    @pytest.mark.parametrize("place", ["000000.png", "000003.png"])
    def test_mixed_sizes_are_refused(self, folder, place):
        save_png(folder / place, colours(0, (4, 5)))
        line = self.refuses(folder)
        assert "6×4" in line
        assert "5×4" in line

    def test_nothing_there_is_refused(self, tmp_path):
        assert "no images there (.png .jpg" in self.refuses(tmp_path)
        assert "nothing.npz" in self.refuses(tmp_path / "nothing.npz")

    @pytest.mark.parametrize("wrong", WRONG)
    def test_other_arrays_are_refused(self, tmp_path, wrong):
        path = tmp_path / "file.npz"
        np.savez(path, **WRONG[wrong])
        assert str(path) in self.refuses(path)

    @pytest.mark.parametrize("wrong", ["truncated", "text", "npy"])
    def test_other_files_are_refused(self, tmp_path, wrong):
        path = tmp_path / "file.npz"
        np.savez(path, images=IMAGES)
        content = path.read_bytes()
        array = io.BytesIO()
        np.save(array, IMAGES)
        bad = {"truncated": content[:-30], "text": b"no arrays", "npy": array.getvalue()}
        path.write_bytes(bad[wrong])
        assert str(path) in self.refuses(path)


class TestNoised:
    @pytest.fixture
    def gray(self):
        pixels = np.full((50, 16, 16, 1), 128, np.uint8)
        return ImageSet({"data": "gray"}, 50, pixels.__getitem__, np.arange(50) % 3)

    @pytest.mark.parametrize("std", [8, 32])
    def test_has_the_standard_deviation(self, gray, std):
        noise = everything(noised(gray, std)).astype(float) - 128
        expected = np.sqrt(std**2 + 1 / 12)  # of rounding
        assert noise.std() == pytest.approx(expected, rel=0.02)
        assert abs(noise.mean()) < 5 * std / np.sqrt(noise.size)
        assert len(np.unique(noise.reshape(50, -1), axis=0)) == 50

    def test_is_keyed_by_the_number(self, gray):
        found = noised(gray, 32)
        whole, order = everything(found), np.array([7, 3, 3, 49])
        np.testing.assert_array_equal(found.read(order), whole[order])
        parts = [found.read(np.arange(start, start + 10)) for start in range(0, 50, 10)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)

    def test_is_clipped_not_wrapped(self):
        ends = np.repeat(np.array([0, 255], np.uint8), 2000).reshape(2, 2000, 1, 1)
        found = everything(noised(ImageSet({}, 2, ends.__getitem__), 8)).astype(int)
        assert found[0].max() < 60
        assert found[1].min() > 195
        assert np.mean(found[0] == 0) > 0.45

    def test_identity_tells_levels_apart(self, gray):
        identities = [str(images.identity) for images in (gray, noised(gray, 8), noised(gray, 32))]
        assert len(set(identities)) == 3
        np.testing.assert_array_equal(noised(gray, 8).labels, gray.labels)


def test_reading_keeps_no_files_open(tmp_path):
    """Thousands of pictures must not exhaust the limit."""
    save_png(tmp_path / "a.png", colours(0))
    found, fds = file_set(tmp_path), pathlib.Path("/proc/self/fd")
    before = len([*fds.iterdir()])
    for _ in range(5):
        found.read(np.zeros(3, int))
    assert len([*fds.iterdir()]) == before
