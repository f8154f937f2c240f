import zipfile

import numpy as np
import pytest

from jax_ddpm.data import arrays
from jax_ddpm.data.npz import npz
from jax_ddpm.data.source import image_spec
from jax_ddpm.errors import UserError


def images(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def save(tmp_path):
    def save(**arrays):
        path = tmp_path / "set.npz"
        np.savez(path, **arrays)
        return str(path)

    return save


def everything(source, split, name="image"):
    return source.batch(split, np.arange(source.spec.split_sizes[split]))[name]


@pytest.mark.parametrize(
    ("stored", "inside"),
    [((4, 6), (4, 6, 1)), ((4, 6, 1), (4, 6, 1)), ((4, 6, 3), (4, 6, 3))],
    ids=["gray", "one_channel", "colour"],
)
def test_images(save, stored, inside):
    train, test = images(20, *stored), images(5, *stored, seed=1)
    source = npz(save(train_images=train, test_images=test))
    sizes = {"train": 20, "heldout": 5}
    assert source.spec == image_spec(inside, 256, 0, sizes, source.spec.identity)
    np.testing.assert_array_equal(everything(source, "train"), train.reshape(20, *inside))
    np.testing.assert_array_equal(everything(source, "heldout"), test.reshape(5, *inside))


def test_labels(save):
    labels = {"train_labels": np.array([0, 4, 2]), "test_labels": np.array([1], np.uint8)}
    path = save(train_images=images(3, 4, 4), test_images=images(1, 4, 4), **labels)
    with pytest.warns(UserWarning, match="of 5 classes, none of the training images is of 1, 3;"):
        source = npz(path)
    assert (source.spec.num_classes, source.spec.class_names) == (5, tuple("01234"))
    np.testing.assert_array_equal(everything(source, "train", "label"), [0, 4, 2])
    np.testing.assert_array_equal(everything(source, "heldout", "label"), [1])
    assert everything(source, "heldout", "label").dtype == np.int32


@pytest.mark.filterwarnings("ignore:npz.* of 100 classes")
@pytest.mark.parametrize(("fraction", "split_sizes"), [(0.3, (70, 30)), (0.9, (10, 90))])
def test_without_test_images_a_random_part_is_held_out(save, fraction, split_sizes):
    """A partition, the same at each call and not the file's order; labels stay with images."""
    count = sum(split_sizes)
    train = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    path = save(train_images=train, train_labels=np.arange(count))
    first, second = npz(path, fraction), npz(path, fraction)
    assert first.spec.split_sizes == dict(zip(("train", "heldout"), split_sizes, strict=True))
    assert first.spec.num_classes == count, "also where training sees only some of the classes"
    parts = {split: everything(first, split)[:, 0, 0, 0] for split in first.spec.split_sizes}
    assert sorted(np.concatenate([*parts.values()])) == list(range(count))
    for split, part in parts.items():
        assert not np.all(np.diff(np.sort(part)) == 1)
        np.testing.assert_array_equal(everything(first, split, "label"), part)
        np.testing.assert_array_equal(everything(second, split, "label"), part)


def test_what_is_left_out_is_said(save):
    path = save(
        train_images=images(20, 4, 4), val_images=images(5, 4, 4), train_label=np.arange(20)
    )
    with pytest.warns(
        UserWarning, match="left out: train_label, val_images; arrays that count are"
    ):
        assert npz(path, 0.1).spec.split_sizes == {"train": 18, "heldout": 2}


def test_identity_follows_the_content(save):
    identities = [npz(save(train_images=images(20, 4, 4, seed=i))).spec.identity for i in (0, 1, 0)]
    assert identities[0] == identities[2] != identities[1]


GOOD, LABELS = images(20, 4, 4), np.arange(20)
BAD = {
    "no_train_images": {"images": GOOD},
    "float": {"train_images": GOOD / 255},
    "two_channels": {"train_images": images(20, 4, 4, 2)},
    "flat": {"train_images": images(20, 16)},
    "empty": {"train_images": images(0, 4, 4)},
    "too_few_to_hold_out": {"train_images": images(1, 4, 4)},
    "too_few_labels": {"train_images": GOOD, "train_labels": LABELS[1:]},
    "negative_labels": {"train_images": GOOD, "train_labels": LABELS - 1},
    "labels_beyond_32_bits": {"train_images": GOOD, "train_labels": LABELS + 2**31},
    "float_labels": {"train_images": GOOD, "train_labels": LABELS / 2},
    "no_labels_at_all": {"train_images": images(0, 4, 4), "train_labels": LABELS[:0]},
    "labels_for_train_only": {"train_images": GOOD, "train_labels": LABELS, "test_images": GOOD},
    "labels_for_test_only": {"train_images": GOOD, "test_labels": LABELS, "test_images": GOOD},
    "unknown_test_label": {
        "train_images": GOOD,
        "train_labels": LABELS,
        "test_images": GOOD,
        "test_labels": LABELS + 1,
    },
    "sizes_differ": {"train_images": GOOD, "test_images": images(5, 4, 6)},
    "float_test_images": {"train_images": GOOD, "test_images": GOOD / 255},
    "empty_test_images": {"train_images": GOOD, "test_images": GOOD[:0]},
    "objects": {"train_images": np.array([None, 1], object)},
}


def the_error(path):
    with pytest.raises(UserError) as caught:
        npz(path)
    return str(caught.value)


@pytest.mark.parametrize("arrays", BAD.values(), ids=BAD.keys())
def test_unusable_arrays_are_one_line_naming_the_file(save, arrays):
    path = save(**arrays)
    message = the_error(path)
    assert path in message
    assert "\n" not in message


def not_there(path):
    pass


def a_folder(path):
    path.mkdir()


def empty(path):
    path.touch()


def text(path):
    path.write_text("train_images")


def npy(path):
    with path.open("wb") as file:
        np.save(file, GOOD)


def cut_short(path):
    np.savez(path, train_images=GOOD)
    path.write_bytes(path.read_bytes()[:200])


def corrupted(path):
    np.savez_compressed(path, train_images=GOOD)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = b"\xff" * 20
    path.write_bytes(content)


def encrypted(path):
    """As its flags say; what it holds does not matter then."""
    np.savez(path, train_images=GOOD)
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)


def lying(path):
    """Its array says that it is of a terabyte."""
    np.savez(path, train_images=GOOD)
    with zipfile.ZipFile(path) as archive:
        stored = archive.read("train_images.npy")
    content = stored.replace(b"(20, 4, 4), }    ", b"(1099511627776,)}")
    assert content != stored
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", content)


UNREADABLE = [not_there, a_folder, empty, text, npy, cut_short, corrupted]


@pytest.mark.parametrize("make", [*UNREADABLE, encrypted, lying])
def test_unreadable_files_are_one_line_naming_the_file(tmp_path, make):
    path = tmp_path / "set.npz"
    make(path)
    message = the_error(str(path))
    assert str(path) in message
    assert "\n" not in message


def test_arrays_larger_than_memory_are_not_unpacked(save, monkeypatch):
    path = save(train_images=GOOD)
    monkeypatch.setattr(arrays, "_memory", lambda: GOOD.nbytes - 1)
    assert "more than this machine's memory" in the_error(path)
