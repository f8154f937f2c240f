import numpy as np
import pytest
from sklearn.datasets import load_digits

from jax_ddpm.data.digits import digits


@pytest.fixture(scope="module")
def source():
    return digits()


def rows(images, labels):
    return np.column_stack([images.reshape(len(images), -1), labels]).astype(int)


def everything(source, split):
    batch = source.batch(split, np.arange(source.spec.split_sizes[split]))
    return rows(batch["image"], batch["label"])


def in_order(table):
    return table[np.lexsort(table.T)]


@pytest.fixture(scope="module")
def original():
    data = load_digits()
    return rows(data.images, data.target)


def test_spec(source):
    spec = source.spec
    assert (spec.image_shape, spec.num_levels, spec.num_classes) == ((8, 8, 1), 17, 10)
    assert sum(spec.split_sizes.values()) == 1797
    assert spec.split_sizes["heldout"] == round(1797 / 5)


def test_batches_follow_the_source_contract(source):
    batch = source.batch("train", np.array([5, 0, 5]))
    assert (batch["image"].dtype, batch["image"].shape) == (np.uint8, (3, 8, 8, 1))
    assert (batch["label"].dtype, batch["label"].shape) == (np.int32, (3,))
    np.testing.assert_array_equal(batch["image"][0], batch["image"][2])


def test_splits_hold_every_digit_once_with_its_label(source, original):
    both = np.concatenate([everything(source, "train"), everything(source, "heldout")])
    np.testing.assert_array_equal(in_order(both), in_order(original))


def test_splits_are_always_the_same(source):
    np.testing.assert_array_equal(everything(digits(), "heldout"), everything(source, "heldout"))


def test_held_out_digits_come_from_all_writers(source, original):
    """The last fifth of the file is by other people, so each fifth gives its share."""
    heldout = {row.tobytes() for row in everything(source, "heldout")}
    is_held_out = np.array([row.tobytes() in heldout for row in original])
    shares = [fifth.mean() for fifth in np.array_split(is_held_out, 5)]
    assert 0.1 < min(shares) < max(shares) < 0.3
