import hashlib
import os
import pathlib
import re
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from jax_ddpm.data import lazy
from jax_ddpm.data.folder import folder
from jax_ddpm.data.source import image_spec
from jax_ddpm.errors import UserError


def pixels(number, height=4, width=6):
    """An image that tells its number."""
    image = np.full((height, width, 3), number, np.uint8)
    image[0, 0] = (255, 0, 255)
    return image


def save(path, number, height=4, width=6):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number, height, width)).save(path, lossless=True)


def damage(path):
    """Keeps the header and not all pixels."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 30])


def everything(source, split, name="image"):
    return source.batch(split, np.arange(source.spec.split_sizes[split]))[name]


def numbers(source, split):
    return everything(source, split)[:, 1, 1, 0].tolist()


@pytest.fixture
def flat(tmp_path):
    for number in range(40):
        save(tmp_path / f"{number:02d}.png", number)
    return tmp_path


@pytest.fixture
def split(tmp_path):
    """Numbers 0-11 for training and 20-25 held out, of classes a, b and c in turn."""
    for number in range(12):
        save(tmp_path / "train" / "abc"[number % 3] / f"{number:02d}.png", number)
    for number in range(20, 26):
        save(tmp_path / "test" / "abc"[number % 3] / "deeper" / f"{number}.png", number)
    return tmp_path


def test_a_random_tenth_is_held_out(flat):
    first, second = folder(str(flat), 0), folder(str(flat), 0)
    sizes = {"train": 36, "heldout": 4}
    assert first.spec._replace(formerly="") == image_spec(
        (4, 6, 3), 256, 0, sizes, first.spec.identity
    )
    assert sorted(numbers(first, "train") + numbers(first, "heldout")) == list(range(40))
    assert np.ptp(numbers(first, "heldout")) > 4
    for name in ("train", "heldout"):
        assert numbers(first, name) == numbers(second, name)


def test_pixels_are_those_of_the_files(flat):
    source = folder(str(flat), 0)
    for split in ("train", "heldout"):
        expected = [pixels(number) for number in numbers(source, split)]
        np.testing.assert_array_equal(everything(source, split), expected)


SPLIT_NAMES = ["test", "val", "heldout", "Valid", "validation", "VAL2017", "dev", "eval", "Testing"]


@pytest.mark.parametrize("name", [*SPLIT_NAMES, "held-out"])
@pytest.mark.parametrize("training", ["train", "Training", "train_2017"])
def test_folders_can_be_the_splits(split, name, training):
    (split / "test").rename(split / name)
    (split / "train").rename(split / training)
    save(split / "elsewhere.png", 99)
    with pytest.warns(UserWarning, match=f"splits {training} and {name}: elsewhere.png$"):
        source = folder(str(split), 0)
    assert source.spec.split_sizes == {"train": 12, "heldout": 6}
    assert source.spec.class_names == ("a", "b", "c")
    assert sorted(numbers(source, "train")) == list(range(12))
    assert sorted(numbers(source, "heldout")) == list(range(20, 26))


def test_validation_images_are_preferred_to_test_images(split):
    save(split / "val" / "a" / "0.png", 77)
    with pytest.warns(UserWarning, match=r"left out.*: 6, test/a/deeper/21.png, .*, …$"):
        assert numbers(folder(str(split), 0), "heldout") == [77]


def test_a_part_is_held_out_where_there_is_a_folder_for_training_alone(split):
    shutil.rmtree(split / "test")
    source = folder(str(split), 0, 0.25)
    assert source.spec.split_sizes == {"train": 9, "heldout": 3}
    for name in ("train", "heldout"):
        labels = everything(source, name, "label").tolist()
        assert labels == [number % 3 for number in numbers(source, name)]


@pytest.mark.parametrize("name", SPLIT_NAMES)
@pytest.mark.parametrize("others", [["test_images"], ["cat", "dog"], []])
def test_splits_are_no_classes(tmp_path, name, others):
    for number, below in enumerate([name, *others] * 10):
        save(tmp_path / below / f"{number}.png", number)
    assert f"{name} by name are splits" in the_error(tmp_path)


def test_nor_are_splits_inside_of_a_split(tmp_path):
    for number in range(20):
        save(tmp_path / "train" / ("train", "val")[number % 2] / f"{number}.png", number)
    assert "train and val by name are splits" in the_error(tmp_path)


def test_a_class_may_be_called_like_a_split_where_the_splits_are_plain(tmp_path):
    """Trains are a class of CIFAR-100."""
    for number in range(20):
        for below, first in (("train", 0), ("test", 100)):
            name = f"{('bus', 'train')[number % 2]}/{number}.png"
            save(tmp_path / below / name, first + number)
    assert folder(str(tmp_path), 0).spec.class_names == ("bus", "train")


@pytest.mark.parametrize("pair", [("train", "Training"), ("test1", "test2")])
def test_two_folders_of_one_split(split, pair):
    for number, name in enumerate(pair):
        save(split / name / "a" / f"{number}.png", number)
    if "test1" in pair:
        shutil.rmtree(split / "test")
    assert f"{' and '.join(pair)} both stand for" in the_error(split)


# The same thing twice


def test_a_link_back_adds_nothing(flat):
    (flat / "latest").symlink_to(".")
    (flat / "deeper").mkdir()
    (flat / "deeper" / "up").symlink_to("..")
    with pytest.warns(UserWarning, match="left out, as links to what counts already: deeper/up, l"):
        source = folder(str(flat), 0)
    assert sorted(numbers(source, "train") + numbers(source, "heldout")) == list(range(40))


def test_folders_and_files_count_by_their_own_paths_and_not_by_links(split):
    """It holds wherever the links stand in the order of names."""
    (split / "train" / "0").symlink_to("a")
    (split / "train" / "a" / "0.png").symlink_to("../b/01.png")
    (split / "test" / "a" / "train").symlink_to("../../train")
    with pytest.warns(UserWarning, match="links"):
        source = folder(str(split), 0)
    assert source.spec.class_names == ("a", "b", "c")
    assert sorted(numbers(source, "train")) == list(range(12))
    assert sorted(numbers(source, "heldout")) == list(range(20, 26))


def test_links_to_elsewhere_are_followed_once(tmp_path):
    for number in range(20):
        save(tmp_path / "store" / f"{number}.png", number)
    root = tmp_path / "data"
    root.mkdir()
    (root / "0.png").symlink_to(tmp_path / "store" / "0.png")
    (root / "all").symlink_to(tmp_path / "store")
    (root / "again").symlink_to(tmp_path / "store")
    with pytest.warns(UserWarning, match="links to what counts already: 0.png, all$"):
        source = folder(str(root), 0)
    assert sorted(numbers(source, "train") + numbers(source, "heldout")) == list(range(20))


def test_folders_at_the_first_level_are_the_classes(split):
    source = folder(str(split), 0)
    assert (source.spec.num_classes, source.spec.class_names) == (3, ("a", "b", "c"))
    for name, first in (("train", 0), ("heldout", 20)):
        labels = everything(source, name, "label")
        assert labels.dtype == np.int32
        assert labels.tolist() == [number % 3 for number in numbers(source, name)]
        assert min(numbers(source, name)) == first


def test_classes_without_split_folders(tmp_path):
    """All count, even if training happens to see only some of them, which is said."""
    for number in range(20):
        save(tmp_path / f"class-{number:02d}" / "x.png", number)
    with pytest.warns(UserWarning, match="of 20 classes, none of the training images is of cl"):
        source = folder(str(tmp_path), 0)
    assert source.spec.class_names == tuple(f"class-{number:02d}" for number in range(20))
    for name in ("train", "heldout"):
        assert everything(source, name, "label").tolist() == numbers(source, name)


def test_classes_called_by_other_numbers_are_told(tmp_path):
    """Text comes in the order of text, as in other loaders of such folders."""
    for number in range(12):
        for split, first in (("train", 0), ("test", 100)):
            save(tmp_path / split / str(number) / f"{number}.png", first + number)
    with pytest.warns(UserWarning, match=r"names as text.*: 0: 0, 1: 1, 2: 10, 3: 11, 4: 2, 5: 3"):
        spec = folder(str(tmp_path), 0).spec
    assert spec.classes().startswith("12 classes (0: 0, 1: 1, 2: 10, 3: 11, 4: 2")


def test_a_class_that_training_does_not_see_is_named(tmp_path):
    """Its one image is held out."""
    lost = np.random.RandomState(0).permutation(20)[0]
    for number in range(20):
        name = "a" if number < lost else "b" if number == lost else "c"
        save(tmp_path / name / f"{number:02d}.png", number)
    with pytest.warns(UserWarning, match="of 3 classes, none of the training images is of b;"):
        folder(str(tmp_path), 0)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_can_be_gray(tmp_path, mode):
    for number in range(20):
        Image.fromarray(pixels(number)).convert(mode).save(tmp_path / f"{number}.png")
    gray = folder(str(tmp_path), 0, channels=1)
    assert gray.spec.image_shape == (4, 6, 1)
    assert everything(gray, "train").shape == (18, 4, 6, 1)
    if mode == "RGB":
        colour = folder(str(tmp_path), 0)
    else:
        with pytest.warns(UserWarning, match=r"are gray; data\.channels=1 keeps them so"):
            colour = folder(str(tmp_path), 0)
    assert colour.spec.image_shape == (4, 6, 3)
    assert colour.spec.identity != gray.spec.identity


@pytest.mark.parametrize("stray", ["stray.png", None])
def test_no_classes_unless_every_image_is_in_one_of_two(tmp_path, stray):
    for number in range(20):
        save(tmp_path / "only" / f"deep-{number % 2}" / f"{number}.png", number)
    if stray:
        save(tmp_path / "other" / "20.png", 20)
        save(tmp_path / stray, 21)
    why = "these are in no folder of a class: stray.png;" if stray else "are in one folder, only;"
    with pytest.warns(UserWarning, match=why):
        source = folder(str(tmp_path), 0)
    assert source.spec.num_classes == 0
    assert "label" not in source.batch("train", np.arange(2))


def test_order_is_by_path_not_by_file_system(tmp_path, monkeypatch):
    names = ["b/1.png", "b/2.png", "a.png", "b/b/3.png", "B.png"]
    for number, name in enumerate(names):
        save(tmp_path / "train" / name, number)
        save(tmp_path / "test" / name, 100 + number)
    by_path = [number for _, number in sorted((name, i) for i, name in enumerate(names))]
    assert numbers(folder(str(tmp_path), 0), "train") == by_path
    walk = os.walk

    def backwards(*args, **kwargs):
        for parent, folders, files in walk(*args, **kwargs):
            folders.reverse()
            files.reverse()
            yield parent, folders, files

    monkeypatch.setattr(os, "walk", backwards)
    assert numbers(folder(str(tmp_path), 0), "train") == by_path


def test_hidden_and_other_files_are_passed_over_and_case_is_not_minded(flat):
    save(flat / "40.PNG", 40)
    save(flat / "41.WebP", 41)
    for name in (".hidden.png", ".hidden/50.png", "sub/.hidden/51.png"):
        save(flat / name, 50)
    (flat / "labels.csv").write_text("00.png,3")
    (flat / "no_suffix").write_bytes((flat / "00.png").read_bytes())
    with pytest.warns(UserWarning, match=r"by their names: labels\.csv, no_suffix; images end"):
        source = folder(str(flat), 0)
    assert sorted(numbers(source, "train") + numbers(source, "heldout")) == list(range(42))


@pytest.mark.parametrize("suffix", ["ppm", "PNM"])
def test_portable_pixmaps_are_images(flat, suffix):
    (flat / "00.png").unlink()
    Image.fromarray(pixels(0)).save(flat / f"00.{suffix}")
    source = folder(str(flat), 0)
    assert sorted(numbers(source, "train") + numbers(source, "heldout")) == list(range(40))


def test_what_is_no_file_is_not_opened(flat):
    os.mkfifo(flat / "99.png")
    with pytest.warns(UserWarning, match=r"1 of 41 images cannot be opened: 99.png \(no file\)"):
        folder(str(flat), 0)


def test_images_of_all_sizes_are_brought_to_one(tmp_path):
    for number in range(20):
        save(tmp_path / f"{number}.png", 10 * number, height=40 + number, width=90 - 3 * number)
    source = folder(str(tmp_path), 16)
    assert source.spec.image_shape == (16, 16, 3)
    images = np.concatenate([everything(source, "train"), everything(source, "heldout")])
    assert sorted(images[:, 8, 8, 0]) == list(range(0, 200, 10))


def test_identity_follows_files_and_size(flat):
    identities = [folder(str(flat), 0).spec.identity, folder(str(flat), 4).spec.identity]
    (flat / "00.png").rename(flat / "0.png")
    identities.append(folder(str(flat), 0).spec.identity)
    save(flat / "40.png", 40)
    identities.append(folder(str(flat), 0).spec.identity)
    Image.fromarray(pixels(1)).save(flat / "01.png", compress_level=0)
    identities.append(folder(str(flat), 0).spec.identity)
    assert len(set(identities)) == 5
    moved = flat.rename(flat.with_name(f"{flat.name}_moved"))
    assert folder(str(moved), 0).spec.identity == identities[-1]


def test_identity_follows_what_is_in_the_files(tmp_path):
    """A BMP has as many bytes whatever it shows."""
    for number in range(20):
        save(tmp_path / f"{number}.bmp", number)
    first = folder(str(tmp_path), 0).spec
    save(tmp_path / "7.bmp", 99)
    second = folder(str(tmp_path), 0).spec
    assert first.identity != second.identity
    assert first.formerly == second.formerly
    save(tmp_path / "7.bmp", 7)
    assert folder(str(tmp_path), 0).spec == first


def test_runs_of_before_know_the_data_by_names_and_sizes(flat):
    spec = folder(str(flat), 0).spec
    listing = "".join(f"{file.name}\0{file.stat().st_size}\0" for file in sorted(flat.iterdir()))
    digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
    noted = spec._replace(identity=f"folder/40-files/sha256-{digest}/image-size-0", formerly="")
    with pytest.warns(UserWarning, match="whether the contents were the same cannot be known$"):
        assert spec.as_noted(noted).meaning() == noted.meaning()
    (flat / "00.png").rename(flat / "0.png")
    other = folder(str(flat), 0).spec
    assert other.as_noted(noted) == other


def test_held_out_images_that_are_trained_on_are_named(split):
    shutil.copy(split / "train" / "a" / "00.png", split / "test" / "c" / "x.png")
    with pytest.warns(UserWarning, match="of 7 held-out images .* has copies: test/c/x.png$"):
        folder(str(split), 0)


# What is damaged


@pytest.fixture(params=["kept", "decoded_anew"])
def memory(request, monkeypatch):
    if request.param == "decoded_anew":
        monkeypatch.setattr(lazy, "KEPT_BYTES", 0)


def test_files_that_cannot_be_opened_are_left_out_and_named(flat):
    whole = folder(str(flat), 0)
    victims = [f"{numbers(whole, 'train')[i]:02d}.png" for i in (3, 30)]
    for victim in victims:
        (flat / victim).write_text("not an image")
    with pytest.warns(UserWarning, match="2 of 40 images cannot be opened") as caught:
        source = folder(str(flat), 0)
    (warning,) = caught
    assert all(victim in str(warning.message) for victim in victims)
    assert source.spec.split_sizes == {"train": 34, "heldout": 4}
    assert numbers(source, "heldout") == numbers(whole, "heldout")
    assert source.spec.identity != whole.spec.identity


def test_the_next_image_stands_in_for_a_damaged_one(split, memory):
    """The same one whatever was asked for before, with its label; the first follows the last."""
    whole = folder(str(split), 0)
    expected, labels = numbers(whole, "train"), everything(whole, "train", "label").tolist()
    damage(split / "train" / "abc"[labels[11]] / f"{expected[11]:02d}.png")
    expected[11], labels[11] = expected[0], labels[0]
    source = folder(str(split), 8)
    for indices in ([11, 3, 11], [0, 11], np.random.default_rng(0).permutation(12)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = source.batch("train", np.array(indices))
        assert batch["image"][:, 4, 4, 0].tolist() == [expected[i] for i in indices]
        assert batch["label"].tolist() == [labels[i] for i in indices]


def test_a_damaged_image_is_named_once(split, memory):
    victim = next((split / "train" / "c").iterdir())
    damage(victim)
    source = folder(str(split), 8)
    with pytest.warns(UserWarning, match=r"takes its place \(1 of 18 so far\)") as caught:
        everything(source, "train")
    assert str(victim) in str(caught[0].message)
    everything(source, "train")  # pytest makes an error of a warning


def test_neighbours_that_are_damaged_have_one_stand_in(tmp_path, memory):
    for number in range(40):
        save(tmp_path / "train" / f"{number:02d}.png", number)
        save(tmp_path / "test" / f"{number:02d}.png", 100 + number)
    for number in (5, 6, 7):
        damage(tmp_path / "train" / f"{number:02d}.png")
    source = folder(str(tmp_path), 8)
    with pytest.warns(UserWarning, match="damaged"):
        batch = source.batch("train", np.array([7, 4, 5, 6]))
    assert batch["image"][:, 4, 4, 0].tolist() == [8, 4, 8, 8]


def test_memory_changes_no_batch(flat, monkeypatch):
    kept = folder(str(flat), 5)
    monkeypatch.setattr(lazy, "KEPT_BYTES", 0)
    anew = folder(str(flat), 5)
    for indices in ([3, 1, 3], [1], [35, 3, 0]):
        batches = [source.batch("train", np.array(indices))["image"] for source in (kept, anew)]
        np.testing.assert_array_equal(*batches)


def test_a_small_set_is_decoded_once(flat):
    source = folder(str(flat), 0)
    first = everything(source, "train")
    for file in flat.iterdir():
        file.unlink()
    np.testing.assert_array_equal(everything(source, "train"), first)


# What is refused


def the_error(path, image_size=0, use=lambda source: None):
    with pytest.raises(UserError) as caught:
        use(folder(str(path), image_size))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_path_must_be_a_folder(flat):
    assert "data.path" in the_error(flat / "00.png")
    assert "data.path" in the_error(flat / "nowhere")


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_images(tmp_path, count):
    for number in range(count):
        save(tmp_path / f"{number}.png", number)
    message = the_error(tmp_path)
    assert str(tmp_path) in message
    way_out = f"{count} are too few images to hold out data.heldout_fraction=0.1 of them; raise it"
    assert (way_out if count else "no images there (.png ") in message


def test_empty_split_folders(split):
    shutil.move(split / "test", split.with_name(f"{split.name}_test"))
    (split / "val").mkdir()
    assert "heldout" in the_error(split)


def test_sizes_that_differ(flat):
    save(flat / "99.png", 99, height=5)
    message = the_error(flat)
    assert "99.png has 6×5" in message
    assert "6×4" in message
    assert "data.image_size" in message


@pytest.mark.parametrize("stray", ["d/1.png", "1.png"])
def test_held_out_images_of_unknown_class(split, stray):
    save(split / "test" / stray, 1)
    assert str(split / "test" / stray) in the_error(split)


def test_more_than_a_twentieth_cannot_be_opened(flat):
    for number in range(7):
        (flat / f"{number:02d}.png").write_text("not an image")
    message = the_error(flat)
    assert "7 of 40" in message
    assert len(re.findall(r"\d\d\.png \(", message)) == 5


def test_more_than_a_twentieth_is_damaged(flat):
    for number in range(10, 13):
        damage(flat / f"{number:02d}.png")

    with pytest.warns(UserWarning, match="damaged"):
        message = the_error(
            flat, 8, use=lambda source: [everything(source, s) for s in ("train", "heldout")]
        )
    assert re.search(r"1[012]\.png: damaged .* 2 more of 40", message)


def test_a_file_that_vanishes_has_no_stand_in(flat):
    source = folder(str(flat), 0)
    (flat / "07.png").unlink()
    message = the_error(flat, use=lambda _: everything(source, "train"))
    assert "07.png: cannot be read" in message


def test_a_split_without_one_readable_image(tmp_path):
    for number in range(20):
        save(tmp_path / "train" / f"{number}.png", number)
    save(tmp_path / "test" / "0.png", 0)
    damage(tmp_path / "test" / "0.png")
    with pytest.warns(UserWarning, match="damaged"):
        assert "heldout" in the_error(tmp_path, 8, use=lambda s: everything(s, "heldout"))


def test_folders_that_cannot_be_listed(split, monkeypatch):
    scandir = os.scandir

    def forbid(path):
        if pathlib.Path(path).name == "deeper":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    assert "deeper: cannot be listed" in the_error(split)
