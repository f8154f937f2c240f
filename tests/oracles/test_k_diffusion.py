"""Every method that k-diffusion has too, step by step on the same network and the same noise.

Its samplers know x only as x_0 + σ·ε: ours run in EDM's process.
"""

import importlib
import importlib.util
import sys
import types
from unittest import mock

import jax
import numpy as np
import pytest
import tiny
from oracles.trajectories import (
    difference,
    double_precision,
    model,
    network,
    noise_of_rows,
    standard_normal,
    trajectory,
)

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import edm, vp_cosine, vp_linear
from jax_ddpm.diffusion.denoiser import InProcess
from jax_ddpm.diffusion.samplers.ddim import ddim
from jax_ddpm.diffusion.samplers.dpmpp import dpmpp_2m
from jax_ddpm.diffusion.samplers.grid import karras, log_snr_uniform, to_clean
from jax_ddpm.diffusion.samplers.heun import heun
from jax_ddpm.diffusion.schedules import make_betas

torch = pytest.importorskip("torch")
for dependency in ("torchdiffeq", "torchsde", "safetensors"):
    pytest.importorskip(dependency)

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

# Both in float64: what is left is round-off.
ROUND_OFF = 1e-12
STEPS = 8
EDM = edm()
GRID = to_clean(EDM, karras(EDM, STEPS))


@pytest.fixture(autouse=True)
def _strict_float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def library():
    """Its samplers and its wrappers of models, without the many things that the package imports."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        pytest.skip("k_diffusion is absent")
    package = types.ModuleType("k_diffusion")
    package.__path__ = found.submodule_search_locations
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "k_diffusion", package)
        for unused in ("torchvision", "torchvision.transforms"):
            patch.setitem(sys.modules, unused, mock.Mock())
        return types.SimpleNamespace(
            sampling=importlib.import_module("k_diffusion.sampling"),
            external=importlib.import_module("k_diffusion.external"),
        )


def inner_model(x, t):
    return torch.from_numpy(network(x.numpy(), t.numpy()[:, None]))


def run(sampler, denoiser, x, sigmas, noise, **options):
    """The x_0 predicted at every evaluation, and x at the end."""
    predicted, draws = [], map(torch.from_numpy, noise)

    def recording(x, sigma):
        predicted.append(denoiser(x, sigma))
        return predicted[-1]

    if "eta" in options:
        options["noise_sampler"] = lambda *_: next(draws)
    with mock.patch.object(torch, "randn_like", side_effect=draws):
        end = sampler(recording, torch.from_numpy(x), sigmas, disable=True, **options)
    return np.stack([*predicted, end])


def ours(sampler, denoiser, x):
    x, x0 = trajectory(sampler, denoiser, x)
    return np.concatenate([x0, x[-1:]])


class TestNoiseLevels:
    def test_of_karras_agree(self, library):
        with double_precision():
            expected = library.sampling.get_sigmas_karras(STEPS, 0.002, 80.0, rho=5.0)[:-1]
        assert difference(karras(EDM, STEPS, rho=5.0), expected.numpy()) < ROUND_OFF

    def test_evenly_spaced_in_log_agree(self, library):
        with double_precision():
            expected = library.sampling.get_sigmas_exponential(STEPS, 0.002, 80.0)[:-1]
        assert difference(log_snr_uniform(EDM, STEPS), expected.numpy()) < ROUND_OFF

    def test_of_the_linear_vp_process_agree(self, library):
        with double_precision():
            expected = library.sampling.get_sigmas_vp(STEPS)[:-1]
        times = np.linspace(1, 1e-3, STEPS)
        noise_level = to_clean(vp_linear(), times).now.noise_to_signal
        assert difference(noise_level, expected.numpy()) < ROUND_OFF


@pytest.mark.parametrize(
    ("wrapper", "target"), [("DiscreteEpsDDPMDenoiser", "eps"), ("DiscreteVDDPMDenoiser", "v")]
)
def test_a_model_of_a_chain_in_another_process_is_theirs(library, wrapper, target):
    """Both find noise levels between the steps of the chain by interpolating λ."""
    process = edm(0.02, 80.0)
    x = 80 * standard_normal()
    with double_precision():
        alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
        denoiser = getattr(library.external, wrapper)(inner_model, alpha_bar, quantize=False)
        sigmas = library.sampling.get_sigmas_karras(STEPS, 0.02, 80.0)
        expected = run(library.sampling.sample_dpmpp_2m, denoiser, x, sigmas, [])
    chain = Chain(make_betas("linear", 1000))
    denoiser = InProcess(model(chain, target), chain, process)
    sampler = dpmpp_2m(to_clean(process, karras(process, STEPS)))
    assert difference(ours(sampler, denoiser, x), expected) < ROUND_OFF


CHURN = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}


@pytest.mark.parametrize(
    ("name", "options", "sampler", "rows"),
    [
        ("euler", {}, ddim(GRID), range(STEPS)),
        ("euler_ancestral", {"eta": 0.5}, ddim(GRID, 0.5), range(STEPS)),
        ("euler_ancestral", {"eta": 1.0}, ddim(GRID, 1.0), range(STEPS)),
        ("heun", {}, heun(GRID), range(STEPS)),
        ("heun", CHURN, heun(GRID, 40.0, (0.05, 50.0), 1.003), range(0, 2 * STEPS, 2)),
        ("dpmpp_2m", {}, dpmpp_2m(GRID), []),
        ("dpmpp_2m_sde", {"eta": 0.0}, dpmpp_2m(GRID), []),
        ("dpmpp_2m_sde", {"eta": 0.5}, dpmpp_2m(GRID, 0.5), range(STEPS)),
        ("dpmpp_2m_sde", {"eta": 1.0}, dpmpp_2m(GRID, 1.0), range(STEPS)),
    ],
)
def test_samplers_are_theirs(library, name, options, sampler, rows):
    """The model predicts v in the cosine process, which both put in EDM's.

    Churn is kept below the grid's start, above which ours does not raise the noise. 2M SDE is in
    its midpoint form.
    """
    x, noise = 80 * standard_normal(), noise_of_rows(*rows)
    with double_precision():
        denoiser = library.external.VDenoiser(inner_model)
        sigmas = library.sampling.get_sigmas_karras(STEPS, 0.002, 80.0)
        theirs = getattr(library.sampling, f"sample_{name}")
        expected = run(theirs, denoiser, x, sigmas, noise, **options)
    denoiser = InProcess(model(vp_cosine(), "v"), vp_cosine(), EDM)
    assert difference(ours(sampler, denoiser, x), expected) < ROUND_OFF
