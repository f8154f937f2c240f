"""Every method that diffusers has too, step by step on the same network and the same noise."""

import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles.trajectories import (
    difference,
    double_precision,
    model,
    network,
    network_with_variance,
    noise_of_rows,
    standard_normal,
    trajectory,
)

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import edm, rectified_flow, shifted, ve
from jax_ddpm.diffusion.denoiser import InProcess, NetworkDenoiser
from jax_ddpm.diffusion.guidance import ClassifierFreeGuidance, RescaledGuidance
from jax_ddpm.diffusion.parameterisation import Parameterisation
from jax_ddpm.diffusion.process import ALL_NOISE, q_sample
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.ddim import ddim
from jax_ddpm.diffusion.samplers.dpmpp import dpmpp_2m
from jax_ddpm.diffusion.samplers.grid import (
    along,
    karras,
    log_snr_uniform,
    to_clean,
    uniform,
)
from jax_ddpm.diffusion.samplers.heun import heun
from jax_ddpm.diffusion.samplers.predictor_corrector import predictor_corrector
from jax_ddpm.diffusion.samplers.unipc import unipc
from jax_ddpm.diffusion.schedules import make_betas, zero_terminal_snr
from jax_ddpm.diffusion.thresholding import ClippedDenoiser, ThresholdedDenoiser

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# PyTorch's tensors under NumPy 2, no concern of ours.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

# Both in float64: what is left is round-off, of 1-ᾱ above all, where ᾱ is near 1.
ROUND_OFF = 1e-11
STEPS = 8
BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.fixture(autouse=True)
def _strict_float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(params=BETAS)
def schedule(request):
    return request.param


@pytest.fixture
def chain(schedule):
    return Chain(make_betas(schedule, 1000))


def scheduler_of(name, schedule, steps=STEPS, **options):
    """A scheduler of diffusers for a model of v, its steps set."""
    betas = {"beta_schedule": BETAS[schedule], "beta_start": 1e-4, "beta_end": 0.02}
    options = {"prediction_type": "v_prediction"} | betas | options
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def run(scheduler, x, noise=(), network=network, times=None, **options):
    """x after every evaluation; ``times`` is what the network is told."""
    x, states = torch.from_numpy(x), []
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    module = sys.modules[type(scheduler).__module__]
    draws = map(torch.from_numpy, noise)
    with mock.patch.object(module, "randn_tensor", side_effect=draws, create=True):
        for i, t in enumerate(scheduler.timesteps):
            time = (scheduler.timesteps if times is None else times)[i].numpy()
            output = torch.from_numpy(network(scale(x, t).numpy(), time))
            x = scheduler.step(output, t, x, **options).prev_sample
            states.append(x.numpy())
    return np.stack(states)


def times_of(scheduler):
    return scheduler.timesteps.numpy().astype(float)


class TestTables:
    @pytest.mark.parametrize(
        ("name", "theirs"), [*BETAS.items(), ("quad", "scaled_linear"), ("sigmoid", "sigmoid")]
    )
    def test_of_beta_agree(self, name, theirs):
        """Their cosine takes 1 - cos²b/cos²a as a difference, which costs digits at small β."""
        with double_precision():
            expected = diffusers.DDPMScheduler(beta_schedule=theirs).betas.numpy()
        assert np.max(np.abs(make_betas(name, 1000) / expected - 1)) < 1e-10

    def test_of_zero_terminal_snr_agree(self, schedule):
        with double_precision():
            scheduler = scheduler_of("DDPMScheduler", schedule, rescale_betas_zero_snr=True)
            expected = scheduler.betas.numpy()
        betas = zero_terminal_snr(make_betas(schedule, 1000))
        assert np.max(np.abs(betas / expected - 1)) < 1e-10

    def test_of_noised_images_and_v_agree(self, schedule, chain):
        x0, eps = np.random.default_rng(1).standard_normal((2, 1000, 5))
        with double_precision():
            scheduler = scheduler_of("DDPMScheduler", schedule)
            arguments = torch.from_numpy(x0), torch.from_numpy(eps), torch.arange(1000)
            expected = scheduler.add_noise(*arguments), scheduler.get_velocity(*arguments)
        t, x0, eps = jnp.arange(1000.0), jnp.asarray(x0), jnp.asarray(eps)
        target = model(chain, "v").parameterisation.regression_target(x0, eps, t)
        for ours, theirs in zip((q_sample(chain, x0, t, eps), target), expected, strict=True):
            assert difference(ours, theirs.numpy()) < ROUND_OFF

    def test_of_evenly_spaced_steps_agree(self, schedule, chain):
        scheduler = scheduler_of("DDPMScheduler", schedule, 7, timestep_spacing="linspace")
        np.testing.assert_array_equal(uniform(chain, 7), times_of(scheduler))

    @pytest.mark.parametrize(
        ("theirs", "grid"),
        [("use_karras_sigmas", karras), ("use_exponential_sigmas", log_snr_uniform)],
    )
    def test_of_noise_levels_and_their_times_agree(self, schedule, chain, theirs, grid):
        """Both interpolate λ between the steps of the chain.

        The cosine chain goes on to more noise than ours visits: they are told where to begin.
        """
        options = {
            theirs: True,
            "sigma_max": None if schedule == "linear" else np.exp(-ALL_NOISE / 2),
        }
        with double_precision():
            scheduler = scheduler_of("EulerDiscreteScheduler", schedule, **options)
        times = grid(chain, STEPS)
        noise_level = to_clean(chain, times).now.noise_to_signal
        assert difference(noise_level, scheduler.sigmas.numpy()[:-1]) < ROUND_OFF
        np.testing.assert_allclose(times, times_of(scheduler), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("variance", "theirs"),
    [("fixedsmall", "fixed_small"), ("fixedlarge", "fixed_large"), ("learned", "learned_range")],
)
def test_ancestral_is_ddpm(schedule, chain, variance, theirs, clip):
    x, noise = standard_normal(), noise_of_rows(*range(STEPS))
    function, meaning = network, "none"
    if variance == "learned":
        function, meaning = network_with_variance, "learned_range"
    with double_precision():
        options = {"variance_type": theirs, "clip_sample": clip, "timestep_spacing": "linspace"}
        expected = run(scheduler_of("DDPMScheduler", schedule, **options), x, noise, function)
    denoiser = model(chain, "v", function, variance=meaning)
    if clip:
        denoiser = ClippedDenoiser(denoiser, chain)
    sampler = ancestral(to_clean(chain, uniform(chain, STEPS)), variance)
    assert difference(trajectory(sampler, denoiser, x).x, expected) < ROUND_OFF


class TestDDIM:
    """Their step goes to t - T//steps whatever the grid: here a grid of that very distance."""

    @pytest.mark.parametrize(
        ("eta", "clip", "target"),
        [(0.0, False, "v"), (0.5, False, "x0"), (1.0, False, "eps"), (0.5, True, "v")],
    )
    def test_is_theirs(self, schedule, chain, eta, clip, target):
        """They recompute ε from the clipped x_0 if asked to, as here."""
        x, noise = standard_normal(), noise_of_rows(*range(STEPS))
        with double_precision():
            scheduler = scheduler_of(
                "DDIMScheduler",
                schedule,
                timestep_spacing="trailing",
                clip_sample=clip,
                prediction_type=PREDICTIONS[target],
            )
            expected = run(scheduler, x, noise, eta=eta, use_clipped_model_output=clip)
        denoiser = model(chain, target)
        if clip:
            denoiser = ClippedDenoiser(denoiser, chain)
        sampler = ddim(to_clean(chain, times_of(scheduler)), eta)
        assert difference(trajectory(sampler, denoiser, x).x, expected) < ROUND_OFF

    def test_with_dynamic_thresholding_is_theirs(self, schedule, chain):
        """Their bound on s is put out of reach; they need an axis besides the channels."""
        x = standard_normal()[..., None]
        with double_precision():
            scheduler = scheduler_of(
                "DDIMScheduler",
                schedule,
                timestep_spacing="trailing",
                thresholding=True,
                dynamic_thresholding_ratio=0.8,
                sample_max_value=100.0,
            )
            expected = run(scheduler, x, use_clipped_model_output=True)
        denoiser = ThresholdedDenoiser(model(chain, "v"), chain, 0.8)
        sampler = ddim(to_clean(chain, times_of(scheduler)))
        assert difference(trajectory(sampler, denoiser, x).x, expected) < ROUND_OFF

    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_from_no_signal_at_all_is_theirs(self, schedule, eta):
        """α = 0 at T: a schedule rescaled to zero terminal SNR."""
        x, noise = standard_normal(), noise_of_rows(*range(STEPS))
        with double_precision():
            scheduler = scheduler_of(
                "DDIMScheduler",
                schedule,
                timestep_spacing="trailing",
                clip_sample=False,
                rescale_betas_zero_snr=True,
            )
            expected = run(scheduler, x, noise, eta=eta)
        chain = Chain(zero_terminal_snr(make_betas(schedule, 1000)))
        sampler = ddim(to_clean(chain, times_of(scheduler)), eta)
        assert difference(trajectory(sampler, model(chain, "v"), x).x, expected) < ROUND_OFF

    def test_towards_noise_is_their_inverse(self, schedule, chain):
        """It starts at t = 0, after their step from clean data; the network is told where x is."""
        x = standard_normal()
        with double_precision():
            scheduler = scheduler_of("DDIMInverseScheduler", schedule, clip_sample=False)
            visited = scheduler.timesteps
            scheduler.timesteps = visited[1:]
            expected = run(scheduler, x, times=visited)
        sampler = ddim(along(chain, visited.numpy().astype(float)))
        assert difference(trajectory(sampler, model(chain, "v"), x).x, expected) < ROUND_OFF


@pytest.mark.parametrize("grid", ["trailing", "karras"])
@pytest.mark.parametrize(
    ("solver", "theirs"), [(ddim, "EulerDiscreteScheduler"), (heun, "HeunDiscreteScheduler")]
)
def test_euler_and_heun_are_theirs(schedule, chain, solver, theirs, grid):
    """Theirs moves x/α along σ/α, ours x itself: Euler's method is then DDIM."""
    x = standard_normal()
    options = {"timestep_spacing": "trailing", "use_karras_sigmas": grid == "karras"}
    with double_precision():
        scheduler = scheduler_of(theirs, schedule, **options)
    sampler = solver(to_clean(chain, np.unique(times_of(scheduler))[::-1]))
    alpha = np.append(chain.alpha(sampler.nodes.time), 1.0)
    with double_precision():
        expected = run(scheduler, x / alpha[0])
    actual = trajectory(sampler, model(chain, "v"), x).x / alpha[1:, None, None]
    assert difference(actual, expected) < ROUND_OFF


class TestDPMSolver:
    @pytest.mark.parametrize("end", ["zero", "sigma_min"])
    @pytest.mark.parametrize(("eta", "theirs"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
    def test_2m_is_theirs(self, schedule, chain, eta, theirs, end):
        """The step to σ = 0 is of first order in both; to σ_min of second, unless they lower it."""
        x, noise = standard_normal(), noise_of_rows(*range(STEPS))
        with double_precision():
            scheduler = scheduler_of(
                "DPMSolverMultistepScheduler",
                schedule,
                algorithm_type=theirs,
                final_sigmas_type=end,
                lower_order_final=False,
            )
            expected = run(scheduler, x, noise)
        sampler = dpmpp_2m(grid_to(end, chain, scheduler), eta)
        assert difference(trajectory(sampler, model(chain, "v"), x).x, expected) < ROUND_OFF

    @pytest.mark.parametrize(("eta", "theirs"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
    def test_of_first_order_is_ddim(self, schedule, chain, eta, theirs):
        x, noise = standard_normal(), noise_of_rows(*range(STEPS))
        with double_precision():
            scheduler = scheduler_of(
                "DPMSolverMultistepScheduler", schedule, algorithm_type=theirs, solver_order=1
            )
            expected = run(scheduler, x, noise)
        sampler = ddim(to_clean(chain, times_of(scheduler)), eta)
        assert difference(trajectory(sampler, model(chain, "v"), x).x, expected) < ROUND_OFF


def grid_to(end, chain, scheduler):
    """The grid of a scheduler, to clean data or only to the chain's first step."""
    times = times_of(scheduler)
    return to_clean(chain, times) if end == "zero" else along(chain, np.append(times, 0.0))


@pytest.mark.parametrize(
    ("order", "end"),
    [(1, "zero"), (2, "zero"), (2, "sigma_min"), (3, "sigma_min"), (4, "sigma_min")],
)
def test_unipc_is_theirs(schedule, chain, order, end):
    """Both use B₂(h); to σ = 0 they lower the last steps' orders one by one, ours only the last.

    Orders above 2 therefore compare where neither does: on a grid that ends at σ > 0.
    """
    x = standard_normal()
    with double_precision():
        scheduler = scheduler_of(
            "UniPCMultistepScheduler",
            schedule,
            solver_order=order,
            final_sigmas_type=end,
            lower_order_final=end == "zero",
        )
        expected = run(scheduler, x)
    sampler = unipc(grid_to(end, chain, scheduler), order)
    assert difference(trajectory(sampler, model(chain, "v"), x).x, expected) < ROUND_OFF


class TestEDM:
    """Their output is F: what EDM's preconditioning feeds and what it means are compared too."""

    process = edm()
    denoiser = model(process, "edm", condition_on="log_snr", data_std=0.5, normalise_input=True)

    @pytest.mark.parametrize(
        ("theirs", "grid"), [("karras", karras), ("exponential", log_snr_uniform)]
    )
    def test_noise_levels_agree(self, theirs, grid):
        with double_precision():
            scheduler = diffusers.EDMEulerScheduler(sigma_schedule=theirs)
            scheduler.set_timesteps(STEPS)
        assert difference(grid(self.process, STEPS), scheduler.sigmas.numpy()[:-1]) < ROUND_OFF

    def test_ddim_is_their_euler(self):
        x = standard_normal() * 80
        with double_precision():
            scheduler = diffusers.EDMEulerScheduler()
            scheduler.set_timesteps(STEPS)
            expected = run(scheduler, x)
        sampler = ddim(to_clean(self.process, karras(self.process, STEPS)))
        assert difference(trajectory(sampler, self.denoiser, x).x, expected) < ROUND_OFF

    @pytest.mark.parametrize(("eta", "theirs"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
    def test_2m_is_theirs(self, eta, theirs):
        x, noise = standard_normal() * 80, noise_of_rows(*range(STEPS))
        with double_precision():
            scheduler = diffusers.EDMDPMSolverMultistepScheduler(algorithm_type=theirs)
            scheduler.set_timesteps(STEPS)
            expected = run(scheduler, x, noise)
        sampler = dpmpp_2m(to_clean(self.process, karras(self.process, STEPS)), eta)
        assert difference(trajectory(sampler, self.denoiser, x).x, expected) < ROUND_OFF


class TestFlow:
    process = rectified_flow()
    denoiser = model(process, "velocity", time_scale=1000.0)

    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_ddim_is_their_euler(self, shift):
        """Their network is told σ after the shift: a model of the flow that is not shifted."""
        x, times = standard_normal(), np.linspace(1, 0, STEPS, endpoint=False)
        with double_precision():
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
            scheduler.set_timesteps(sigmas=times)
            expected = run(scheduler, x)
        process = shifted(self.process, shift)
        denoiser = InProcess(self.denoiser, self.process, process)
        sampler = ddim(to_clean(process, times))
        assert difference(trajectory(sampler, denoiser, x).x, expected) < ROUND_OFF

    @pytest.mark.parametrize(
        ("solver", "theirs"),
        [(dpmpp_2m, "DPMSolverMultistepScheduler"), (unipc, "UniPCMultistepScheduler")],
    )
    def test_multistep_solvers_are_theirs(self, solver, theirs):
        """They round down the time that the network is told: here it is told σ."""
        x = standard_normal()
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        with double_precision():
            scheduler = scheduler_of(theirs, "linear", **options)
            expected = run(scheduler, x, times=1000 * scheduler.sigmas)
        sampler = solver(to_clean(self.process, scheduler.sigmas.numpy()[:-1]))
        assert difference(trajectory(sampler, self.denoiser, x).x, expected) < ROUND_OFF


def test_langevin_steps_are_theirs():
    """One example is compared: they take the mean of norms over the batch, ours each example's own.

    Their predictor adds the noise of the reverse SDE, ours that of the ancestral step.
    """
    process, rows = ve(), range(3)
    x = 50 * standard_normal()[:1]
    noise = [torch.from_numpy(z[:1]) for z in noise_of_rows(*rows)]
    with double_precision():
        scheduler = diffusers.ScoreSdeVeScheduler(snr=0.2)
        state, expected = torch.from_numpy(x), []
        with mock.patch.object(sys.modules[type(scheduler).__module__], "randn_tensor") as draw:
            draw.side_effect = noise
            for _ in rows:
                score = torch.from_numpy(network(state.numpy(), 1.0))
                state = scheduler.step_correct(score, state).prev_sample
                expected.append(state.numpy())
    sampler = predictor_corrector(along(process, np.array([1.0, 0.5])), 0.2, len(rows))
    actual = trajectory(sampler, model(process, "score"), x).x[: len(rows)]
    assert difference(actual, expected) < ROUND_OFF


def test_rescaled_guidance_is_theirs(chain):
    """The model predicts x_0: they rescale whatever the network predicts, ours x_0."""
    theirs = pytest.importorskip("diffusers.guiders.guider_utils")
    x, label = standard_normal(), np.array([0.5, 1.0, 2.0])

    def apply(params, x, time, conditioning):
        label = jnp.where(conditioning["label_drop"], 0, conditioning["label"])
        return network(x + label[:, None], time[:, None])

    denoiser = NetworkDenoiser((), apply, Parameterisation(chain, "x0"))
    guidance = RescaledGuidance(ClassifierFreeGuidance(denoiser, 3.0, ("label",)), chain, 0.7)
    actual = guidance(jnp.asarray(x), jnp.asarray(400.0), {"label": jnp.asarray(label)})

    told, not_told = (torch.from_numpy(network(x + c, 400)) for c in (label[:, None], 0))
    expected = theirs.rescale_noise_cfg(not_told + 3 * (told - not_told), told, 0.7)
    assert difference(actual.x0, expected.numpy()) < ROUND_OFF
