"""How t is drawn: its distribution, its weights, and its independence of the batch's split."""

from collections import deque
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jax_ddpm.diffusion.time_sampling import LossHistory, LossSecondMoment, Stratified, Uniform


@partial(jax.jit, static_argnums=0)
def draw_of(sampler, state, shared_key, keys, position):
    return sampler.draw(state, shared_key, keys, position)


def draw(sampler, batch, seed=0, state=None, part=slice(None)):
    """The times and weights of a part of a global batch, as NumPy arrays."""
    shared_key, key = jax.random.split(jax.random.key(seed))
    keys, position = jax.random.split(key, batch), jnp.arange(batch, dtype=jnp.float32) / batch
    state = sampler.init() if state is None else state
    return map(np.asarray, draw_of(sampler, state, shared_key, keys[part], position[part]))


def histogram(t, num_timesteps):
    return np.bincount(t.astype(int), minlength=num_timesteps)


def warm_history(num_timesteps, length, rng):
    return LossHistory(
        jnp.asarray(rng.exponential(size=(num_timesteps, length)), jnp.float32),
        jnp.full(num_timesteps, length, jnp.int32),
    )


@pytest.mark.parametrize("sampler", [Uniform(50), Stratified(50), LossSecondMoment(50)])
class TestEverySampler:
    def test_draws_whole_times_in_range(self, sampler):
        t, weight = draw(sampler, 400)
        assert t.dtype == weight.dtype == np.float32
        assert set(t) == set(range(50))
        np.testing.assert_allclose(weight, 1, rtol=1e-6)

    def test_the_split_of_the_batch_does_not_matter(self, sampler):
        whole, _ = draw(sampler, 400)
        for part in (slice(0, 100), slice(100, 400)):
            t, _ = draw(sampler, 400, part=part)
            np.testing.assert_array_equal(t, whole[part])

    def test_is_uniform_before_anything_is_known(self, sampler):
        """Marginally: one example's t over many steps, that is, over many shared keys."""
        keys = jax.random.split(jax.random.key(1), (2, 5000))
        position = jnp.full(1, 0.3, jnp.float32)
        t, _ = jax.vmap(
            lambda shared_key, key: sampler.draw(sampler.init(), shared_key, key[None], position)
        )(*keys)
        assert chisquare(histogram(np.ravel(t), 50)).pvalue > 1e-3


class TestStratified:
    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize(("num_timesteps", "batch"), [(64, 64), (1000, 1000), (1000, 125)])
    def test_one_time_in_each_stratum(self, num_timesteps, batch, seed):
        t, _ = draw(Stratified(num_timesteps), batch, seed)
        np.testing.assert_array_equal(np.sort(t // (num_timesteps // batch)), np.arange(batch))

    def test_a_larger_batch_covers_every_time_equally(self):
        t, _ = draw(Stratified(16), 64)
        np.testing.assert_array_equal(histogram(t, 16), 4)

    def test_the_shared_key_moves_the_whole_batch(self):
        (one, _), (other, _) = (draw(Stratified(64), 8, seed) for seed in (0, 1))
        assert np.all(one != other)


class TestLossSecondMoment:
    def test_uniform_until_every_time_has_its_losses(self, rng):
        sampler, history = LossSecondMoment(6, length=4), warm_history(6, 4, rng)
        waiting = history._replace(counts=history.counts.at[2].set(3))
        np.testing.assert_allclose(sampler.probabilities(waiting), 1 / 6, rtol=1e-6)
        assert np.ptp(sampler.probabilities(history)) > 0.01

    def test_proportional_to_the_root_of_the_second_moment(self, rng):
        sampler, history = LossSecondMoment(6, length=4, uniform_share=0.1), warm_history(6, 4, rng)
        root = np.sqrt(np.mean(np.square(history.losses), axis=1))
        expected = 0.9 * root / root.sum() + 0.1 / 6
        np.testing.assert_allclose(sampler.probabilities(history), expected, rtol=1e-6)

    def test_draws_follow_the_probabilities(self, rng):
        sampler, history = LossSecondMoment(6, length=4), warm_history(6, 4, rng)
        t, _ = draw(sampler, 5000, state=history)
        expected = np.asarray(sampler.probabilities(history), float)
        assert chisquare(histogram(t, 6), 5000 * expected / expected.sum()).pvalue > 1e-3

    def test_weights_undo_the_probabilities(self, rng):
        """Σ_t p(t)·w(t)·f(t) is the mean of f over uniform t."""
        sampler, history = LossSecondMoment(6, length=4), warm_history(6, 4, rng)
        t, weight = draw(sampler, 500, state=history)
        weight_of = np.array([weight[t == step][0] for step in range(6)])
        np.testing.assert_array_equal(weight_of[t.astype(int)], weight)
        f = rng.standard_normal(6)
        unbiased = np.sum(sampler.probabilities(history) * weight_of * f)
        np.testing.assert_allclose(unbiased, f.mean(), atol=1e-6)

    def test_no_time_is_ever_left_out(self):
        """A time whose losses are all 0 keeps its uniform share."""
        losses = jnp.ones((6, 4)).at[3].set(0)
        p = LossSecondMoment(6, length=4).probabilities(
            LossHistory(losses, jnp.full(6, 4, jnp.int32))
        )
        np.testing.assert_allclose(p[3], 1e-3 / 6, rtol=1e-6)

    @pytest.mark.parametrize("batch", [1, 7, 64])
    def test_keeps_the_last_losses_of_each_time(self, rng, batch):
        """As one deque per t would, also where a batch holds more than ``length`` of one t."""
        sampler = LossSecondMoment(5, length=10)
        update = jax.jit(sampler.update)
        state, oracle = sampler.init(), [deque(maxlen=10) for _ in range(5)]
        for _ in range(20):
            # Squared, so that small t are frequent and the last is rare.
            t = np.floor(5 * rng.uniform(size=batch) ** 2).astype(np.float32)
            loss = rng.exponential(size=batch).astype(np.float32)
            state = update(state, jnp.asarray(t), jnp.asarray(loss))
            for one_t, one_loss in zip(t, loss, strict=True):
                oracle[int(one_t)].append(one_loss)
            for row, kept in zip(state.losses, oracle, strict=True):
                padded = [*kept, *[0] * (10 - len(kept))]
                np.testing.assert_array_equal(np.sort(row), np.sort(padded))

    def test_counts_every_loss(self):
        sampler = LossSecondMoment(3, length=2)
        t = jnp.array([0.0, 2, 2, 2, 0])
        state = sampler.update(sampler.init(), t, jnp.ones(5))
        np.testing.assert_array_equal(state.counts, [2, 0, 3])
