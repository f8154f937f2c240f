import io

import numpy as np
import pytest
from PIL import Image

from jax_ddpm.data import lazy
from jax_ddpm.data.lazy import Encoded, KeptSource, LazySource
from jax_ddpm.data.source import ArraySource, Field, image_spec

SIZES = {"train": 23, "heldout": 5}


class Counting:
    """Random images, and how often each was read."""

    def __init__(self, labels):
        rng = np.random.default_rng(0)
        splits = {}
        for split, size in SIZES.items():
            splits[split] = {"image": rng.integers(0, 256, (size, 3, 2, 1), dtype=np.uint8)}
            if labels:
                splits[split]["label"] = rng.integers(0, 4, size, dtype=np.int32)
        self.whole = ArraySource(splits, num_levels=256, identity="random")
        self.spec = self.whole.spec
        self.reads = {split: np.zeros(size, int) for split, size in SIZES.items()}

    def batch(self, split, indices):
        np.add.at(self.reads[split], indices, 1)
        return self.whole.batch(split, indices)


@pytest.mark.parametrize("split", SIZES)
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("read_at_once", [1, 7, 23, 100])
def test_a_kept_split_is_given_whole_and_each_image_read_once(
    split, labels, read_at_once, monkeypatch
):
    monkeypatch.setattr(lazy, "_READ_AT_ONCE", read_at_once)
    source = Counting(labels)
    kept = KeptSource(source)
    kept.batch(split, np.array([3, 0, 3]))
    for _ in range(2):
        arrays = kept.arrays(split)
        expected = source.whole.arrays(split)
        assert arrays.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(arrays[name], array)
            assert arrays[name].dtype == array.dtype
    other = "train" if split == "heldout" else "heldout"
    assert (source.reads[split].tolist(), source.reads[other].sum()) == ([1] * SIZES[split], 0)


@pytest.mark.filterwarnings("ignore:3.*damaged")
@pytest.mark.parametrize("memory", [lambda source: source, KeptSource])
def test_arrays_beside_an_image_come_with_it(memory):
    """They also come with the image that stands in for a damaged one."""
    captions = np.random.default_rng(0).integers(0, 100, (10, 5))
    spec = image_spec((2, 2, 1), 256, 0, {"train": 10}, "captions")
    fields = spec.fields | {
        "tokens": Field((5,), "int32", 100),
        "mask": Field((5,), "bool"),
        "size": Field((2,), "float32"),
    }

    def read(split, index):
        file = io.BytesIO()
        Image.new("L", (2, 2), index).save(file, "PNG")
        beside = {"tokens": captions[index], "mask": captions[index] > 50, "size": (index, 0.5)}
        return Encoded(str(index), file.getvalue()[: 40 if index == 3 else None], beside)

    source = memory(LazySource(read, spec._replace(fields=fields), 0))
    batch = source.batch("train", np.array([7, 3, 7]))
    assert batch.keys() == fields.keys()
    for name, array in batch.items():
        assert (array.dtype, array.shape) == (fields[name].dtype, (3, *fields[name].shape))
    rows = [7, 4, 7]
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], rows)
    np.testing.assert_array_equal(batch["tokens"], captions[rows])
    np.testing.assert_array_equal(batch["mask"], captions[rows] > 50)
    np.testing.assert_array_equal(batch["size"], [(row, 0.5) for row in rows])
