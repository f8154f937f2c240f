"""Counts by hand; the interval against SciPy and against the coverage that it promises."""

import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.agreement import agreement
from jax_ddpm.evaluation.estimate import proportion


class TestWilsonInterval:
    @pytest.mark.parametrize("count", [1, 2, 10, 97, 10_000, 10_000_000])
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 1.0])
    def test_is_scipys(self, count, share):
        from scipy.stats import binomtest

        successes = round(share * count)
        found = proportion(successes, count)
        expected = binomtest(successes, count).proportion_ci(method="wilson")
        np.testing.assert_allclose(found[1:3], expected, rtol=1e-9, atol=1e-15)
        assert (found.value, found.count) == (successes / count, count)

    @pytest.mark.parametrize("count", [1, 3, 10, 200])
    def test_stays_in_range_and_around_the_share(self, count):
        for successes in range(count + 1):
            value, low, high, _ = proportion(successes, count)
            assert 0 <= low <= value <= high <= 1
        assert proportion(0, count).low == 0 < proportion(0, count).high < 1
        assert proportion(count, count).high == 1 > proportion(count, count).low > 0

    @pytest.mark.parametrize("count", [10, 50, 200])
    def test_holds_the_truth_95_times_in_100(self, count):
        """It does in the mean over the truth, by exact summation."""
        from scipy.stats import binom

        truth = np.linspace(0.001, 0.999, 999)
        _, low, high, _ = np.array([proportion(k, count) for k in range(count + 1)]).T
        chance = binom.pmf(np.arange(count + 1)[:, None], count, truth[None])
        coverage = np.sum(chance * ((low[:, None] <= truth) & (truth <= high[:, None])), axis=0)
        assert coverage.mean() == pytest.approx(0.95, abs=0.01)
        assert coverage.min() > 0.82


class TestAgreement:
    def test_by_hand(self):
        requested = np.array([0, 0, 0, 1, 1, 3])
        predicted = np.array([0, 0, 1, 1, 2, 0])
        found = agreement(requested, predicted, 4)
        np.testing.assert_array_equal(
            found.confusion, [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
        )
        assert found.overall == proportion(3, 6)
        expected = {0: proportion(2, 3), 1: proportion(1, 2), 3: proportion(0, 1)}
        assert found.per_class == expected, "a class that nobody asked for has no rate"

    def test_against_a_loop(self):
        rng = np.random.default_rng(0)
        requested, predicted = rng.integers(0, 5, (2, 300), dtype=np.int32)
        found = agreement(requested, predicted, 5)
        for r, p in np.ndindex(5, 5):
            assert found.confusion[r, p] == np.sum((requested == r) & (predicted == p))
        assert found.overall.value == np.mean(requested == predicted)
        for c, rate in found.per_class.items():
            assert rate.value == np.mean(predicted[requested == c] == c)
        assert sum(rate.count for rate in found.per_class.values()) == 300

    def test_perfect(self):
        labels = np.arange(30) % 3
        found = agreement(labels, labels, 3)
        assert found.overall.value == found.overall.high == 1
        np.testing.assert_array_equal(found.confusion, 10 * np.eye(3))

    def test_refuses_what_it_cannot_measure(self):
        labels = np.arange(10)
        for pair, name in (
            ((labels, labels - 1), "predicted"),
            ((labels + 1, labels), "requested"),
        ):
            with pytest.raises(UserError, match=f"the {name} labels span .* 10 classes 0 to 9"):
                agreement(*pair, 10)
        with pytest.raises(UserError, match="1 sample or more"):
            agreement(labels[:0], labels[:0], 10)
