"""The chain's tables against 50 digits, and the algebra of q by two routes."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp
from scipy.stats import norm

from jax_ddpm.diffusion.chain import Chain, q_posterior, q_step
from jax_ddpm.diffusion.process import Process, q_sample
from jax_ddpm.diffusion.schedules import SCHEDULES, make_betas

mp.dps = 50


@pytest.fixture(scope="module")
def exact(chain):
    """The closed forms of the chain's own β at 50 digits, rounded once to float64."""
    rows = []
    alpha_bar = mp.mpf(1)
    for beta in map(mp.mpf, chain.betas):
        previous, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
        noise = 1 - alpha_bar
        rows.append(
            {
                "alpha_bar": alpha_bar,
                "one_minus_alpha_bar": noise,
                "log_alpha_bar": mp.log(alpha_bar),
                "log_snr": mp.log(alpha_bar / noise),
                "log_noise": mp.log(noise),
                "coef_x0": mp.sqrt(previous) * beta / noise,
                "coef_xt": mp.sqrt(1 - beta) * (1 - previous) / noise,
                "variance": beta * (1 - previous) / noise,
                "log_variance": mp.log(beta * (1 - previous) / noise),
            }
        )
    return {name: np.array([row[name] for row in rows], float) for name in rows[0]}


def positive_tables(chain):
    return {
        "alpha_bar": chain.alpha_bar,
        "one_minus_alpha_bar": chain.one_minus_alpha_bar,
        **chain.posterior._asdict(),
    }


def test_tables(chain, exact):
    for name, table in positive_tables(chain).items():
        assert table.dtype == np.float64
        np.testing.assert_allclose(table, exact[name], rtol=1e-13, err_msg=name)


def test_logarithms(chain, exact):
    """They agree to an absolute 1e-13 nats, since λ passes through 0; λ of ᾱ = 0 is held finite."""
    np.testing.assert_allclose(chain.log_alpha_bar, exact["log_alpha_bar"], atol=1e-13)
    np.testing.assert_allclose(
        chain.log_snr_table, np.maximum(exact["log_snr"], chain.log_snr_table.min()), atol=1e-13
    )
    assert np.all(np.isfinite(chain.log_snr_table))
    np.testing.assert_allclose(
        chain.posterior_log_variance[1:], exact["log_variance"][1:], atol=1e-13
    )


def test_largest_prior_term(chain, exact):
    """KL(N(√ᾱ·x_0, 1-ᾱ) ‖ N(0, 1)) = ½(ᾱ·x_0² + (1-ᾱ) - 1 - log(1-ᾱ)) at |x_0| = 1."""
    bits = -0.5 * exact["log_noise"][-1] / np.log(2)
    np.testing.assert_allclose(chain.prior_bits_per_dim, bits, rtol=1e-12)


def test_float32_use_rounds_once(chain, exact):
    """A float32 cumprod would lose 1.7e-4 of 1-ᾱ_0; a float64 table cast on use, half an ulp."""
    t = jnp.arange(chain.num_timesteps, dtype=jnp.float32)
    for name, table in positive_tables(chain).items():
        used = chain.gather(table, t)
        assert used.dtype == jnp.float32
        np.testing.assert_allclose(used, exact[name], rtol=2**-24, err_msg=name)
    np.testing.assert_allclose(chain.alpha(t), np.sqrt(exact["alpha_bar"]), rtol=6.1e-8)
    np.testing.assert_allclose(chain.sigma(t), np.sqrt(exact["one_minus_alpha_bar"]), rtol=6.1e-8)
    np.testing.assert_allclose(chain.log_snr(t), chain.log_snr_table, rtol=2**-24)


def test_before_the_first_step_data_are_clean(chain):
    """ᾱ_{-1} = 1: the posterior of step 0 is x_0 itself; nothing wraps around to T-1."""
    np.testing.assert_allclose(chain.posterior.coef_x0[0], 1, rtol=1e-15)
    assert chain.posterior.coef_xt[0] == 0
    assert chain.posterior.variance[0] == 0


def test_posterior_log_variance_repeats_its_second_entry(chain):
    assert chain.posterior_log_variance[0] == chain.posterior_log_variance[1]


def test_papers_smallest_log_variance():
    """Ho et al.'s code decodes with log β̃_1, not with a clamp of log 0."""
    chain = Chain(make_betas("linear", 1000))
    np.testing.assert_allclose(chain.posterior_log_variance[0], -9.8, atol=0.05)


def test_posterior_mean_weights_add_like_tanh(chain):
    """They sum to (a + A)/(1 + a·A), less than 1, with a = √(1-β_t) and A = √ᾱ_{t-1}."""
    total = chain.posterior.coef_x0 + chain.posterior.coef_xt
    a, previous = np.sqrt(1 - chain.betas), np.sqrt(np.append(1, chain.alpha_bar[:-1]))
    np.testing.assert_allclose(total, (a + previous) / (1 + a * previous), rtol=1e-12)
    assert np.all(total[1:] < 1)


def test_steps_compose_to_the_closed_form(chain, x64):
    """The moments of x_t carried through every q(x_t | x_{t-1}) are those of q(x_t | x_0)."""
    t = jnp.arange(chain.num_timesteps, dtype=float)
    ones = jnp.ones((chain.num_timesteps, 1))
    scales, added = (np.ravel(array) for array in q_step(chain, ones, t))
    mean, variance = 1.0, 0.0
    moments = []
    for scale, beta in zip(scales, added, strict=True):
        mean, variance = scale * mean, scale**2 * variance + beta
        moments.append((mean, variance))
    alpha, sigma = q_sample(chain, ones, t, 0 * ones), q_sample(chain, 0 * ones, t, ones)
    expected = np.hstack([alpha, np.square(sigma)])
    np.testing.assert_allclose(moments, expected, rtol=1e-12)


def test_bayes_rule(chain, points, rng):
    """q(x_t | x_{t-1})·q(x_{t-1} | x_0) = q(x_{t-1} | x_t, x_0)·q(x_t | x_0)."""
    x0, _, previous, t = map(np.asarray, points)
    x0, previous, t = x0[1:], previous[:-1], t[1:]
    step_mean, step_variance = map(np.asarray, q_step(chain, *map(jnp.asarray, (previous, t))))
    xt = step_mean + np.sqrt(step_variance) * rng.standard_normal(x0.shape)
    back_mean, back_log_variance = q_posterior(chain, *map(jnp.asarray, (x0, xt, t)))

    def log_marginal(x, t):
        return norm.logpdf(x, chain.alpha(t)[:, None] * x0, chain.sigma(t)[:, None])

    forwards = norm.logpdf(xt, step_mean, np.sqrt(step_variance)) + log_marginal(previous, t - 1)
    backwards = norm.logpdf(previous, back_mean, np.exp(back_log_variance / 2))
    np.testing.assert_allclose(forwards, backwards + log_marginal(xt, t), atol=1e-10)


class TestProcess:
    """Exact tables at whole t, λ-interpolation between them."""

    @pytest.fixture
    def between(self, chain, rng):
        """Fractional times, one in each step."""
        return np.arange(chain.num_timesteps - 1) + rng.uniform(0.01, 0.99, chain.num_timesteps - 1)

    def test_is_a_process(self, chain):
        assert isinstance(chain, Process)

    def test_tables_at_whole_times(self, chain):
        t = np.arange(chain.num_timesteps, dtype=float)
        np.testing.assert_array_equal(chain.alpha(t), np.sqrt(chain.alpha_bar))
        np.testing.assert_array_equal(chain.sigma(t), np.sqrt(chain.one_minus_alpha_bar))
        np.testing.assert_array_equal(chain.log_snr(t), chain.log_snr_table)

    def test_levels_lie_between_their_neighbours(self, chain, between):
        alpha, sigma = chain.alpha(between), chain.sigma(between)
        before, after = np.floor(between), np.ceil(between)
        assert np.all((chain.alpha(after) < alpha) & (alpha < chain.alpha(before)))
        # σ is monotone to round-off: close to 1 neighbouring steps share a float64.
        assert np.all(
            (chain.sigma(before) <= sigma + 1e-15) & (sigma <= chain.sigma(after) + 1e-15)
        )

    def test_log_snr_is_that_of_alpha_and_sigma_and_falls(self, chain, between):
        alpha, sigma, log_snr = chain.alpha(between), chain.sigma(between), chain.log_snr(between)
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)
        np.testing.assert_allclose(2 * np.log(alpha / sigma), log_snr, rtol=1e-13, atol=1e-13)
        assert np.all(np.diff(chain.log_snr_table) < 0)

    def test_time_inverts_log_snr(self, chain, between):
        np.testing.assert_allclose(chain.time(chain.log_snr(between)), between, rtol=1e-9)
        whole = np.arange(chain.num_timesteps, dtype=float)
        np.testing.assert_array_equal(chain.time(chain.log_snr(whole)), whole)

    def test_time_is_held_beyond_the_ends(self, chain):
        np.testing.assert_array_equal(
            chain.time(np.array([1e3, -1e3])), [0, chain.num_timesteps - 1]
        )

    @pytest.mark.parametrize("method", ["alpha", "sigma", "log_snr", "time"])
    def test_numpy_and_jax_agree(self, chain, between, method, x64):
        argument = chain.log_snr(between) if method == "time" else between
        on_host = getattr(chain, method)(argument)
        in_jax = getattr(chain, method)(jnp.asarray(argument))
        assert isinstance(on_host, np.ndarray)
        assert on_host.dtype == in_jax.dtype == np.float64
        np.testing.assert_allclose(in_jax, on_host, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("method", ["alpha", "sigma", "log_snr", "time"])
    @pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
    def test_float32_stays_float32(self, chain, between, method, array):
        argument = chain.log_snr(between) if method == "time" else between
        result = getattr(chain, method)(array(argument, np.float32))
        assert result.dtype == np.float32
        assert isinstance(result, type(array(0.0)))


class TestConstruction:
    @pytest.mark.parametrize("name", SCHEDULES)
    @pytest.mark.parametrize("num_timesteps", [100, 4000])
    def test_schedules_that_destroy_the_data_are_silent(self, name, num_timesteps):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Chain(make_betas(name, num_timesteps))

    def test_warns_of_signal_left_at_the_end(self):
        betas = make_betas("linear", 1000, beta_end=0.005)
        alpha_bar = np.prod(1 - betas)
        log_snr = np.log(alpha_bar / (1 - alpha_bar))
        bits = -0.5 * np.log2(1 - alpha_bar)
        with pytest.warns(UserWarning, match=f"log-SNR {log_snr:.2f}, .*{bits:.2g} bits"):
            Chain(betas)

    def test_any_betas_make_a_chain(self):
        betas = np.array([0.1, 0.7, 0.2, 0.999])
        np.testing.assert_allclose(Chain(betas).alpha_bar, np.cumprod(1 - betas), rtol=1e-14)
        assert Chain(betas).num_timesteps == 4

    @pytest.mark.parametrize(
        "betas",
        [[], [0.1], [[0.1, 0.2]], [0.0, 0.1], [-0.1, 0.1], [0.1, 1.1], [np.nan, 0.1]],
    )
    def test_invalid_betas(self, betas):
        with pytest.raises(ValueError, match="betas must be"):
            Chain(np.array(betas))

    def test_only_the_last_step_may_destroy_everything(self):
        """Nothing is left of x_0 after β = 1, and q(x_{t-1} | x_t, x_0) is 0/0."""
        Chain(np.array([0.5, 1.0]))
        with pytest.raises(ValueError, match="betas must be"):
            Chain(np.array([0.5, 1.0, 0.5]))
