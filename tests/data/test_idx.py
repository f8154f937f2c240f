import gzip
import struct
import tracemalloc

import numpy as np
import pytest

from jax_ddpm.data.idx import idx
from jax_ddpm.data.source import image_spec
from jax_ddpm.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = {
    "train": RNG.integers(0, 256, (20, 5, 4), dtype=np.uint8),
    "t10k": RNG.integers(0, 256, (7, 5, 4), dtype=np.uint8),
}
LABELS = {"train": np.arange(20, dtype=np.uint8) % 6, "t10k": np.arange(7, dtype=np.uint8) % 5}
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def encoded(array, magic=None):
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    for prefix in IMAGES:
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(encoded(IMAGES[prefix]))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(encoded(LABELS[prefix]))
    return tmp_path


def compress(folder):
    for file in list(folder.iterdir()):
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()


@pytest.mark.parametrize("compressed", [False, True])
def test_splits(folder, compressed):
    if compressed:
        compress(folder)
    source = idx(str(folder))
    sizes = {"train": 20, "heldout": 7}
    assert source.spec == image_spec((5, 4, 1), 256, 6, sizes, source.spec.identity)
    for split, prefix in (("train", "train"), ("heldout", "t10k")):
        batch = source.batch(split, np.arange(source.spec.split_sizes[split]))
        np.testing.assert_array_equal(batch["image"][..., 0], IMAGES[prefix])
        np.testing.assert_array_equal(batch["label"], LABELS[prefix])
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)


def test_classes_are_called_by_the_names_given(folder):
    names = ("ant", "bee", "cat", "dog", "eel", "fox")
    assert idx(str(folder), names).spec.class_names == names
    assert idx(str(folder)).spec.class_names == tuple("012345")
    assert idx(str(folder), names).spec.meaning() == idx(str(folder)).spec.meaning()


def test_identity_follows_the_content_not_the_files(folder):
    plain = idx(str(folder)).spec.identity
    compress(folder)
    assert idx(str(folder)).spec.identity == plain
    (folder / TRAIN_LABELS).write_bytes(encoded(LABELS["train"][::-1]))
    (folder / f"{TRAIN_LABELS}.gz").unlink()
    assert idx(str(folder)).spec.identity != plain


def cut_gzip(content):
    return gzip.compress(content)[:-12]


def damaged_gzip(content):
    compressed = bytearray(gzip.compress(content))
    compressed[20:40] = bytes(20)
    return bytes(compressed)


GOOD = encoded(IMAGES["train"])
BAD_FILES = {
    "empty": (TRAIN_IMAGES, b""),
    "header_only": (TRAIN_IMAGES, GOOD[:16]),
    "cut_header": (TRAIN_IMAGES, GOOD[:10]),
    "cut": (TRAIN_IMAGES, GOOD[:-1]),
    "too_long": (TRAIN_IMAGES, GOOD + b"\0"),
    "no_images": (TRAIN_IMAGES, encoded(IMAGES["train"][:0])),
    "labels_for_images": (TRAIN_IMAGES, encoded(LABELS["train"])),
    "images_for_labels": (TRAIN_LABELS, GOOD),
    "floats": (TRAIN_IMAGES, encoded(IMAGES["train"], magic=0x0D03)),
    "compressed_without_saying_so": (TRAIN_IMAGES, gzip.compress(GOOD)),
    "not_compressed": (f"{TRAIN_IMAGES}.gz", GOOD),
    "cut_gzip": (f"{TRAIN_IMAGES}.gz", cut_gzip(GOOD)),
    "damaged_gzip": (f"{TRAIN_IMAGES}.gz", damaged_gzip(GOOD)),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_no_more_is_unpacked_than_the_header_says(folder, suffix):
    """A small file can unpack to any size."""
    content = encoded(IMAGES["train"]) + bytes(2**26)
    (folder / TRAIN_IMAGES).unlink()
    path = folder / f"{TRAIN_IMAGES}{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    tracemalloc.start()
    assert f"{path}: has more bytes of data for the shape [20, 5, 4]" in the_error(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


def test_a_header_that_claims_more_than_all_memory(folder):
    header = struct.pack(">4I", 0x0803, 2**31, 2**15, 2**15)
    (folder / TRAIN_IMAGES).write_bytes(header + bytes(100))
    assert "GiB, more than this machine's memory" in the_error(folder)


def the_error(path):
    with pytest.raises(UserError) as caught:
        idx(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("name", "content"), BAD_FILES.values(), ids=BAD_FILES)
def test_unusable_files_are_one_line_naming_them(folder, name, content):
    (folder / name.removesuffix(".gz")).unlink()
    (folder / name).write_bytes(content)
    assert str(folder / name) in the_error(folder)


@pytest.mark.parametrize("prefix", ["train-images-idx3", "t10k-labels-idx1"])
def test_a_missing_file_is_named(folder, prefix):
    (folder / f"{prefix}-ubyte").unlink()
    message = the_error(folder)
    assert f"{prefix}-ubyte.gz" in message
    assert "yann.lecun.com" in message


def test_counts_sizes_and_classes_must_agree(folder):
    (folder / TRAIN_LABELS).write_bytes(encoded(LABELS["train"][1:]))
    assert "20 images but 19 labels" in the_error(folder)
    (folder / TRAIN_LABELS).write_bytes(encoded(LABELS["train"] % 2))
    assert "classes" in the_error(folder)
    (folder / TRAIN_LABELS).write_bytes(encoded(LABELS["train"]))
    (folder / TRAIN_IMAGES).write_bytes(encoded(IMAGES["train"][:, 1:]))
    assert "size" in the_error(folder)


def test_the_path_must_be_a_folder(folder):
    assert "data.path" in the_error(folder / TRAIN_IMAGES)
    assert "data.path" in the_error(folder / "nowhere")
