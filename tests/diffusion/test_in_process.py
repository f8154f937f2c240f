"""A model of one process under another: both see the same data through λ."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import edm, rectified_flow, shifted, vp_cosine
from jax_ddpm.diffusion.denoiser import Denoiser, InProcess, NetworkDenoiser
from jax_ddpm.diffusion.parameterisation import Parameterisation, Prediction
from jax_ddpm.diffusion.process import q_sample
from jax_ddpm.diffusion.schedules import make_betas, zero_terminal_snr

pytestmark = pytest.mark.usefixtures("x64")
quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

PROCESSES = {
    "chain": Chain(make_betas("linear", 1000)),
    "vp_cosine": vp_cosine(),
    "edm": edm(),
    "rectified_flow": rectified_flow(),
    "shifted flow": shifted(rectified_flow(), 3.0),
}
PAIRS = [pair for pair in product(PROCESSES, PROCESSES) if pair[0] != pair[1]]
MEAN, VAR = 0.3, 0.25

every_pair = pytest.mark.parametrize(
    ("trained", "process"),
    [(PROCESSES[trained], PROCESSES[process]) for trained, process in PAIRS],
    ids=[" under ".join(pair) for pair in PAIRS],
)


def run(denoiser, xt, t):
    return denoiser(xt, jnp.asarray(t), {})


def times(*processes, count=12):
    """Times of the last process, over all λ that each of them reaches."""
    ends = [process.log_snr(np.array(process.time_range)) for process in processes]
    highest = min(high for high, _ in ends)
    lowest = max(max(low for _, low in ends), -30)
    # The ends themselves are a rounding error inside or outside.
    return processes[-1].time(np.linspace(highest, lowest, count + 2)[1:-1])


def noisy(process, t, rng):
    """x_t of N(MEAN, VAR) at each of the times, three dimensions an example."""
    x0, eps = jnp.asarray(rng.standard_normal((2, len(t), 3)))
    return q_sample(process, MEAN + np.sqrt(VAR) * x0, jnp.asarray(t), eps)


def test_is_a_denoiser():
    model = InProcess(GaussianDenoiser(MEAN, VAR, edm()), edm(), vp_cosine())
    assert isinstance(model, Denoiser)


@every_pair
def test_the_exact_denoiser_of_one_is_that_of_the_other(trained, process, rng):
    """It holds between the steps of a chain too, where λ is interpolated: only α and σ matter."""
    t = times(trained, process)
    xt = noisy(process, t, rng)
    other = InProcess(GaussianDenoiser(MEAN, VAR, trained), trained, process)
    actual = run(other, xt, t)
    expected = run(GaussianDenoiser(MEAN, VAR, process), xt, t)
    # Times that a float64 rounds to 1e-16 near t = 1 put λ down to -30 at 1e-9.
    np.testing.assert_allclose(actual.x0, expected.x0, atol=1e-9)
    np.testing.assert_allclose(actual.eps, expected.eps, atol=1e-9)


@every_pair
def test_the_pair_is_consistent_in_the_process_sampled(trained, process, rng):
    """α·x_0 + σ·ε = x_t in the process's own units, whatever the model predicts."""
    t = times(trained, process)
    xt = noisy(process, t, rng)
    wrong = NetworkDenoiser(
        (), lambda params, x, time, conditioning: jnp.tanh(x) + 0.1, Parameterisation(trained, "v")
    )
    prediction = run(InProcess(wrong, trained, process), xt, t)
    rebuilt = q_sample(process, prediction.x0, jnp.asarray(t), prediction.eps)
    np.testing.assert_allclose(rebuilt, xt, rtol=1e-9, atol=1e-9)


@every_pair
def test_there_and_back_is_the_identity(trained, process, rng):
    t = times(process, trained)
    xt = noisy(trained, t, rng)
    model = GaussianDenoiser(MEAN, VAR, trained)
    back = InProcess(InProcess(model, trained, process), process, trained)
    actual, expected = (run(denoiser, xt, t) for denoiser in (back, model))
    np.testing.assert_allclose(actual.x0, expected.x0, atol=1e-9)
    np.testing.assert_allclose(actual.eps, expected.eps, atol=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_in_its_own_process_a_model_is_itself(name, rng):
    process = PROCESSES[name]
    t = times(process)
    xt = noisy(process, t, rng)
    model = GaussianDenoiser(MEAN, VAR, process)
    actual, expected = (
        run(denoiser, xt, t) for denoiser in (InProcess(model, process, process), model)
    )
    np.testing.assert_allclose(actual.x0, expected.x0, atol=1e-9)
    np.testing.assert_allclose(actual.eps, expected.eps, atol=1e-9)


@pytest.fixture
def model():
    """Trained in a chain, sampled with EDM's noise levels."""
    trained, process = PROCESSES["chain"], PROCESSES["edm"]
    return InProcess(GaussianDenoiser(MEAN, VAR, trained), trained, process)


def test_the_network_sees_its_own_units_and_times(model, rng):
    """Chains have ᾱ = 1/(1 + σ²), so x_t/√(1 + σ²) at the step of that ᾱ (Karras et al. 2022)."""
    seen = []

    def denoiser(xt, t, conditioning):
        seen.extend([xt, t])
        return Prediction(xt, xt)

    sigma = np.geomspace(0.05, 40, 12)
    xt = noisy(model.process, sigma, rng)
    InProcess(denoiser, model.trained, model.process)(xt, jnp.asarray(sigma), {})
    expected = xt / np.sqrt(1 + sigma**2)[:, None]
    np.testing.assert_allclose(seen[0], expected, rtol=1e-12)
    alpha_bar = np.interp(seen[1], np.arange(1000), model.trained.alpha_bar)
    np.testing.assert_allclose(alpha_bar, 1 / (1 + sigma**2), rtol=0.01)


def test_one_time_for_all_is_the_same_as_one_for_each(model, rng):
    xt = noisy(model.process, np.full(12, 2.0), rng)
    whole, each = run(model, xt, jnp.array(2.0)), run(model, xt, jnp.full(12, 2.0))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), whole, each)


def test_examples_do_not_touch_each_other(model, rng):
    """Each is the same in reverse order, and a change to one changes only that one."""
    t = jnp.asarray(times(model.trained, model.process))
    xt = noisy(model.process, t, rng)
    plain, back = run(model, xt, t), run(model, xt[::-1], t[::-1])
    np.testing.assert_allclose(back.x0[::-1], plain.x0, rtol=1e-12)
    other = run(model, xt.at[2].add(1.0), t)
    differs = np.any(np.asarray(other.x0 != plain.x0), axis=1)
    np.testing.assert_array_equal(differs, np.arange(len(t)) == 2)


def test_conditioning_is_passed_on(model, rng):
    given = {"label": jnp.arange(3)}
    seen = []

    def denoiser(xt, t, conditioning):
        seen.append(conditioning)
        return Prediction(xt, xt)

    xt = noisy(model.process, np.ones(3), rng)
    InProcess(denoiser, model.trained, model.process)(xt, jnp.ones(3), given)
    assert seen == [given]


def test_in_float32(model, rng):
    t = times(model.trained, model.process)
    xt = noisy(model.process, t, rng)
    expected = run(model, xt, t)
    single = run(model, xt.astype(jnp.float32), jnp.asarray(t, jnp.float32))
    assert single.x0.dtype == single.eps.dtype == jnp.float32
    np.testing.assert_allclose(single.x0, expected.x0, atol=2e-5)
    np.testing.assert_allclose(single.eps, expected.eps, atol=2e-5)


PURE_NOISE = {
    "flow": rectified_flow(),
    "zero terminal SNR": Chain(zero_terminal_snr(make_betas("linear", 1000))),
}


@pytest.mark.parametrize("trained", PURE_NOISE.values(), ids=PURE_NOISE.keys())
@pytest.mark.parametrize("process", PURE_NOISE.values(), ids=PURE_NOISE.keys())
def test_pure_noise_is_pure_noise(trained, process, rng):
    """There is no ratio of α where α = 0: ε is x_t, and x_0 may be anything of the data."""
    model = InProcess(GaussianDenoiser(MEAN, VAR, trained), trained, process)
    eps = jnp.asarray(rng.standard_normal((4, 3)))
    prediction = run(model, eps, process.time_range[1])
    np.testing.assert_allclose(prediction.eps, eps, rtol=1e-14)
    np.testing.assert_allclose(prediction.x0, MEAN, rtol=1e-14)


def test_new_parameters_do_not_recompile(rng):
    traces = []

    def apply(params, x, time, conditioning):
        traces.append(x.shape)
        return params * x

    xt, t = noisy(edm(), np.ones(3), rng), jnp.ones(3)
    parameterisation = Parameterisation(vp_cosine())
    jitted = jax.jit(run)
    for scale in (0.5, 2.0):
        network = NetworkDenoiser(jnp.array(scale), apply, parameterisation)
        jitted(InProcess(network, vp_cosine(), edm()), xt, t)
    assert len(traces) == 1
