"""Copies, new data and noise are told apart, by statistics that agree with their definitions."""

import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.distances import nearest
from jax_ddpm.evaluation.memorisation import closer_share, closest_percent_share, memorisation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class TestNearest:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("block", [1, 7, 1000])
    def test_is_the_nearest(self, rng, block, dtype):
        x, y = (
            rng.standard_normal((30, 5)).astype(dtype),
            rng.standard_normal((50, 5)).astype(dtype),
        )
        distances = np.linalg.norm(x[:, None].astype(float) - y[None], axis=-1)
        found = nearest(x, y, block)
        np.testing.assert_array_equal(found.neighbour, distances.argmin(axis=1))
        np.testing.assert_allclose(found.distance, distances.min(axis=1), rtol=1e-12)

    @pytest.mark.parametrize("offset", [0.0, 1e6])
    def test_copies_are_at_0(self, rng, offset):
        y = rng.standard_normal((50, 400)) + offset
        found = nearest(y[10:20], y)
        np.testing.assert_array_equal(found.distance, 0)
        np.testing.assert_array_equal(found.neighbour, np.arange(10, 20))

    def test_small_distances_are_exact_far_from_0(self, rng):
        y = rng.standard_normal((50, 4)) + 1e4
        np.testing.assert_allclose(nearest(y + 2**-10, y).distance, 2**-9, rtol=1e-6)


class TestCloserShare:
    @pytest.fixture
    def distances(self, rng):
        """Distances with ties within each set and between them."""
        return rng.integers(0, 20, 35).astype(float), rng.integers(3, 25, 28).astype(float)

    @staticmethod
    def by_definition(sample, heldout):
        s, h = sample[:, None], heldout[None]
        return np.mean((s < h) + 0.5 * (s == h))

    def test_is_the_share_of_pairs(self, distances):
        assert closer_share(*distances).value == pytest.approx(self.by_definition(*distances))

    def test_is_the_mann_whitney_statistic(self, distances):
        from scipy.stats import mannwhitneyu

        sample, heldout = distances
        u = mannwhitneyu(heldout, sample).statistic
        assert closer_share(*distances).value == pytest.approx(u / (sample.size * heldout.size))

    def test_standard_error_is_the_jackknife(self, distances):
        sample, heldout = distances
        variance = 0.0
        for without in (
            [self.by_definition(np.delete(sample, i), heldout) for i in range(sample.size)],
            [self.by_definition(sample, np.delete(heldout, i)) for i in range(heldout.size)],
        ):
            n = len(without)
            variance += (n - 1) / n * np.sum((without - np.mean(without)) ** 2)
        assert closer_share(*distances).standard_error == pytest.approx(np.sqrt(variance))

    @pytest.mark.parametrize("shift", [0.0, 0.7])
    def test_standard_error_is_the_spread_over_draws(self, rng, shift):
        draws = rng.standard_normal((600, 2, 40))
        values, errors = np.array([closer_share(s, h + shift) for s, h in draws]).T
        assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.1)

    def test_exchanged_sets_add_up_to_1(self, distances):
        there, back = closer_share(*distances), closer_share(*distances[::-1])
        assert there.value + back.value == pytest.approx(1)
        assert there.standard_error == pytest.approx(back.standard_error)


class TestClosestPercent:
    @pytest.mark.parametrize(("count", "rank"), [(2, 1), (99, 1), (100, 1), (101, 2), (1000, 10)])
    def test_counts_samples_closer_than_that_held_out_image(self, rng, count, rank):
        heldout = rng.permutation(count) + 1.0
        sample = np.arange(0.5, rank + 3)  # one before each of the held-out distances
        found = closest_percent_share(sample, heldout)
        assert found.value == pytest.approx(rank / len(sample))
        assert found.count == len(sample)

    def test_a_tie_is_not_closer(self):
        assert closest_percent_share(np.ones(10), np.ones(100)).value == 0

    @pytest.mark.parametrize("count", [50, 250])
    def test_mean_where_nothing_is_copied(self, rng, count):
        draws = rng.uniform(size=(1000, count + 50))
        shares = [closest_percent_share(d[:50], d[50:]).value for d in draws]
        expected = -(-count // 100) / (count + 1)
        assert np.mean(shares) == pytest.approx(expected, abs=4 * np.std(shares) / 1000**0.5)


class TestMemorisation:
    @pytest.fixture
    def sets(self, rng):
        """Training and held-out images of one distribution, and as many new draws."""
        return np.split(rng.standard_normal((1500, 6)), 3)

    def test_copies(self, sets):
        training, heldout, _ = sets
        found = memorisation(training[::-1], training, heldout)
        assert found.closer_share == (1, 0)
        assert found.closest_percent_share.value == 1
        assert found.sample_median == 0 < found.heldout_median
        np.testing.assert_array_equal(found.nearest_index, np.arange(500)[::-1])

    def test_near_copies(self, rng, sets):
        training, heldout, _ = sets
        blurred = training + 0.01 * rng.standard_normal(training.shape)
        found = memorisation(blurred, training, heldout)
        assert found.closer_share.value > 0.99
        np.testing.assert_array_equal(found.nearest_index, np.arange(500))

    def test_new_draws(self, sets):
        training, heldout, fresh = sets
        found = memorisation(fresh, training, heldout)
        assert abs(found.closer_share.value - 0.5) < 3 * found.closer_share.standard_error < 0.06
        assert found.closest_percent_share.low < 0.01 < found.closest_percent_share.high
        assert found.sample_median == pytest.approx(found.heldout_median, rel=0.05)

    def test_a_few_copies_among_new_draws(self, sets):
        """One in ten: the first share hardly moves, the second is made for this."""
        training, heldout, fresh = sets
        found = memorisation(np.concatenate([training[:50], fresh[50:]]), training, heldout)
        assert found.closer_share.value < 0.62
        assert found.closest_percent_share.low > 0.05

    def test_noise(self, sets):
        training, heldout, fresh = sets
        found = memorisation(10 * fresh, training, heldout)
        assert found.closer_share.value < 0.01
        assert found.closest_percent_share.value == 0

    def test_against_all_pairs(self, sets):
        training, heldout, fresh = (x.astype(np.float32) for x in sets)
        found = memorisation(fresh, training, heldout, block=33)
        to_training = [
            np.linalg.norm(x[:, None].astype(float) - training[None], axis=-1)
            for x in (fresh, heldout)
        ]
        sample, other = (distances.min(axis=1) for distances in to_training)
        np.testing.assert_array_equal(found.nearest_index, to_training[0].argmin(axis=1))
        assert found.closer_share.value == pytest.approx(np.mean(sample[:, None] < other[None]))
        assert found.closest_percent_share.value == np.mean(sample < np.sort(other)[4])
        assert found.sample_median == pytest.approx(np.median(sample))
        assert found.heldout_median == pytest.approx(np.median(other))

    @pytest.mark.parametrize(("which", "fewest"), [(0, 2), (1, 1), (2, 2)])
    def test_refuses_what_it_cannot_measure(self, sets, which, fewest):
        few, broken = list(sets), list(sets)
        few[which] = few[which][: fewest - 1]
        with pytest.raises(UserError, match="2 samples, 2 held-out images and 1 training image"):
            memorisation(*few)
        broken[which] = np.where(np.arange(6) == 1, np.nan, broken[which])
        name = ("samples", "training images", "held-out images")[which]
        with pytest.raises(UserError, match=f"500 of the 3,000 .* of the {name} are not finite"):
            memorisation(*broken)
