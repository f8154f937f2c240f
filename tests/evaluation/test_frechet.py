"""The Fréchet distance against closed forms, the matrix root of SciPy and another project's FID."""

import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.frechet import Moments, MomentSums, frechet_distance, moments


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def features(rng, count, width, offset=0.0):
    """Correlated features whose scales span two orders of magnitude."""
    mixing = rng.standard_normal((width, width)) * np.logspace(0, -2, width)
    return rng.standard_normal((count, width)) @ mixing + rng.standard_normal(width) + offset


def rotation(rng, width):
    return np.linalg.qr(rng.standard_normal((width, width)))[0]


def gaussian(mean, covariance):
    return Moments(np.asarray(mean, float), np.asarray(covariance, float), None)


def spread(*of):
    return sum(np.trace(each.covariance) for each in of)


class TestMoments:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_are_numpys(self, rng, dtype):
        x = features(rng, 50, 4).astype(dtype)
        found = moments(x)
        np.testing.assert_allclose(found.mean, x.astype(float).mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(x.T.astype(float)), rtol=1e-10)
        assert found.count == 50
        assert found.mean.dtype == found.covariance.dtype == np.float64

    @pytest.mark.parametrize("offset", [0.0, 1e4])
    @pytest.mark.parametrize("split", [[1], [1, 2, 3], [30, 59], [59], range(1, 60)])
    def test_stream_in_any_split(self, rng, offset, split):
        """It is as exact far from 0 as near it: a sum of squares would lose eight digits."""
        x = features(rng, 60, 4, offset)
        sums = MomentSums(4)
        for part in np.split(x, list(split)):
            sums.add(part)
        found, expected = sums.moments(), np.cov((x - x[0]).T)
        np.testing.assert_allclose(found.covariance, expected, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(found.mean, x[0] + (x - x[0]).mean(axis=0), rtol=1e-13)
        assert found.count == 60

    def test_go_on_after_they_were_read(self, rng):
        x = features(rng, 60, 4)
        sums = MomentSums(4)
        sums.add(x[:30])
        first = sums.moments()
        sums.add(x[30:])
        np.testing.assert_array_equal(first.mean, moments(x[:30]).mean)
        np.testing.assert_allclose(sums.moments().covariance, moments(x).covariance, rtol=1e-10)

    def test_of_one_sample_are_refused(self, rng):
        with pytest.raises(UserError, match="2 samples or more; there are 1"):
            moments(features(rng, 1, 4))

    def test_count_what_is_not_finite(self, rng):
        x = features(rng, 20, 4)
        x[3, 1], x[7, 0], x[7, 2] = np.nan, np.inf, -np.inf
        with pytest.raises(UserError, match="3 of the 80 values of the features"):
            moments(x)


class TestClosedForms:
    def test_one_dimension(self):
        """(μ_a - μ_b)² + (σ_a - σ_b)²."""
        a, b = gaussian([1.0], [[4.0]]), gaussian([3.5], [[0.25]])
        assert frechet_distance(a, b) == pytest.approx(2.5**2 + 1.5**2, rel=1e-14)

    @pytest.mark.parametrize("width", [1, 3, 40])
    def test_commuting_covariances(self, rng, width):
        axes = rotation(rng, width)
        stds = rng.uniform(0.1, 3, (2, width))
        means = rng.standard_normal((2, width))
        a, b = (
            gaussian(mean, (axes * std**2) @ axes.T) for mean, std in zip(means, stds, strict=True)
        )
        expected = np.sum((means[0] - means[1]) ** 2) + np.sum((stds[0] - stds[1]) ** 2)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)

    def test_two_by_two(self):
        """tr √M = √(tr M + 2·√(det M)), with M = Σ_a·Σ_b."""
        a = gaussian([0, 0], [[2.0, 0.7], [0.7, 1.0]])
        b = gaussian([0, 0], [[1.0, -0.4], [-0.4, 3.0]])
        product = a.covariance @ b.covariance
        root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
        assert frechet_distance(a, b) == pytest.approx(7 - 2 * root, rel=1e-12)

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_point(self, rng, which):
        """W₂² from a point is the mean squared distance to it."""
        pair = [moments(features(rng, 100, 5)), gaussian(np.ones(5), np.zeros((5, 5)))]
        expected = np.sum((pair[0].mean - 1) ** 2) + np.trace(pair[0].covariance)
        assert frechet_distance(pair[which], pair[1 - which]) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("ranks", [(3, 30), (30, 3), (3, 5), (5, 5), (5, 3)])
    def test_low_rank(self, rng, ranks):
        """tr (Σ_a·Σ_b)^{1/2} is the nuclear norm of L_aᵀ·L_b, of any factors Σ = L·Lᵀ."""
        factors = [rng.standard_normal((30, rank)) for rank in ranks]
        a, b = (gaussian(np.zeros(30), factor @ factor.T) for factor in factors)
        expected = spread(a, b) - 2 * np.linalg.norm(factors[0].T @ factors[1], "nuc")
        assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-7 * spread(a, b))

    def test_dead_features_change_nothing(self, rng):
        x, y = features(rng, 100, 6), features(rng, 100, 6)
        padded = (moments(np.pad(z, [(0, 0), (2, 3)])) for z in (x, y))
        expected = frechet_distance(moments(x), moments(y))
        assert frechet_distance(*padded) == pytest.approx(expected, rel=1e-9)


class TestProperties:
    @pytest.fixture
    def pair(self, rng):
        return features(rng, 300, 20), features(rng, 200, 20)

    @pytest.mark.parametrize("decay", [0.0, 0.01, 0.05, 0.2])
    @pytest.mark.parametrize("rank", [10, 100])
    def test_is_0_of_equal_moments(self, rng, rank, decay):
        x = rng.standard_normal((400, rank)) * np.exp(-decay * np.arange(rank))
        same = moments(x @ rotation(rng, 100)[:rank])._replace(count=None)
        assert 0 <= frechet_distance(same, same) <= 1e-8 * spread(same)

    def test_is_symmetric(self, pair):
        a, b = map(moments, pair)
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)

    def test_is_invariant_under_rotation_and_translation(self, rng, pair):
        axes, shift = rotation(rng, 20), rng.standard_normal(20)
        moved = (moments(x @ axes + shift) for x in pair)
        expected = frechet_distance(*map(moments, pair))
        assert frechet_distance(*moved) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("scale", [1e-3, 1e3])
    def test_scales_as_a_square(self, pair, scale):
        expected = scale**2 * frechet_distance(*map(moments, pair))
        scaled = (moments(scale * x) for x in pair)
        assert frechet_distance(*scaled) == pytest.approx(expected, rel=1e-9)

    def test_root_is_a_metric(self, rng):
        a, b, c = (moments(features(rng, 100, 10)) for _ in range(3))
        ab, bc, ac = (np.sqrt(frechet_distance(*p)) for p in ((a, b), (b, c), (a, c)))
        assert max(ab, bc, ac) <= (ab + bc + ac) / 2

    def test_bias_falls_as_one_over_n(self, rng):
        """It is far from 0 between equal distributions, so N belongs beside the value."""

        def mean_distance(count):
            draws = rng.standard_normal((50, 2, count, 10))
            return np.mean([frechet_distance(moments(x), moments(y)) for x, y in draws])

        assert mean_distance(100) / mean_distance(400) == pytest.approx(4, rel=0.15)


class TestOracles:
    @pytest.mark.parametrize("width", [2, 20, 100])
    def test_scipy(self, rng, width):
        from scipy.linalg import sqrtm

        a, b = (moments(features(rng, 3 * width, width)) for _ in range(2))
        root = np.trace(sqrtm(a.covariance @ b.covariance)).real
        expected = np.sum((a.mean - b.mean) ** 2) + spread(a, b) - 2 * root
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.filterwarnings("ignore")
    def test_pytorch_fid(self, rng):
        oracle = pytest.importorskip("pytorch_fid.fid_score", exc_type=ImportError)
        a, b = (moments(features(rng, 300, 64)) for _ in range(2))
        expected = oracle.calculate_frechet_distance(*a[:2], *b[:2])
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


class TestMistakes:
    @pytest.mark.parametrize("which", [0, 1])
    def test_too_few_samples(self, rng, which):
        counts = np.roll([20, 21], which)
        pair = [moments(features(rng, count, 20)) for count in counts]
        with pytest.raises(UserError, match=r"20 samples are too few.*20 features.*--metrics=kid"):
            frechet_distance(*pair)

    def test_one_more_than_features_is_enough(self, rng):
        assert frechet_distance(*(moments(features(rng, 21, 20)) for _ in range(2))) > 0

    def test_other_features(self, rng):
        pair = (moments(features(rng, 50, width)) for width in (4, 5))
        with pytest.raises(UserError, match="moments of 4 and of 5 features"):
            frechet_distance(*pair)

    @pytest.mark.parametrize("field", ["mean", "covariance"])
    def test_not_finite(self, rng, field):
        good = moments(features(rng, 50, 4))
        bad = good._replace(**{field: np.full_like(getattr(good, field), np.nan)})
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(UserError, match="not finite"):
                frechet_distance(*pair)

    def test_no_covariance(self):
        with pytest.raises(UserError, match="not positive semi-definite"):
            frechet_distance(gaussian([0, 0], -np.eye(2)), gaussian([0, 0], -np.eye(2)))
