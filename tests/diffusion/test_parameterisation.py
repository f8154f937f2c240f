"""Every target leads to the hub (x_0, ε) and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import GaussianDenoiser

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import edm, rectified_flow, shifted, ve, vp_cosine, vp_linear
from jax_ddpm.diffusion.denoiser import NetworkDenoiser
from jax_ddpm.diffusion.likelihood import model_log_variance
from jax_ddpm.diffusion.parameterisation import TARGETS, Parameterisation
from jax_ddpm.diffusion.process import expand, q_sample
from jax_ddpm.diffusion.processes import make_process
from jax_ddpm.diffusion.schedules import SCHEDULES, make_betas
from jax_ddpm.diffusion.thresholding import ClippedDenoiser

pytestmark = pytest.mark.usefixtures("x64")

CONTINUOUS = {
    "vp_linear": vp_linear(),
    "vp_cosine": vp_cosine(),
    "ve": ve(),
    "edm": edm(),
    "rectified_flow": rectified_flow(),
    "shifted_flow": shifted(rectified_flow(), 3.0),
}
PROCESSES = {name: Chain(make_betas(name, 1000)) for name in SCHEDULES} | CONTINUOUS
DATA_STD = 0.5

every_process = pytest.mark.parametrize("process", CONTINUOUS.values(), ids=CONTINUOUS.keys())


def times_of(process):
    """Every step of a chain, or times from one end to the other."""
    low, high = process.time_range
    if isinstance(process, Chain):
        return jnp.arange(low, high + 1)
    return jnp.linspace(low, high, 50)


class TestTargets:
    """The targets of every process that has them."""

    @pytest.fixture(
        params=[
            (process, target)
            for process in PROCESSES
            for target in TARGETS
            if process in SCHEDULES or target != "posterior_mean"
        ],
        ids="-".join,
    )
    def parameterisation(self, request):
        process, target = request.param
        return Parameterisation(PROCESSES[process], target, data_std=DATA_STD)

    @pytest.fixture
    def states(self, parameterisation, rng):
        """x_0, ε, x_t and t."""
        process = parameterisation.process
        t = times_of(process)
        x0, eps = jnp.asarray(rng.standard_normal((2, len(t), 3)))
        return x0, eps, q_sample(process, x0, t, eps), t

    def test_delta_is_the_determinant(self, parameterisation, states):
        process, t = parameterisation.process, states[-1]
        a, b, delta = parameterisation.coefficients(t)
        determinant = process.alpha(t) * b - process.sigma(t) * a
        np.testing.assert_allclose(delta, determinant, rtol=1e-11, atol=1e-15)

    def test_round_trip(self, parameterisation, states):
        x0, eps, xt, t = states
        prediction = parameterisation.to_prediction(
            parameterisation.regression_target(x0, eps, t), xt, t
        )
        # Where α = 0 neither ε nor the score knows x_0.
        solvable = parameterisation.coefficients(t).delta != 0
        assert np.all(solvable) or parameterisation.target in ("eps", "score")
        np.testing.assert_allclose(prediction.x0[solvable], x0[solvable], atol=1e-10)
        np.testing.assert_allclose(prediction.eps[solvable], eps[solvable], atol=1e-10)
        assert prediction.variance_fraction is None

    def test_float32_errs_by_round_off_times_the_condition(self, parameterisation, states):
        """Each product in (b·x_t - σ·y)/Δ and (α·y - a·x_t)/Δ is rounded; Δ then divides it.

        Coefficients are those of the float32 t; in continuous time they carry the round-off of λ,
        which is up to 30.
        """
        process = parameterisation.process
        x0, eps, _, t = (array.astype(jnp.float32) for array in states)
        xt = q_sample(process, x0, t, eps)
        prediction = parameterisation.to_prediction(
            parameterisation.regression_target(x0, eps, t), xt, t
        )
        assert prediction.x0.dtype == prediction.eps.dtype == jnp.float32

        exact_t = t.astype(float)
        a, b, delta = (np.abs(c)[:, None] for c in parameterisation.coefficients(exact_t))
        alpha, sigma = process.alpha(exact_t)[:, None], process.sigma(exact_t)[:, None]
        solvable = delta[:, 0] != 0
        size_xt, size_y = (
            signal * np.abs(states[0]) + noise * np.abs(states[1])
            for signal, noise in ((alpha, sigma), (a, b))
        )
        ulps = 8 if isinstance(process, Chain) else 16
        for actual, expected, bound in (
            (prediction.x0, x0, b * size_xt + sigma * size_y),
            (prediction.eps, eps, alpha * size_y + a * size_xt),
        ):
            error = np.abs(np.subtract(actual, expected, dtype=float))[solvable]
            assert np.all(error <= ulps * 2**-24 * (bound / delta)[solvable])


def test_posterior_mean_amplifies_errors_7800_times():
    chain = Chain(make_betas("linear", 1000))
    np.testing.assert_allclose(1 / chain.posterior.coef_x0.min(), 7800, rtol=0.01)


def test_posterior_mean_target_is_the_posterior_mean(chain, points):
    x0, eps, xt, t = points
    expected = expand(chain.gather(chain.posterior.coef_x0, t), x0) * x0
    expected += expand(chain.gather(chain.posterior.coef_xt, t), x0) * xt
    actual = Parameterisation(chain, "posterior_mean").regression_target(x0, eps, t)
    np.testing.assert_allclose(actual, expected, atol=1e-14)


def test_score_of_gaussian_data_is_its_exact_denoiser(chain, points):
    """∇ log N(x_t; α·mean, α²·var + σ²), not ε, comes out of the network."""
    mean, var = 0.3, 0.25

    def score(params, xt, time, conditioning):
        alpha, sigma = expand(chain.alpha(time), xt), expand(chain.sigma(time), xt)
        return -(xt - alpha * mean) / (alpha**2 * var + sigma**2)

    network = NetworkDenoiser((), score, Parameterisation(chain, "score"))
    informed = slice(None, -1 if chain.alpha_bar[-1] == 0 else None)
    xt, t = points.xt[informed], points.t[informed]
    actual, expected = network(xt, t, {}), GaussianDenoiser(mean, var, chain)(xt, t, {})
    np.testing.assert_allclose(actual.x0, expected.x0, atol=1e-10)
    np.testing.assert_allclose(actual.eps, expected.eps, atol=1e-10)


class TestVelocity:
    """u = ε - x_0 (Liu et al. 2023)."""

    def test_is_that_of_a_rectified_flow(self, rng):
        """dx_t/dt of q_sample at fixed x_0 and ε, which is linear in t: any step will do."""
        process, t, step = rectified_flow(), jnp.linspace(0.2, 0.8, 7), 0.1
        x0, eps = jnp.asarray(rng.standard_normal((2, 7, 3)))
        later, earlier = (q_sample(process, x0, t + move, eps) for move in (step, -step))
        target = Parameterisation(process, "velocity").regression_target(x0, eps, t)
        np.testing.assert_allclose(target, (later - earlier) / (2 * step), atol=1e-13)

    def test_leads_straight_to_data_and_noise(self, rng):
        """x_0 = x_t - t·u and ε = x_t + (1-t)·u, also where no signal is left."""
        t = jnp.linspace(0.1, 1.0, 10)
        xt, u = jnp.asarray(rng.standard_normal((2, 10, 3)))
        prediction = Parameterisation(rectified_flow(), "velocity").to_prediction(u, xt, t)
        np.testing.assert_allclose(prediction.x0, xt - t[:, None] * u, atol=1e-14)
        np.testing.assert_allclose(prediction.eps, xt + (1 - t[:, None]) * u, atol=1e-14)


def table_1(sigma):
    """c_skip, c_out, c_in and c_noise of EDM (Karras et al. 2022, table 1)."""
    total = sigma**2 + DATA_STD**2
    c_out = sigma * DATA_STD / np.sqrt(total)
    return DATA_STD**2 / total, c_out, 1 / np.sqrt(total), np.log(sigma) / 4


class TestEdm:
    """The preconditioning of Karras et al. 2022."""

    def network(self, params, x, time, conditioning):
        """Any function of both arguments."""
        return jnp.sin(3 * x + expand(time, x))

    def parameterisation(self, process):
        return Parameterisation(
            process, "edm", condition_on="log_snr", data_std=DATA_STD, normalise_input=True
        )

    @every_process
    def test_is_that_of_table_1_at_the_noise_level(self, process, rng):
        """D(x; σ) = c_skip·x + c_out·F(c_in·x; c_noise), in every process at x = x_t/α."""
        t = times_of(process)
        t = t[process.alpha(t) > 0]
        xt = jnp.asarray(rng.standard_normal((len(t), 3)))
        denoiser = NetworkDenoiser((), self.network, self.parameterisation(process))
        sigma = (process.sigma(t) / process.alpha(t))[:, None]
        c_skip, c_out, c_in, c_noise = table_1(sigma)
        x = xt / process.alpha(t)[:, None]
        expected = c_skip * x + c_out * np.sin(3 * c_in * x + c_noise)
        np.testing.assert_allclose(denoiser(xt, t, {}).x0, expected, rtol=1e-9, atol=1e-11)

    @every_process
    def test_target_has_unit_variance_and_nothing_linear_of_the_input(self, process):
        """For data of variance data_std²: Var(F) = 1 and E[F·x_t] = 0 (appendix B.6)."""
        t = times_of(process)
        a, b, _ = self.parameterisation(process).coefficients(t)
        alpha, sigma = process.alpha(t), process.sigma(t)
        np.testing.assert_allclose(a**2 * DATA_STD**2 + b**2, 1, rtol=1e-12)
        shared = a * alpha * DATA_STD**2 + b * sigma
        np.testing.assert_allclose(shared, 0, atol=1e-13 * np.max(sigma))

    @every_process
    def test_input_has_unit_variance(self, process):
        """The input is linear: signal and noise of x_t can be taken apart."""
        t = times_of(process)
        signal, noise = process.alpha(t)[:, None] * DATA_STD, process.sigma(t)[:, None]
        network_input = self.parameterisation(process).network_input
        variance = network_input(signal, t) ** 2 + network_input(noise, t) ** 2
        np.testing.assert_allclose(variance, 1, rtol=1e-12)

    @pytest.mark.parametrize("name", ["vp_linear", "vp_cosine"])
    def test_of_unit_data_is_v_with_its_sign_turned(self, name, rng):
        process = CONTINUOUS[name]
        t = times_of(process)
        x0, eps = jnp.asarray(rng.standard_normal((2, len(t), 3)))
        f, v = (
            Parameterisation(process, target, data_std=1.0).regression_target(x0, eps, t)
            for target in ("edm", "v")
        )
        np.testing.assert_allclose(f, -v, rtol=1e-12, atol=1e-14)


@every_process
def test_conditions_on_the_logarithm_of_the_noise_level(process):
    """¼·log(σ/α), whatever the process calls the time (Karras et al. 2022)."""
    t = times_of(process)
    t = t[process.alpha(t) > 0]
    parameterisation = Parameterisation(process, time_scale=100.0, condition_on="log_snr")
    expected = 25 * np.log(process.sigma(t) / process.alpha(t))
    np.testing.assert_allclose(parameterisation.network_time(t), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "process",
    [rectified_flow(), make_process("linear", zero_terminal_snr=True)],
    ids=["rectified_flow", "zero_terminal_snr"],
)
def test_the_network_is_told_a_finite_noise_level_where_all_is_noise(process):
    parameterisation = Parameterisation(process, "v", time_scale=8.0, condition_on="log_snr")
    low, high = process.time_range
    told = parameterisation.network_time(jnp.array([low, (low + high) / 2, high]))
    assert np.all(np.diff(told) > 0)
    assert told[-1] == 20


@pytest.mark.parametrize("beta_end", [0.02, 0.08])
def test_a_learned_variance_is_finite_also_where_all_signal_is_lost(beta_end, rng):
    chain = make_process("linear", beta_end=beta_end)
    parameterisation = Parameterisation(chain, variance="learned")
    t = jnp.arange(0.0, 1000)
    xt, output = jnp.asarray(rng.standard_normal((1000, 2))), rng.standard_normal((1000, 4))
    prediction = parameterisation.to_prediction(jnp.asarray(output), xt, t)
    told = model_log_variance(chain, prediction, t, "learned")
    span = np.log(chain.betas) - chain.posterior_log_variance
    between = span > 0
    assert np.all(np.isfinite(told))
    np.testing.assert_allclose(told[between], output[between, 2:], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(told[~between], np.log(chain.betas)[~between, None] * [1, 1])


def test_the_network_sees_x_t_itself_unless_it_is_normalised(rng):
    xt = jnp.asarray(rng.standard_normal((5, 3)))
    np.testing.assert_array_equal(Parameterisation(edm()).network_input(xt, jnp.full(5, 9.0)), xt)


class TestLearnedVariance:
    def predict(self, chain, points, variance, raw):
        """The log-variance of a network whose second half of channels is ``raw``."""
        parameterisation = Parameterisation(chain, variance=variance)
        output = jnp.concatenate([points.eps, jnp.broadcast_to(raw, points.eps.shape)], axis=-1)
        prediction = parameterisation.to_prediction(output, points.xt, points.t)
        np.testing.assert_allclose(prediction.eps[:-1], points.eps[:-1], rtol=1e-15)
        return model_log_variance(chain, prediction, points.t, "learned")

    def test_log_variance_comes_back_on_the_chain(self, chain, points, rng):
        raw = rng.uniform(-12, 1, points.eps.shape)
        actual = self.predict(chain, points, "learned", raw)
        np.testing.assert_allclose(actual, raw, atol=1e-13)

    def test_range_spans_smallest_to_largest(self, chain, points):
        smallest, middle, largest = (
            self.predict(chain, points, "learned_range", jnp.array(raw)) for raw in (-1.0, 0.0, 1.0)
        )
        for actual, expected in (
            (smallest, chain.posterior_log_variance),
            (largest, np.log(chain.betas)),
            (middle, (chain.posterior_log_variance + np.log(chain.betas)) / 2),
        ):
            np.testing.assert_allclose(actual, np.tile(expected[:, None], 3), rtol=1e-13)


@pytest.mark.parametrize("chain", ["linear"], indirect=True)
class TestDenoisers:
    def test_network_is_fed_scaled_times_one_per_example(self, chain):
        parameterisation = Parameterisation(chain, "x0", time_scale=10.0)
        denoiser = NetworkDenoiser(
            (), lambda params, x, time, conditioning: expand(time, x) + 0 * x, parameterisation
        )
        fed = jax.jit(lambda t: denoiser(jnp.zeros((2, 3)), t, {}).x0[:, 0])
        np.testing.assert_allclose(fed(7.0), [70, 70], rtol=1e-15)
        np.testing.assert_allclose(fed(np.array([7.0, 99.0])), [70, 990], rtol=1e-15)

    def test_new_parameters_do_not_recompile(self, chain, points):
        traces = []

        def apply(params, x, time, conditioning):
            traces.append(x.shape)
            return params * x

        @jax.jit
        def run(denoiser):
            return denoiser(points.xt, points.t, {}).x0

        parameterisation = Parameterisation(chain, "x0")
        for scale in (0.5, 2.0):
            x0 = run(NetworkDenoiser(jnp.array(scale), apply, parameterisation))
            np.testing.assert_allclose(x0, scale * points.xt, rtol=1e-15)
        assert len(traces) == 1

    def test_clipping_keeps_the_pair_consistent(self, chain, points):
        _, _, xt, t = points
        raw = GaussianDenoiser(0.0, 4.0, chain)(xt, t, {})
        prediction = ClippedDenoiser(GaussianDenoiser(0.0, 4.0, chain), chain)(xt, t, {})
        np.testing.assert_array_equal(prediction.x0, np.clip(raw.x0, -1, 1))
        assert np.any(prediction.x0 != raw.x0)
        alpha, sigma = expand(chain.alpha(t), xt), expand(chain.sigma(t), xt)
        np.testing.assert_allclose(alpha * prediction.x0 + sigma * prediction.eps, xt, atol=1e-14)

    def test_clipping_inside_the_range_changes_nothing(self, chain, points):
        inner = GaussianDenoiser(0.2, 1e-6, chain)
        raw, clipped = (d(points.xt, points.t, {}) for d in (inner, ClippedDenoiser(inner, chain)))
        assert np.all(np.abs(raw.x0) < 1)
        np.testing.assert_allclose(clipped.eps, raw.eps, atol=1e-11)
