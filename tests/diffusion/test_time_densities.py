"""Times of continuous processes: their distribution, and its independence of the batch's split."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest, lognorm, norm, uniform

from jax_ddpm.diffusion.continuous import edm, rectified_flow
from jax_ddpm.diffusion.time_densities import (
    Continuous,
    Density,
    LogitNormalDensity,
    LogNormalDensity,
    UniformDensity,
)
from jax_ddpm.diffusion.time_sampling import TimeSampler

STEP = jnp.int32(7)
BATCH = 4000


class LogitNormal:
    """The logistic function of a normal variable."""

    def __init__(self, mean, std):
        self.normal = norm(mean, std)

    def cdf(self, t):
        return self.normal.cdf(np.log(t / (1 - t)))

    def ppf(self, u):
        return 1 / (1 + np.exp(-self.normal.ppf(u)))


# The papers' numbers, and others.
DENSITIES = {
    "uniform": (UniformDensity(0.002, 80.0), uniform(0.002, 79.998)),
    "log-normal of EDM": (LogNormalDensity(-1.2, 1.2), lognorm(s=1.2, scale=np.exp(-1.2))),
    "log-normal": (LogNormalDensity(0.4, 2.0), lognorm(s=2.0, scale=np.exp(0.4))),
    "logit-normal of SD3": (LogitNormalDensity(0.0, 1.0), LogitNormal(0.0, 1.0)),
    "logit-normal": (LogitNormalDensity(-0.5, 0.6), LogitNormal(-0.5, 0.6)),
}
every_density = pytest.mark.parametrize(
    ("density", "oracle"), DENSITIES.values(), ids=DENSITIES.keys()
)


@partial(jax.jit, static_argnums=0)
def draw_jit(sampler, shared_key, keys, position):
    return sampler.draw((), STEP, shared_key, keys, position)


def draw(sampler, order=slice(None), seed=0):
    """Times and weights of a global batch, its examples in another order, as NumPy arrays."""
    keys = jax.random.split(jax.random.key(1), BATCH)
    position = np.arange(BATCH, dtype=np.float32) / BATCH
    drawn = draw_jit(sampler, jax.random.key(seed), keys[order], position[order])
    return [np.asarray(array) for array in drawn]


@every_density
class TestDensities:
    def test_is_a_density(self, density, oracle):
        assert isinstance(density, Density)

    def test_quantiles_are_scipys(self, density, oracle, x64):
        u = np.concatenate([np.linspace(0.01, 0.99, 99), [1e-6, 1 - 1e-6]])
        np.testing.assert_allclose(density.quantile(jnp.asarray(u)), oracle.ppf(u), rtol=1e-10)

    def test_ranks_are_the_distribution_function(self, density, oracle, x64):
        t = oracle.ppf(np.linspace(0.001, 0.999, 99))
        np.testing.assert_allclose(density.rank(jnp.asarray(t)), oracle.cdf(t), rtol=1e-10)

    def test_float32_finds_back_the_rank(self, density, oracle):
        u = jnp.linspace(0.001, 0.999, 99, dtype=jnp.float32)
        t = density.quantile(u)
        assert t.dtype == jnp.float32
        np.testing.assert_allclose(density.rank(t), u, atol=1e-5)


@every_density
@pytest.mark.parametrize("stratified", [False, True])
class TestDraws:
    def test_is_a_time_sampler(self, density, oracle, stratified):
        assert isinstance(Continuous(density, stratified), TimeSampler)

    def test_follow_the_density(self, density, oracle, stratified):
        """A stratified draw is closer to it than chance, so its test is not."""
        t, weight = draw(Continuous(density, stratified))
        assert t.dtype == weight.dtype == np.float32
        assert kstest(t, oracle.cdf).pvalue > 1e-3
        np.testing.assert_array_equal(weight, 1)

    def test_each_example_depends_on_its_own_key_and_position(
        self, density, oracle, stratified, rng
    ):
        """Its place in the local batch does not matter, nor what is drawn beside it."""
        sampler, order = Continuous(density, stratified), rng.choice(BATCH, BATCH)
        (whole, _), (t, _) = draw(sampler), draw(sampler, order=order)
        np.testing.assert_array_equal(t, whole[order])


@every_density
class TestStratified:
    def test_covers_the_ranks_evenly(self, density, oracle):
        """One time at the same place of each of as many equal shares as there are examples."""
        t, _ = draw(Continuous(density, stratified=True))
        place = np.sort(oracle.cdf(t.astype(float))) * BATCH
        # float32 places are known to BATCH·2**-24; those in the clipped tails to 1e-6 of it.
        assert np.ptp(place - np.arange(BATCH)) < 0.02

    def test_each_example_is_spread_over_all_times(self, density, oracle):
        """The shared key turns the whole batch."""
        sampler = Continuous(density, stratified=True)
        of_example = np.array([draw(sampler, seed=seed)[0][17] for seed in range(200)])
        assert kstest(of_example, oracle.cdf).pvalue > 1e-3

    def test_measuring_draws_the_same_density_evenly(self, density, oracle):
        assert Continuous(density).measuring() == Continuous(density, stratified=True)

    @pytest.mark.parametrize("u", [0.0, np.nextafter(np.float32(1), np.float32(0))])
    def test_the_ends_of_a_stretch_are_finite_times(self, density, oracle, u):
        """u = 0 would be t = 0 or -∞: the position that leads there from the offset is drawn."""
        shared_key = jax.random.key(0)
        offset = np.float32(jax.random.uniform(shared_key))
        position = np.array([(np.float32(u) - offset) % 1], np.float32)
        sampler = Continuous(density, stratified=True)
        t, _ = sampler.draw((), STEP, shared_key, None, jnp.asarray(position))
        assert np.all(np.isfinite(t) & (t > 0))
        np.testing.assert_allclose(oracle.cdf(np.asarray(t, float)), u, atol=3e-6)


@pytest.mark.parametrize(
    ("process", "density"),
    [
        (edm(), UniformDensity(*edm().time_range)),
        (edm(), LogNormalDensity(-1.2, 1.2)),
        (rectified_flow(), UniformDensity(*rectified_flow().time_range)),
        (rectified_flow(), LogitNormalDensity(0.0, 1.0)),
    ],
)
def test_levels_of_the_process_are_finite(process, density):
    """They are finite at the outermost times too."""
    u = jnp.array([1e-6, 0.5, 1 - 1e-6], jnp.float32)
    t = density.quantile(u)
    for level in (process.alpha(t), process.sigma(t), process.log_snr(t)):
        assert np.all(np.isfinite(level))


def test_uniform_times_stay_within_the_process():
    """They do to float32's rounding of its ends."""
    low, high = rectified_flow().time_range
    t, _ = draw(Continuous(UniformDensity(low, high), stratified=True))
    assert np.float32(low) <= t.min()
    assert t.max() <= np.float32(high)
