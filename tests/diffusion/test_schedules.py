"""Every schedule against its formula at 50 digits."""

import numpy as np
import pytest
from mpmath import mp

from jax_ddpm.diffusion.schedules import BETWEEN_ENDPOINTS, SCHEDULES, make_betas

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
