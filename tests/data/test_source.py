"""What a source holds, as its spec says it."""

import numpy as np
import pytest

from jax_ddpm.config import default
from jax_ddpm.data.source import ArraySource, Field, hold_out, image_spec
from jax_ddpm.data.table import SOURCES
from jax_ddpm.options import Unfit, of


def test_the_spec_of_an_array_source_says_what_its_batches_hold():
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 4, (10, 3, 2, 1), dtype=np.uint8),
        "label": (np.arange(10) % 3).astype(np.int32),
        "tokens": rng.integers(0, 50, (10, 5), dtype=np.int32),
        "mask": rng.random((10, 5)) < 0.5,
        "size": rng.random((10, 2), np.float32),
    }
    source = ArraySource(hold_out(arrays, 0.3), num_levels=4, identity="arrays")
    batch = source.batch("train", np.array([4, 0]))
    assert batch.keys() == source.spec.fields.keys()
    for name, field in source.spec.fields.items():
        assert (batch[name].shape, batch[name].dtype) == ((2, *field.shape), field.dtype)
    assert source.spec.fields["image"].num_values == source.spec.num_levels == 4
    assert source.spec.fields["label"].num_values == source.spec.num_classes == 3
    assert source.spec.split_sizes == {"train": 7, "heldout": 3}
    assert source.spec.example_bytes * 2 == sum(array.nbytes for array in batch.values())


def test_image_spec_is_that_of_an_array_source():
    splits = {"train": {"image": np.zeros((5, 4, 6, 3), np.uint8)}}
    plain = image_spec((4, 6, 3), 256, 0, {"train": 5}, "black")
    assert ArraySource(splits, 256, "black").spec == plain
    assert (plain.image_shape, plain.num_levels, plain.num_classes) == ((4, 6, 3), 256, 0)
    splits["train"]["label"] = np.array([1, 0, 0, 1, 1], np.int32)
    labelled = image_spec((4, 6, 3), 256, 2, {"train": 5}, "black")
    assert ArraySource(splits, 256, "black").spec == labelled
    assert labelled.fields["label"] == Field((), "int32", 2)


def test_classes_are_called_by_their_names_or_else_by_their_numbers():
    splits = {"train": {"image": np.zeros((3, 2, 2, 1), np.uint8)}}
    assert ArraySource(splits, 256, "black").spec.class_names == ()
    splits["train"]["label"] = np.array([2, 0, 1], np.int32)
    assert ArraySource(splits, 256, "black").spec.class_names == ("0", "1", "2")
    names = ("coal", "ink", "night")
    spec = ArraySource(splits, 256, "black", names).spec
    assert spec.class_names == names
    assert spec == image_spec((2, 2, 1), 256, 3, {"train": 3}, "black", names)


@pytest.mark.parametrize("source", ["folder", "npz", "tfds"])
def test_the_part_to_hold_out_is_a_field_of_the_config(source):
    """A message that images are too few names it."""
    option = of(SOURCES[source])["heldout_fraction"]
    assert (option.default, default().data.heldout_fraction) == (0.1, 0.1)
    for wrong in (0, 1, 1.5):
        with pytest.raises(Unfit, match="between 0 and 1"):
            option.check("heldout_fraction", wrong)


@pytest.mark.parametrize("names", [("coal",), ("coal", "ink", "night", "soot")])
def test_there_is_a_name_for_each_class(names):
    splits = {"train": {"image": np.zeros((3, 2, 2, 1), np.uint8), "label": np.arange(3)}}
    with pytest.raises(Unfit, match=r"class_names is .* one name for each of 3 classes"):
        ArraySource(splits, 256, "black", names)
