import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.keys import StepKeys, Stream, example_keys, seed_key, stream_key


def words(keys):
    """Keys as a list of tuples, one per key."""
    data = np.asarray(jax.random.key_data(keys))
    return [tuple(row) for row in data.reshape(-1, data.shape[-1])]


@pytest.fixture
def seed():
    return jax.random.key(0)


def step_keys(seed, step, index=range(8)):
    return StepKeys(seed, jnp.array(step), jnp.array([*index]), 8)


def test_a_seed_is_not_taken_for_its_remainder():
    assert words(seed_key(2**32 - 1)) != words(seed_key(0))
    for seed in (-1, 2**32, 2**64):
        with pytest.raises(UserError, match=rf"^--seed={seed}: it must be in"):
            seed_key(seed)


def test_streams_have_numbers_of_their_own():
    assert len(Stream.__members__) == len({stream.value for stream in Stream})


def test_no_key_serves_twice(seed):
    """Keys differ over streams, steps and examples, shared keys and those of streams included."""
    keys = [stream_key(seed, stream) for stream in Stream]
    for stream, step in itertools.product(Stream, range(3)):
        keys += [step_keys(seed, step).shared(stream), step_keys(seed, step).per_example(stream)]
    used = [word for key in keys for word in words(key)]
    assert len(set(used)) == len(used) == len(Stream) * (1 + 3 * (1 + 8))


def test_an_example_has_the_key_of_its_place_in_the_global_batch(seed):
    whole = words(step_keys(seed, 2).per_example(Stream.NOISE))
    part = words(step_keys(seed, 2).take(jnp.array([6, 1])).per_example(Stream.NOISE))
    assert part == [whole[6], whole[1]]
    assert words(example_keys(step_keys(seed, 2).shared(Stream.NOISE), jnp.arange(8))) == whole


def test_a_part_of_the_batch_shares_the_batchs_key(seed):
    part = step_keys(seed, 2).take(jnp.array([3]))
    assert words(part.shared(Stream.TIME)) == words(step_keys(seed, 2).shared(Stream.TIME))
    assert part.batch_size == 8


def test_gathers_the_values_of_all_devices_in_the_order_of_their_examples(seed):
    def on_device(index):
        keys = dataclasses.replace(step_keys(seed, 2), index=index, axes=("data",))
        return keys.gather(10 * index), keys.take(index[::2]).gather(index[::2])

    whole, part = jax.vmap(on_device, axis_name="data")(jnp.arange(8).reshape(2, 4))
    np.testing.assert_array_equal(whole, [range(0, 80, 10)] * 2)
    np.testing.assert_array_equal(part, [range(0, 8, 2)] * 2)


def test_without_devices_there_is_nothing_to_gather(seed):
    values = jnp.arange(8)
    assert step_keys(seed, 2).gather(values) is values
