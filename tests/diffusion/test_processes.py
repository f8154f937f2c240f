"""Processes by their names: what the numbers of a config mean, and ranges in common."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.process import ALL_NOISE, corrupt, noise_between, prior
from jax_ddpm.diffusion.processes import CONTINUOUS, PROCESSES, make_process, over_the_range_of
from jax_ddpm.diffusion.schedules import SCHEDULES, make_betas


def log_snr_at_ends(process):
    """λ at the least and the most noisy time."""
    return process.log_snr(np.array(process.time_range))


class TestChains:
    @pytest.mark.parametrize("name", SCHEDULES)
    def test_have_their_schedule_and_length(self, name):
        process = make_process(name, num_timesteps=200)
        assert isinstance(process, Chain)
        np.testing.assert_array_equal(process.betas, make_betas(name, 200))

    def test_have_the_endpoints_of_their_beta(self):
        betas = make_process("linear", num_timesteps=2000, beta_start=1e-3, beta_end=0.03).betas
        np.testing.assert_allclose(betas[[0, -1]], [1e-3 / 2, 0.03 / 2])

    @pytest.mark.parametrize("name", ["linear", "cosine"])
    def test_can_be_rescaled_to_end_without_signal(self, name):
        """They still begin where they did (Lin et al. 2024)."""
        plain, rescaled = make_process(name), make_process(name, zero_terminal_snr=True)
        assert rescaled.alpha_bar[-1] == 0
        np.testing.assert_allclose(rescaled.alpha_bar[0], plain.alpha_bar[0], rtol=1e-9)
        root, plain_root = np.sqrt(rescaled.alpha_bar), np.sqrt(plain.alpha_bar)
        np.testing.assert_allclose(np.polyfit(plain_root, root, 1, full=True)[1], 0, atol=1e-20)

    @pytest.mark.parametrize("zero", [False, True])
    def test_can_be_shifted(self, zero):
        """σ/α is twice as large at every t; where nothing is left of x_0 it stays so."""
        plain, shifted = (make_process("linear", shift=shift) for shift in (1.0, 2.0))
        np.testing.assert_allclose(
            shifted.log_snr_table, plain.log_snr_table - 2 * np.log(2), rtol=1e-9
        )
        if zero:
            both = make_process("linear", shift=2.0, zero_terminal_snr=True)
            assert both.alpha_bar[-1] == 0
            np.testing.assert_allclose(both.alpha_bar[0], shifted.alpha_bar[0], rtol=1e-9)


class TestContinuousTime:
    def test_is_every_other_name(self):
        assert set(PROCESSES) == {*SCHEDULES, *CONTINUOUS}
        assert not set(SCHEDULES) & set(CONTINUOUS)

    def test_vp_linear_is_the_limit_of_chains_with_the_same_numbers(self):
        """Σ log(1-β) → -∫β: ten times as long a chain is ten times as close."""
        numbers = {"beta_start": 2e-4, "beta_end": 0.03}
        process = make_process("vp_linear", **numbers)
        t = np.array([0.1, 0.5, 1.0])

        def error(num_timesteps):
            chain = make_process("linear", num_timesteps=num_timesteps, **numbers)
            return chain.log_snr(t * num_timesteps - 1) - process.log_snr(t)

        np.testing.assert_allclose(error(2000), 0, atol=0.1)
        np.testing.assert_allclose(error(20_000) / error(2000), 0.1, rtol=0.05)

    @pytest.mark.parametrize("name", ["ve", "edm"])
    def test_of_noise_levels_goes_from_the_least_to_the_greatest(self, name):
        process = make_process(name, sigma_min=0.03, sigma_max=20.0)
        np.testing.assert_allclose(process.sigma(np.array(process.time_range)), [0.03, 20.0])
        np.testing.assert_allclose(process.prior_std(process.time_range[1]), 20.0)
        np.testing.assert_array_equal(process.alpha(np.array(process.time_range)), 1)

    @pytest.mark.parametrize("name", CONTINUOUS)
    def test_can_be_shifted(self, name):
        plain, shifted = make_process(name), make_process(name, shift=3.0)
        t = np.linspace(0.1, 0.9, 9)
        difference = shifted.log_snr(t) - plain.log_snr(t)
        np.testing.assert_allclose(difference, -2 * np.log(3.0), rtol=1e-9)
        assert shifted.time_range == plain.time_range

    @pytest.mark.parametrize("name", CONTINUOUS)
    def test_ignores_the_numbers_of_others(self, name):
        """A chain's length is ignored, and what is named after other quantities."""
        others = {"num_timesteps": 7}
        if name != "vp_linear":
            others |= {"beta_start": 0.5, "beta_end": 0.6}
        if name not in ("ve", "edm"):
            others |= {"sigma_min": 1.0, "sigma_max": 2.0}
        assert make_process(name, **others) == make_process(name)


class TestNoise:
    """What is drawn, under every kind of process."""

    @pytest.fixture(params=["linear", *CONTINUOUS])
    def process(self, request):
        return make_process(request.param)

    @pytest.fixture
    def keys(self):
        return jax.random.split(jax.random.key(0), 500)

    def test_is_what_leads_from_x0_to_xt(self, process, keys, x64):
        x0 = jax.random.uniform(jax.random.key(1), (500, 3))
        t = jnp.linspace(*process.time_range, 502)[1:-1]
        xt, eps = corrupt(process, keys, x0, t)
        np.testing.assert_allclose(noise_between(process, x0, xt, t), eps, atol=1e-9)
        np.testing.assert_allclose([eps.mean(), eps.std()], [0, 1], atol=5 / np.sqrt(eps.size))
        one, _ = corrupt(process, keys[7:8], x0[7:8], t[7:8])
        np.testing.assert_array_equal(one[0], xt[7])

    def test_of_the_start_has_the_width_of_the_prior(self, process, keys):
        t = process.time_range[1]
        x = prior(process, t, keys, (2, 3))
        assert x.shape == (500, 2, 3)
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x.std() / process.prior_std(t), 1, atol=4 / np.sqrt(x.size))
        np.testing.assert_array_equal(prior(process, t, keys[7:8], (2, 3))[0], x[7])


class TestMistakes:
    def test_unknown_names_list_the_known(self):
        with pytest.raises(ValueError, match="unknown process 'linaer'") as caught:
            make_process("linaer")
        assert all(name in str(caught.value) for name in PROCESSES)

    @pytest.mark.parametrize("name", ["linear", "vp_linear"])
    @pytest.mark.parametrize(
        ("start", "end"), [(-1e-4, 0.02), (0.0, 0.02), (1e-4, np.inf), (1e-4, -0.02)]
    )
    def test_numbers_that_make_no_beta(self, name, start, end):
        with pytest.raises(ValueError, match="β"), np.errstate(all="ignore"):
            make_process(name, beta_start=start, beta_end=end)


TRAINED = {
    "linear": {},
    "cosine": {},
    "zero_terminal_snr": {"name": "linear", "zero_terminal_snr": True},
    "jsd": {},
    "vp_linear": {},
    "ve": {"sigma_min": 0.03, "sigma_max": 20.0},
    "edm": {},
    "rectified_flow": {},
    "shifted": {"name": "vp_sigmoid", "shift": 2.0},
}
every_pair = pytest.mark.parametrize(
    ("trained", "name"), [*itertools.product(TRAINED, CONTINUOUS)], ids=str
)


def trained_process(name):
    return make_process(**{"name": name} | TRAINED[name])


class TestOverTheRangeOf:
    @every_pair
    def test_the_ends_have_the_same_log_snr(self, trained, name):
        """Processes with hardly any signal left end before it is gone."""
        trained = trained_process(trained)
        process = over_the_range_of(trained, name)
        expected = np.maximum(log_snr_at_ends(trained), ALL_NOISE)
        np.testing.assert_allclose(log_snr_at_ends(process), expected, rtol=1e-6, atol=1e-6)

    @every_pair
    def test_every_time_between_is_one_of_the_trained_process(self, trained, name):
        """``InProcess`` needs this."""
        trained = trained_process(trained)
        process = over_the_range_of(trained, name)
        times = np.linspace(*process.time_range, 50)
        low, high = trained.time_range
        found = trained.time(process.log_snr(times))
        margin = 1e-6 * (high - low)
        assert np.all((found >= low - margin) & (found <= high + margin))
        np.testing.assert_allclose(
            trained.log_snr(found), process.log_snr(times), rtol=1e-6, atol=1e-6
        )

    @every_pair
    def test_is_the_named_process(self, trained, name):
        """Its schedule and scaling are; noise levels are those of the range."""
        process, plain = over_the_range_of(trained_process(trained), name), make_process(name)
        assert process.scaling == plain.scaling
        assert type(process.schedule) is type(plain.schedule)
        if name not in ("ve", "edm"):
            assert process.schedule == plain.schedule

    @pytest.mark.parametrize("trained", TRAINED)
    def test_of_noise_levels_has_the_whole_of_its_own_range(self, trained):
        process = over_the_range_of(trained_process(trained), "ve")
        np.testing.assert_allclose(process.time_range, (0, 1), atol=1e-9)

    @pytest.mark.parametrize("trained", TRAINED)
    @pytest.mark.parametrize("name", ["ve", "edm"])
    def test_under_variance_explosion_starts_from_the_noise_of_its_end(self, trained, name):
        process = over_the_range_of(trained_process(trained), name)
        end = log_snr_at_ends(process)[1]
        std = process.prior_std(process.time_range[1])
        np.testing.assert_allclose(std, np.exp(-end / 2), rtol=1e-9)
