"""KID against its definition, its error against leaving samples out and against new draws."""

import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.kernel import kernel_distance


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pair(rng):
    return rng.standard_normal((13, 4)), 1.3 * rng.standard_normal((9, 4)) + 0.5


def by_definition(x, y):
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    def mean_over_pairs(z):
        return np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])

    across = np.mean([k(a, b) for a in x for b in y])
    return mean_over_pairs(x) + mean_over_pairs(y) - 2 * across


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_is_the_mean_over_all_pairs(pair, dtype):
    x, y = (z.astype(dtype) for z in pair)
    expected = by_definition(x.astype(float), y.astype(float))
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-12)


def test_standard_error_is_the_jackknife(pair):
    x, y = pair
    variance = 0.0
    for without in (
        [by_definition(np.delete(x, i, axis=0), y) for i in range(len(x))],
        [by_definition(x, np.delete(y, i, axis=0)) for i in range(len(y))],
    ):
        n = len(without)
        variance += (n - 1) / n * np.sum((without - np.mean(without)) ** 2)
    assert kernel_distance(x, y).standard_error == pytest.approx(np.sqrt(variance), rel=1e-9)


@pytest.mark.parametrize("block", [1, 2, 5, 9, 13, 100])
def test_blocks_do_not_matter(pair, block):
    np.testing.assert_allclose(kernel_distance(*pair, block), kernel_distance(*pair), rtol=1e-11)


def test_is_symmetric_and_invariant_under_rotation_and_order(rng, pair):
    x, y = pair
    axes = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    expected = kernel_distance(x, y)
    for other in ((y, x), (x @ axes, y @ axes), (x[::-1], y[::-1])):
        np.testing.assert_allclose(kernel_distance(*other), expected, rtol=1e-10)


SHIFT = np.array([[[0.0]], [[0.5]]])  # of the second set of a pair


def estimates(draws):
    return np.array([kernel_distance(x, y) for x, y in draws]).T


class TestOverManyDraws:
    def test_is_unbiased_where_the_distributions_are_equal(self, rng):
        values, _ = estimates(rng.standard_normal((200, 2, 25, 5)))
        assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
        assert values.min() < 0

    def test_is_unbiased_where_they_differ(self, rng):
        """k is a polynomial, so that the mean is known from moments: here of N(0, 1), N(½, 1)."""
        values, _ = estimates(rng.standard_normal((300, 2, 20, 1)) + SHIFT)
        # (xy + 1)³ = x³y³ + 3x²y² + 3xy + 1: MMD² is the weighted squared difference of moments.
        m = 0.5
        expected = (m**3 + 3 * m) ** 2 + 3 * (m**2) ** 2 + 3 * m**2
        assert abs(values.mean() - expected) < 3 * values.std() / np.sqrt(len(values))

    def test_standard_error_is_their_spread(self, rng):
        values, errors = estimates(rng.standard_normal((300, 2, 100, 8)) + SHIFT)
        assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.15)

    def test_standard_error_is_safe_where_the_distributions_are_equal(self, rng):
        """The statistic has no linear part there: √2 times its spread for large sets."""
        values, errors = estimates(rng.standard_normal((300, 2, 100, 8)))
        assert 1 < np.sqrt(np.mean(errors**2)) / values.std() < 1.6


@pytest.mark.filterwarnings("ignore")
def test_torch_fidelity(rng):
    oracle = pytest.importorskip("torch_fidelity.metric_kid", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    x, y = rng.standard_normal((40, 16)), rng.standard_normal((40, 16)) + 0.3
    found = oracle.kid_features_to_metric(
        torch.tensor(x), torch.tensor(y), kid_subsets=1, kid_subset_size=40, verbose=False
    )
    expected = found["kernel_inception_distance_mean"]
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("which", [0, 1])
def test_refuses_what_it_cannot_measure(pair, which):
    few, broken = list(pair), list(pair)
    few[which] = few[which][:2]
    with pytest.raises(UserError, match="3 samples or more"):
        kernel_distance(*few)
    broken[which] = np.where(np.arange(4) == 1, np.nan, broken[which])
    with pytest.raises(UserError, match=f"{len(broken[which])} of the .* not finite"):
        kernel_distance(*broken)
