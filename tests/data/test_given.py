"""Images that a user gives: the same files as of a folder to train on, but none is left out."""

import numpy as np
import pytest
from PIL import Image

from jax_ddpm.data.folder import folder
from jax_ddpm.data.given import given_files, given_images
from jax_ddpm.errors import UserError


def save(path, number, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", (6, 4), number).convert(mode)
    image.save(path, **({"quality": 100} if path.suffix == ".jpg" else {}))


def numbers(images):
    return images[:, 0, 0, 0].tolist()


@pytest.fixture
def nested(tmp_path):
    """Images of many kinds, whose numbers follow the order of their paths, and hidden ones."""
    names = ["B.PNG", "a/b/3.png", "a/c.tif", "b.jpg", "b/0.bmp", "c.gif"]
    for number, name in reversed([*enumerate(names)]):
        save(tmp_path / name, 10 * number)
    for name in (".hidden.png", ".hidden/50.png", "a/.hidden/51.png"):
        save(tmp_path / name, 255)
    return tmp_path


def test_which_files_count_and_in_what_order(nested):
    assert numbers(given_images(nested)) == [0, 10, 20, 30, 40, 50]


def test_what_is_left_out_is_said(nested):
    (nested / "a" / "notes.txt").write_text("no picture")
    (nested / "latest").symlink_to(".")
    with pytest.warns(UserWarning, match="left out") as caught:
        assert numbers(given_images(nested)) == [0, 10, 20, 30, 40, 50]
    lines = sorted(str(warning.message) for warning in caught)
    assert [line.split(": ")[2].split(";")[0] for line in lines] == ["latest", "a/notes.txt"]


def test_are_those_that_are_trained_on(nested):
    for split in ("train", "test"):
        (nested / split).mkdir()
    for path in [path for path in nested.iterdir() if path.name not in ("train", "test")]:
        path.rename(nested / "train" / path.name)
    save(nested / "test" / "0.png", 7)
    with pytest.warns(UserWarning, match="in no folder of a class"):
        trained_on = folder(str(nested), 0).batch("train", np.arange(6))["image"]
    np.testing.assert_array_equal(given_images(nested / "train"), trained_on)


@pytest.mark.parametrize("colour", [None, "RGB", "P"])
def test_are_gray_where_all_files_are(tmp_path, colour):
    """A file says so itself; the pixels of the one in colour are gray too."""
    for number in range(3):
        save(tmp_path / f"{number}.png", number, mode=(number == 1 and colour) or "L")
    assert given_images(tmp_path).shape == (3, 4, 6, 3 if colour else 1)


def test_are_read_by_number(nested):
    assert numbers(given_files(nested).read(np.array([4, 0, 4]))) == [40, 0, 40]


def test_one_file_is_a_set_too(nested):
    assert numbers(given_images(nested / "a" / "c.tif")) == [20]
    assert numbers(given_images(nested / "b.jpg")) == [30]
    with pytest.raises(UserError, match=r"no\.png: cannot be read"):
        given_images(nested / "no.png")


@pytest.mark.parametrize("content", [b"no picture", None], ids=["text", "truncated"])
def test_none_is_left_out(nested, content):
    path = nested / "a" / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    with pytest.raises(UserError, match=f"^{path}: cannot be read .* replace or remove it$"):
        given_images(nested)


def test_are_of_one_size(nested):
    Image.new("RGB", (5, 4)).save(nested / "z.png")
    with pytest.raises(UserError, match=r"B\.PNG has 6×4 .* z\.png has 5×4; give images of one"):
        given_files(nested)
