"""How t is drawn: its distribution, its weights, and its independence of the batch's split."""

from collections import deque
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jax_ddpm.diffusion.time_sampling import LossSecondMoment, Stratified, Uniform

T = 10
ADAPTIVE = LossSecondMoment(T, length=4, uniform_share=0.1)
STEP = jnp.int32(7)


@partial(jax.jit, static_argnums=0)
def draw_jit(sampler, state, shared_key, keys, position):
    return sampler.draw(state, STEP, shared_key, keys, position)


def draw(sampler, batch=1000, order=slice(None), state=None, seed=0):
    """Times and weights of a global batch, its examples in another order, as NumPy arrays."""
    state = sampler.init() if state is None else state
    keys = jax.random.split(jax.random.key(1), batch)
    position = np.arange(batch, dtype=np.float32) / batch
    drawn = draw_jit(sampler, state, jax.random.key(seed), keys[order], position[order])
    return [np.asarray(array) for array in drawn]


def histogram(t):
    return np.bincount(t.astype(int), minlength=T)


@pytest.mark.parametrize("sampler", [Uniform(T), Stratified(T), ADAPTIVE], ids=repr)
class TestEverySampler:
    """Draws before any loss is known."""

    def test_draws_whole_times_uniformly(self, sampler):
        t, weight = draw(sampler)
        assert t.dtype == weight.dtype == np.float32
        assert set(t) == set(range(T))
        assert chisquare(histogram(t)).pvalue > 1e-3
        np.testing.assert_allclose(weight, 1, rtol=1e-6)

    def test_each_example_depends_on_its_own_key_and_position(self, sampler, rng):
        """Its place in the local batch does not matter, nor what is drawn beside it."""
        order = rng.choice(1000, 1000)
        (whole, _), (t, _) = draw(sampler), draw(sampler, order=order)
        np.testing.assert_array_equal(t, whole[order])

    def test_measuring_is_spread_evenly_and_has_no_state(self, sampler):
        assert sampler.measuring() == Stratified(T)

    def test_ranks_are_shares_of_the_chain(self, sampler):
        t = jnp.arange(T, dtype=jnp.float32)
        np.testing.assert_allclose(sampler.rank(t), np.arange(T) / T, rtol=1e-6)


class TestStratified:
    @pytest.mark.parametrize(("num_timesteps", "batch"), [(1000, 1000), (1000, 125)])
    def test_one_time_in_each_stratum(self, num_timesteps, batch):
        for seed in range(20):
            t, _ = draw(Stratified(num_timesteps), batch, seed=seed)
            strata = np.sort(t // (num_timesteps // batch))
            np.testing.assert_array_equal(strata, np.arange(batch))

    def test_a_larger_batch_covers_every_time_equally(self):
        t, _ = draw(Stratified(T))
        np.testing.assert_array_equal(histogram(t), 100)

    def test_each_example_is_uniform_over_steps(self):
        """The shared key turns the whole batch."""
        of_example = np.array([draw(Stratified(T), seed=seed)[0][17] for seed in range(200)])
        assert chisquare(histogram(of_example)).pvalue > 1e-3


class TestLossSecondMoment:
    @pytest.fixture
    def history(self, rng):
        """Enough losses at every t."""
        losses = rng.exponential(size=(T, ADAPTIVE.length)).astype(np.float32)
        counts = jnp.full(T, ADAPTIVE.length, jnp.int32)
        return ADAPTIVE.init()._replace(losses=jnp.asarray(losses), counts=counts)

    @pytest.fixture
    def expected(self, history):
        root = np.sqrt(np.mean(np.square(history.losses, dtype=float), axis=1))
        return 0.9 * root / root.sum() + 0.1 / T

    def test_proportional_to_the_root_of_the_second_moment(self, history, expected):
        np.testing.assert_allclose(ADAPTIVE.probabilities(history, STEP), expected, rtol=1e-6)

    def test_uniform_until_every_time_has_its_losses(self, history):
        waiting = history._replace(counts=history.counts.at[2].add(-1))
        np.testing.assert_allclose(ADAPTIVE.probabilities(waiting, STEP), 1 / T, rtol=1e-6)

    def test_uniform_where_all_losses_are_0(self, history):
        nothing = history._replace(losses=jnp.zeros_like(history.losses))
        np.testing.assert_allclose(ADAPTIVE.probabilities(nothing, STEP), 1 / T, rtol=1e-6)

    def test_all_micro_batches_of_a_step_draw_alike(self, history):
        """Losses of a step's first part count from the next step on."""
        t, loss = jnp.arange(T, dtype=jnp.float32), jnp.arange(T, dtype=jnp.float32)
        later = ADAPTIVE.update(history, STEP, t, loss)
        np.testing.assert_array_equal(
            ADAPTIVE.probabilities(later, STEP), ADAPTIVE.probabilities(history, STEP)
        )
        after = ADAPTIVE.probabilities(later, STEP + 1)
        assert np.all(after != ADAPTIVE.probabilities(history, STEP))

    def test_draws_follow_the_probabilities(self, history, expected):
        t, _ = draw(ADAPTIVE, state=history)
        assert chisquare(histogram(t), t.size * expected).pvalue > 1e-3

    def test_weights_undo_the_probabilities(self, history, expected, rng):
        """Σ_t p(t)·w(t)·f(t) is the mean of f over uniform t."""
        t, weight = draw(ADAPTIVE, state=history)
        weight_of = np.array([weight[t == step][0] for step in range(T)])
        np.testing.assert_array_equal(weight_of[t.astype(int)], weight)
        f = rng.standard_normal(T)
        np.testing.assert_allclose(np.sum(expected * weight_of * f), f.mean(), atol=1e-6)

    def test_no_time_is_ever_left_out(self, history):
        """A time whose losses are all 0 keeps its uniform share."""
        solved = history._replace(losses=history.losses.at[3].set(0))
        np.testing.assert_allclose(ADAPTIVE.probabilities(solved, STEP)[3], 0.1 / T, rtol=1e-6)

    @pytest.mark.parametrize("batch", [1, 7, 64])
    def test_keeps_the_last_losses_of_each_time(self, rng, batch):
        """One deque per t would do the same, even if a batch holds over ``length`` of one t."""
        sampler = LossSecondMoment(5, length=10)
        update = jax.jit(sampler.update)
        state, oracle = sampler.init(), [deque(maxlen=10) for _ in range(5)]
        counts = np.zeros(5, int)
        for step in range(20):
            # Squared, so that small t are frequent and the last is rare.
            t = np.floor(5 * rng.uniform(size=batch) ** 2).astype(np.float32)
            loss = rng.exponential(size=batch).astype(np.float32)
            state = update(state, jnp.int32(step), t, loss)
            for one_t, one_loss in zip(t.astype(int), loss, strict=True):
                oracle[one_t].append(one_loss)
                counts[one_t] += 1
            for row, kept in zip(np.asarray(state.losses), oracle, strict=True):
                unused = [0] * (10 - len(kept))
                np.testing.assert_array_equal(np.sort(row), np.sort([*kept, *unused]))
        np.testing.assert_array_equal(state.counts, counts)
