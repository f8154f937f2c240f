import pathlib

import numpy as np
import pytest
from PIL import Image

from jax_ddpm.errors import UserError
from jax_ddpm.images import (
    grid,
    load_png,
    note_of,
    save_gif,
    save_grid,
    save_png,
)


class TestGrid:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize(("count", "columns"), [(1, 1), (6, 3), (7, 3), (2, 5)])
    def test_shows_each_image_between_white_gaps(self, channels, count, columns):
        images = np.random.default_rng(0).integers(0, 200, (count, 4, 6, channels), dtype=np.uint8)
        picture, gap, rows = grid(images, columns, min_size=1), 2, -(-count // columns)
        assert picture.shape == (gap + rows * (4 + gap), gap + columns * (6 + gap), channels)
        for i, image in enumerate(images):
            top, left = gap + i // columns * (4 + gap), gap + i % columns * (6 + gap)
            cell = picture[top : top + 4, left : left + 6]
            np.testing.assert_array_equal(cell, image)
            cell[:] = 255
        assert np.all(picture == 255), "gaps and missing images are white"

    @pytest.mark.parametrize(("size", "factor"), [(8, 8), (28, 2), (33, 1), (64, 1), (100, 1)])
    def test_enlarges_small_images_by_the_largest_whole_factor(self, size, factor):
        image = np.random.default_rng(0).integers(0, 255, (1, size, size, 1), dtype=np.uint8)
        picture = grid(image, 1, min_size=64)
        gap = (len(picture) - factor * size) // 2
        assert gap >= 2
        shown = picture[gap:-gap, gap:-gap]
        np.testing.assert_array_equal(shown, np.kron(image[0], np.ones((factor, factor, 1))))

    HEADS = ("cat", "dog", "an owl with a very long name")

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("size", [4, 64, 256])
    def test_heads_stand_above_their_columns(self, size, channels):
        images = np.zeros((5, size, size, channels), np.uint8)
        plain, headed = grid(images, 3), grid(images, 3, self.HEADS)
        height = len(headed) - len(plain)
        np.testing.assert_array_equal(headed[height:], plain)
        line = headed[:height]
        gap = int(plain[len(plain) // 4, :, 0].argmin())
        cell = (plain.shape[1] - gap) // 3
        for i in range(3):
            left = gap + i * cell
            assert line[:, left : left + cell - gap].min() < 128, "a word"
            assert line[:, left + cell - gap : left + cell].min() == 255, "and white beside it"
        assert np.all(line == line[..., :1])
        assert np.all(line[[0, -1]] == 255), "nothing is cut above or below"

    def test_heads_tell_columns_apart(self):
        images = np.zeros((2, 64, 64, 1), np.uint8)
        one, other = grid(images, 2, ("cat", "dog")), grid(images, 2, ("cat", "owl"))
        assert np.any(one != other)
        np.testing.assert_array_equal(one[:, :72], other[:, :72])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_file(tmp_path, channels, mode):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, channels), dtype=np.uint8)
    path = tmp_path / "new" / "folder" / "grid.png"
    save_grid(path, images, columns=3)
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", mode)
        pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    np.testing.assert_array_equal(pixels, grid(images, 3))


class TestGif:
    @staticmethod
    def moments(count, channels=1):
        return np.random.default_rng(0).integers(0, 256, (count, 5, 8, 8, channels), dtype=np.uint8)

    @staticmethod
    def frames(path):
        with Image.open(path) as film:
            assert film.format == "GIF"
            for i in range(film.n_frames):
                film.seek(i)
                yield film.copy(), film.info["duration"]

    def test_shows_the_grid_of_each_moment(self, tmp_path):
        """Gray to the last level; the enlarged images are half as large as in a PNG."""
        path, moments = tmp_path / "new" / "film.gif", self.moments(6)
        save_gif(path, moments, columns=3)
        shown = [np.asarray(frame.convert("L")) for frame, _ in self.frames(path)]
        expected = [grid(x, 3, min_size=32)[..., 0] for x in moments]
        np.testing.assert_array_equal(shown, expected)
        assert [*path.parent.iterdir()] == [path]

    def test_shows_colours_as_near_as_256_of_them_allow(self, tmp_path):
        moments = self.moments(3, channels=3)
        moments[:, :, :, 4:] = moments[:, :, :, :4]  # 160 colours in each
        save_gif(tmp_path / "film.gif", moments, columns=3)
        for (frame, _), x in zip(self.frames(tmp_path / "film.gif"), moments, strict=True):
            expected = grid(x, 3, min_size=32)
            assert np.abs(np.asarray(frame.convert("RGB")) - expected.astype(int)).mean() < 3

    @pytest.mark.parametrize(("count", "each"), [(2, 2000), (8, 500), (40, 100), (250, 20)])
    def test_takes_four_seconds_and_then_holds_its_end(self, tmp_path, count, each):
        """Only frames that viewers would slow down, shorter than 20 ms, are excepted."""
        save_gif(tmp_path / "film.gif", self.moments(count), columns=3)
        durations = [duration for _, duration in self.frames(tmp_path / "film.gif")]
        assert durations == [each] * (count - 1) + [2000]

    def test_repeats_for_ever(self, tmp_path):
        save_gif(tmp_path / "film.gif", self.moments(2), columns=3)
        with Image.open(tmp_path / "film.gif") as film:
            assert film.info["loop"] == 0


class TestPng:
    @staticmethod
    def image(seed, channels=3, shape=(5, 7)):
        return np.random.default_rng(seed).integers(0, 256, (*shape, channels), dtype=np.uint8)

    @pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 1)])
    @pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
    def test_round_trip(self, tmp_path, channels, mode, shape):
        path, image = tmp_path / "new" / "folder" / "image.png", self.image(0, channels, shape)
        save_png(path, image)
        found = load_png(path)
        assert found.shape == image.shape
        np.testing.assert_array_equal(found, image)
        with Image.open(path) as picture:
            assert (picture.format, picture.mode) == ("PNG", mode)
        assert [*path.parent.iterdir()] == [path]

    def test_any_byte_that_has_changed_is_noticed(self, tmp_path):
        """Pillow itself reads on past wrong checksums."""
        path = tmp_path / "image.png"
        save_png(path, self.image(0))
        content = path.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1
            path.write_bytes(changed)
            try:  # the end of the file may differ, which holds no pixels
                np.testing.assert_array_equal(load_png(path), self.image(0))
                assert place >= len(content) - 12
            except UserError as error:
                assert str(error) == f"{path}: no whole PNG; remove it and repeat"  # noqa: PT017
        for length in range(0, len(content) - 12, 7):
            path.write_bytes(content[:length])
            with pytest.raises(UserError, match=r"image.png: no whole PNG; remove it"):
                load_png(path)

    def test_same_image_same_bytes(self, tmp_path):
        for name in ("one.png", "other.png"):
            save_png(tmp_path / name, self.image(0))
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()

    @pytest.mark.parametrize("where", ["save", "replace"])
    @pytest.mark.parametrize("exists", [False, True])
    def test_killed_leaves_the_old_file_or_none(self, tmp_path, monkeypatch, where, exists):
        """The kill comes halfway through the new one, or right before it replaces the old one."""
        path, save = tmp_path / "image.png", Image.Image.save
        if exists:
            save_png(path, self.image(0))

        def halfway(picture, target, *arguments, **options):
            save(picture, target, *arguments, **options)
            target.truncate(50)
            raise KeyboardInterrupt

        def kill(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            if where == "save":
                patch.setattr(Image.Image, "save", halfway)
            else:
                patch.setattr(pathlib.Path, "replace", kill)
            with pytest.raises(KeyboardInterrupt):
                save_png(path, self.image(1))
        if exists:
            np.testing.assert_array_equal(load_png(path), self.image(0))
        else:
            assert not path.exists()
        save_png(path, self.image(1))
        np.testing.assert_array_equal(load_png(path), self.image(1))
        assert [*tmp_path.iterdir()] == [path]


NOTES = [{"seed": 0, "class": None, "ε": [0.5, "a\nb"]}, [], "text"]


class TestNote:
    @pytest.mark.parametrize("note", NOTES)
    def test_is_kept_beside_the_pixels(self, tmp_path, note):
        moments = TestGif.moments(3)
        save_png(tmp_path / "noted.png", moments[0, 0], note=note)
        save_gif(tmp_path / "noted.gif", moments, columns=3, note=note)
        save_gif(tmp_path / "plain.gif", moments, columns=3)
        assert [note_of(tmp_path / name) for name in ("noted.png", "noted.gif")] == [note, note]
        np.testing.assert_array_equal(load_png(tmp_path / "noted.png"), moments[0, 0])
        frames = ([f for f, _ in TestGif.frames(tmp_path / f"{x}.gif")] for x in ("noted", "plain"))
        for one, other in zip(*frames, strict=True):
            np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize("name", ["plain.png", "plain.gif", "photo.jpg", "text.png", "none"])
    def test_others_have_none(self, tmp_path, name):
        moments = TestGif.moments(2)
        save_png(tmp_path / "plain.png", moments[0, 0])
        save_gif(tmp_path / "plain.gif", moments, columns=3)
        Image.fromarray(moments[0, 0, ..., 0]).save(tmp_path / "photo.jpg", comment=b"jax_ddpm {}")
        (tmp_path / "text.png").write_text("jax_ddpm {}")
        assert note_of(tmp_path / name) is None
