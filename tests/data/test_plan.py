import numpy as np
import pytest

from jax_ddpm.data.plan import batch_indices, padded_batches


def visits(num_steps, batch_size, num_examples, seed=0):
    """Examples in the order of their visit."""
    return np.concatenate(
        [batch_indices(seed, step, batch_size, num_examples) for step in range(num_steps)]
    )


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 25])
def test_every_epoch_visits_each_example_once(batch_size):
    """It holds where an epoch ends inside a batch, and where a batch holds several epochs."""
    num_examples, num_epochs = 10, 5
    num_steps = -(-num_epochs * num_examples // batch_size)
    epochs = visits(num_steps, batch_size, num_examples)[: num_epochs * num_examples]
    for epoch in epochs.reshape(num_epochs, num_examples):
        assert sorted(epoch) == list(range(num_examples))


def test_visits_do_not_depend_on_the_batch_size():
    np.testing.assert_array_equal(visits(12, 5, 17), visits(5, 12, 17))


def test_any_step_can_be_asked_for_directly():
    row = visits(40, 4, 10)
    for step in (39, 0, 17, 17):
        np.testing.assert_array_equal(batch_indices(0, step, 4, 10), row[4 * step : 4 * step + 4])


def test_epochs_and_seeds_are_shuffled_differently():
    epochs = visits(3, 100, 100).reshape(3, 100).tolist()
    orders = [*epochs, batch_indices(1, 0, 100, 100).tolist(), list(range(100))]
    assert len(set(map(tuple, orders))) == len(orders)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 10), (10, 4), (3, 8), (1, 1)])
def test_padded_batches_hold_every_example_once(num_examples, batch_size):
    batches = padded_batches(num_examples, batch_size)
    seen = np.concatenate([index[mask] for index, mask in batches])
    assert seen.tolist() == list(range(num_examples))
    assert all(index.shape == mask.shape == (batch_size,) for index, mask in batches)
    assert max(index.max() for index, _ in batches) < num_examples
