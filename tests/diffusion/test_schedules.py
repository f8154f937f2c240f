"""Every schedule, and what turns one into another, against its formula at 50 digits."""

import numpy as np
import pytest
from mpmath import mp

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.schedules import (
    BETWEEN_ENDPOINTS,
    SCHEDULES,
    make_betas,
    shifted,
    zero_terminal_snr,
)

mp.dps = 50


def formula(name, num_timesteps, t):
    """β_t at 50 digits, endpoints 1e-4 and 0.02 scaled by 1000/T."""
    start, end = (mp.mpf(1000) / num_timesteps * mp.mpf(beta) for beta in ("1e-4", "0.02"))

    def rise(steps, start=start, end=end):
        return start + (end - start) * min(mp.mpf(t) / (steps - 1), 1)

    def alpha_bar(step):
        offset = mp.mpf("0.008")
        return mp.cos((mp.mpf(step) / num_timesteps + offset) / (1 + offset) * mp.pi / 2) ** 2

    return {
        "linear": lambda: rise(num_timesteps),
        "quad": lambda: rise(num_timesteps, mp.sqrt(start), mp.sqrt(end)) ** 2,
        "const": lambda: end,
        "warmup10": lambda: rise(num_timesteps // 10),
        "warmup50": lambda: rise(num_timesteps // 2),
        "sigmoid": lambda: start + (end - start) / (1 + mp.exp(-rise(num_timesteps, -6, 6))),
        "jsd": lambda: mp.mpf(1) / (num_timesteps - t),
        "cosine": lambda: min(1 - alpha_bar(t + 1) / alpha_bar(t), mp.mpf("0.999")),
    }[name]()


@pytest.mark.parametrize("num_timesteps", [100, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_formula(name, num_timesteps):
    betas = make_betas(name, num_timesteps)
    exact = [float(formula(name, num_timesteps, t)) for t in range(num_timesteps)]
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, exact, rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_beta_never_falls(name):
    betas = make_betas(name, 1000)
    assert np.all(np.diff(betas) >= 0)
    assert (betas[-1] > betas[0]) == (name != "const")


@pytest.mark.parametrize("name", ["linear", "quad", "warmup10", "warmup50"])
def test_endpoints_are_reached(name):
    betas = make_betas(name, 1000, beta_start=3e-4, beta_end=0.01)
    np.testing.assert_allclose(betas[[0, -1]], [3e-4, 0.01])


@pytest.mark.parametrize("num_timesteps", [100, 250, 4000])
@pytest.mark.parametrize("name", BETWEEN_ENDPOINTS)
def test_endpoints_scale_so_that_any_length_destroys_as_much(name, num_timesteps):
    np.testing.assert_allclose(
        make_betas(name, num_timesteps).sum(), make_betas(name, 1000).sum(), rtol=0.01
    )


def test_cosine_is_capped_in_its_last_step_alone():
    betas = make_betas("cosine", 1000)
    assert betas[-1] == 0.999
    assert np.all(betas[:-1] < 0.999)


def test_jsd_alpha_bar_falls_linearly_to_exactly_zero():
    alpha_bar = np.cumprod(1 - make_betas("jsd", 1000))
    np.testing.assert_allclose(alpha_bar, np.arange(999, -1, -1) / 1000, rtol=1e-12, atol=0)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown schedule 'linaer'.*linear.*cosine"):
        make_betas("linaer", 1000)


@pytest.mark.parametrize("name", BETWEEN_ENDPOINTS)
def test_too_short_a_chain_names_the_remedy(name):
    with pytest.raises(ValueError, match=r"T=10.*longer chain") as error:
        make_betas(name, 10)
    assert "\n" not in str(error.value)


def alpha_bars(betas):
    """ᾱ at 50 digits of the float64 that β is."""
    return np.cumprod([1 - mp.mpf(float(beta)) for beta in betas])


def betas_of(alpha_bar):
    """1 - ᾱ_t/ᾱ_{t-1}, rounded once to float64."""
    return (1 - alpha_bar / np.append(mp.mpf(1), alpha_bar[:-1])).astype(float)


every_schedule = pytest.mark.parametrize("name", SCHEDULES)


class TestShifted:
    @every_schedule
    @pytest.mark.parametrize("factor", [0.5, 4.0])
    def test_formula(self, name, factor):
        """ᾱ' = ᾱ/(ᾱ + factor²·(1-ᾱ)), which divides ᾱ/(1-ᾱ) by factor²."""
        betas = make_betas(name, 1000)
        alpha_bar = alpha_bars(betas)
        moved = alpha_bar / (alpha_bar + mp.mpf(factor) ** 2 * (1 - alpha_bar))
        np.testing.assert_allclose(shifted(betas, factor), betas_of(moved), rtol=1e-12)

    @every_schedule
    def test_chain_has_factor_times_the_noise_to_signal(self, name):
        """It holds at every t, except where nothing is left of the signal."""
        betas = make_betas(name, 1000)
        plain, moved = Chain(betas), Chain(shifted(betas, 4.0))
        left = slice(None, -1 if plain.alpha_bar[-1] == 0 else None)
        expected = plain.log_snr_table - 2 * np.log(4)
        np.testing.assert_allclose(moved.log_snr_table[left], expected[left], atol=1e-12)
        assert (moved.alpha_bar[-1] == 0) == (plain.alpha_bar[-1] == 0)

    @every_schedule
    def test_twice_is_once_by_the_product(self, name):
        betas = make_betas(name, 1000)
        twice = shifted(shifted(betas, 4.0), 0.5)
        np.testing.assert_allclose(twice, shifted(betas, 2.0), rtol=1e-11)

    def test_by_one_changes_nothing(self):
        betas = make_betas("cosine", 1000)
        np.testing.assert_allclose(shifted(betas, 1.0), betas, rtol=1e-12)


@every_schedule
class TestZeroTerminalSnr:
    def test_formula(self, name):
        """√ᾱ' = (√ᾱ_t - √ᾱ_T)·√ᾱ_1/(√ᾱ_1 - √ᾱ_T) (Lin et al. 2024, algorithm 1).

        In float64 √ᾱ near 1 is known to 1e-16, and the smallest β, 1e-5, to 1e-11 of itself.
        """
        betas = make_betas(name, 1000)
        root = np.array([mp.sqrt(alpha_bar) for alpha_bar in alpha_bars(betas)])
        moved = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        np.testing.assert_allclose(zero_terminal_snr(betas), betas_of(moved), rtol=3e-11)

    def test_ends_at_exactly_nothing(self, name):
        betas = zero_terminal_snr(make_betas(name, 1000))
        assert betas[-1] == 1
        assert np.prod(1 - betas) == 0
        assert np.all((betas[:-1] > 0) & (betas[:-1] < 1))

    def test_begins_where_it_did(self, name):
        betas = make_betas(name, 1000)
        np.testing.assert_allclose(zero_terminal_snr(betas)[0], betas[0], rtol=1e-11)

    def test_is_affine_in_the_signal_level(self, name):
        """Lines through three points: equal quotients of differences of √ᾱ, before and after."""
        betas = make_betas(name, 1000)
        before, after = (np.sqrt(np.cumprod(1 - b)) for b in (betas, zero_terminal_snr(betas)))
        slope = (after[0] - after[-1]) / (before[0] - before[-1])
        expected = after[0] + slope * (before - before[0])
        np.testing.assert_allclose(after, expected, atol=1e-13)

    def test_twice_is_once(self, name):
        once = zero_terminal_snr(make_betas(name, 1000))
        np.testing.assert_allclose(zero_terminal_snr(once), once, rtol=1e-10)

    def test_chain_of_it_is_finite(self, name):
        chain = Chain(zero_terminal_snr(make_betas(name, 1000)))
        assert chain.alpha_bar[-1] == 0
        tables = (
            chain.one_minus_alpha_bar,
            chain.log_one_minus_alpha_bar,
            chain.log_snr_table,
            chain.posterior_log_variance,
            *chain.posterior,
        )
        assert all(np.all(np.isfinite(table)) for table in tables)
        assert chain.prior_bits_per_dim == 0
