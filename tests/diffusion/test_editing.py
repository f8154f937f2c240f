"""Editing of Gaussian images with correlated pixels: every step is affine, the truth is known."""

import dataclasses
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import rectified_flow
from jax_ddpm.diffusion.editing import (
    colourisation,
    inpainting,
    last_steps,
    perturbed,
    projected,
    resampled,
    super_resolution,
)
from jax_ddpm.diffusion.parameterisation import Prediction
from jax_ddpm.diffusion.process import Process
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.ddim import ddim
from jax_ddpm.diffusion.samplers.dpmpp import dpmpp_2m
from jax_ddpm.diffusion.samplers.grid import to_clean, uniform
from jax_ddpm.diffusion.samplers.heun import heun
from jax_ddpm.diffusion.samplers.predictor_corrector import predictor_corrector
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.diffusion.samplers.unipc import unipc
from jax_ddpm.diffusion.schedules import make_betas

pytestmark = pytest.mark.usefixtures("x64")
quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

CHAIN = Chain(make_betas("linear", 40))
GRID = to_clean(CHAIN, np.arange(39, -1, -1, dtype=float))
SHORT = to_clean(CHAIN, np.arange(39, 0, -4, dtype=float))
FLOW = to_clean(rectified_flow(), uniform(rectified_flow(), 8))
KEPT = np.array([[True, False, True, False], [False, False, True, True]])
PROJECTIONS = {
    "inpainting": inpainting(KEPT),
    "colourisation": colourisation,
    "super_resolution": super_resolution(2),
}
STOCHASTIC = {
    "ancestral": partial(ancestral, variance="fixedlarge"),
    "ddim": partial(ddim, eta=0.5),
    "predictor_corrector": predictor_corrector,
}
SOLVERS = STOCHASTIC | {
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": partial(dpmpp_2m, eta=1.0),
    "unipc": unipc,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CorrelatedGaussianDenoiser:
    """E[x_0 | x_t] = m + α·Σ·(α²·Σ + σ²·I)⁻¹·(x_t - α·m) of images with mean m and covariance Σ.

    Along each eigenvector of Σ that is a division by α²·variance + σ².
    """

    mean: float
    variances: jax.Array
    directions: jax.Array
    process: Process = dataclasses.field(metadata={"static": True})

    def __call__(self, xt, t, conditioning):
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        centred = (xt - alpha * self.mean).reshape(len(xt), -1) @ self.directions
        whitened = centred / (alpha**2 * self.variances + sigma**2)[None]
        x0 = (alpha * self.variances[None] * whitened) @ self.directions.T
        eps = sigma * whitened @ self.directions.T
        return Prediction(self.mean + x0.reshape(xt.shape), eps.reshape(xt.shape))


def correlated(mean, covariance):
    return CorrelatedGaussianDenoiser(mean, *map(jnp.asarray, np.linalg.eigh(covariance)), CHAIN)


@partial(jax.jit, static_argnums=0)
def run(method, denoiser, x, keys, *arguments):
    """The end of ``method(*arguments)``, a sampler made where it is run."""
    return sample(method(*arguments), denoiser, x, keys, {})[0]


def draw(method, denoiser, number, *arguments, shape=(2, 4, 3), seed=0):
    """Samples from standard normal noise."""
    keys = jax.random.split(jax.random.key(seed), number)
    x = jax.random.normal(jax.random.key(seed + 100), (number, *shape))
    return run(method, denoiser, x, keys, *arguments)


@pytest.fixture(params=PROJECTIONS)
def project(request):
    return PROJECTIONS[request.param]


@pytest.fixture
def matrix(project):
    """P, over images of 2×4 pixels and 3 channels."""
    unit_images = jnp.eye(24).reshape(24, 2, 4, 3)
    return np.asarray(project(unit_images)).reshape(24, 24)


@pytest.fixture
def known(rng):
    return jnp.asarray(rng.uniform(-1, 1, (5, 2, 4, 3)))


class TestProjections:
    def test_are_orthogonal(self, matrix):
        np.testing.assert_allclose(matrix @ matrix, matrix, atol=1e-15)
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-15)

    def test_inpainting_knows_the_pixels_that_are_kept(self, known):
        found = np.asarray(inpainting(KEPT)(known))
        np.testing.assert_array_equal(found[:, KEPT], known[:, KEPT])
        assert not np.any(found[:, ~KEPT])

    def test_colourisation_knows_the_mean_of_the_channels(self, known):
        gray = (known[..., 0] + known[..., 1] + known[..., 2]) / 3
        for channel in range(3):
            np.testing.assert_allclose(colourisation(known)[..., channel], gray, atol=1e-15)

    def test_super_resolution_knows_the_mean_of_each_block(self, known):
        found = super_resolution(2)(known)
        for column in range(4):
            left = column // 2 * 2
            block = np.asarray(known)[:, :, left : left + 2].mean((1, 2))
            for row in range(2):
                np.testing.assert_allclose(found[:, row, column], block, atol=1e-15)


class TestProjected:
    @pytest.mark.parametrize(
        ("name", "solver"),
        [(name, "ancestral") for name in PROJECTIONS] + [("inpainting", name) for name in SOLVERS],
    )
    def test_known_part_is_exact_at_the_end(self, known, rng, name, solver):
        """The rest differs from what it would be without it, as pixels are correlated."""
        project, sampler = PROJECTIONS[name], SOLVERS[solver](SHORT)
        root = rng.standard_normal((24, 24)) / 5
        denoiser = correlated(0.1, root @ root.T)
        found = draw(partial(projected, sampler, SHORT, project), denoiser, 5, known)
        np.testing.assert_allclose(project(found), project(known), atol=1e-14)
        free = draw(lambda: sampler, denoiser, 5)
        assert np.abs((found - project(found)) - (free - project(free))).max() > 0.01

    def test_pixels_that_are_kept_are_exact_to_the_last_bit(self, known):
        method = partial(projected, ddim(SHORT), SHORT, inpainting(KEPT))
        found = draw(method, GaussianDenoiser(0.3, 0.25, CHAIN), 5, known)
        np.testing.assert_array_equal(inpainting(KEPT)(found), inpainting(KEPT)(known))

    @pytest.mark.parametrize("solver", ["ancestral", "heun", "dpmpp_2m_sde", "unipc"])
    def test_pixels_that_do_not_depend_on_the_known_ones_are_sampled_as_ever(self, known, solver):
        denoiser, sampler = GaussianDenoiser(0.3, 0.25, CHAIN), SOLVERS[solver](SHORT)
        method = partial(projected, sampler, SHORT, inpainting(KEPT))
        found, free = draw(method, denoiser, 5, known), draw(lambda: sampler, denoiser, 5)
        np.testing.assert_allclose(found[:, ~KEPT], free[:, ~KEPT], atol=1e-14)

    @pytest.mark.parametrize("resamplings", [1, 3])
    def test_known_part_on_the_way_is_a_draw_of_its_noisy_self(self, rng, resamplings):
        """Its mean is α_s·known and its deviation σ_s, also where noise was put back."""
        count = 4000
        known = jnp.broadcast_to(jnp.asarray(rng.uniform(-1, 1, (1, 2, 4, 1))), (count, 2, 4, 1))
        sampler = projected(ddim(SHORT), SHORT, inpainting(KEPT), known)
        sampler = resampled(sampler, SHORT, 4, resamplings)
        keys = jax.random.split(jax.random.key(0), count)
        denoiser = GaussianDenoiser(0.3, 0.25, CHAIN)
        moments = partial(sample, sampler, num_snapshots=sampler.num_evaluations)
        x = np.asarray(jax.jit(moments)(denoiser, 0 * known, keys, {})[1].x)
        times = sampler.nodes.time[1:].astype(int)
        alpha_bar = np.append(np.cumprod(1 - CHAIN.betas)[times], 1)
        for x_s, a in zip(x[..., 0], alpha_bar, strict=True):
            z = x_s[:, KEPT] - np.sqrt(a) * np.asarray(known)[:, KEPT, 0]
            np.testing.assert_allclose(z.mean(0), 0, atol=5 * np.sqrt((1 - a) / count) + 1e-12)
            np.testing.assert_allclose(z.var(), 1 - a, rtol=5 * np.sqrt(2 / z.size), atol=1e-12)

    def test_examples_do_not_touch_each_other(self, known):
        method = partial(projected, STOCHASTIC["ddim"](SHORT), SHORT, colourisation)
        denoiser = GaussianDenoiser(0.3, 0.25, CHAIN)
        changed = draw(method, denoiser, 5, known.at[3].add(0.5))
        differs = np.asarray(changed != draw(method, denoiser, 5, known))
        np.testing.assert_array_equal(differs.any((1, 2, 3)), np.arange(5) == 3)

    def test_churn_is_refused(self, known):
        with pytest.raises(ValueError, match="churn must be 0"):
            projected(heun(SHORT, churn=4.0), SHORT, colourisation, known)


def visited(num_steps, jump_length, resamplings):
    """The states that RePaint passes, T-1 to 0 and then -1, clean (Lugmayr et al. 2022).

    A walk down that at each multiple of the jump length turns back so many times.
    """
    turns = {t: resamplings - 1 for t in range(0, num_steps - jump_length, jump_length)}
    t, states = num_steps - 1, [num_steps - 1]
    while t >= 0:
        t -= 1
        states.append(t)
        if turns.get(t, 0):
            turns[t] -= 1
            t += jump_length
            states.append(t)
    return states


class Moments(NamedTuple):
    """The moments of two pixels."""

    mean: np.ndarray
    covariance: np.ndarray


CORRELATION, Y = 0.9, 1.0
SIGMA = np.array([[1, CORRELATION], [CORRELATION, 1]])


def recursion(states):
    """The moments of x along the states, ancestral with variance β, the first pixel known as Y.

    x_s = c_0·E[x_0 | x_t] + c_t·x_t + √β·z, then the first pixel is drawn anew around √ᾱ_s·Y; up
    again x_t = √(ᾱ_t/ᾱ_s)·x_s + √(1 - ᾱ_t/ᾱ_s)·z.
    """
    alpha_bar, eye, new = np.append(np.cumprod(1 - CHAIN.betas), 1), np.eye(2), np.diag([0, 1])
    mean, covariance = np.zeros(2), np.eye(2)
    for t, s in pairwise(states):
        a, a_s = alpha_bar[t], alpha_bar[s]
        if s > t:
            kept = a_s / a
            mean, covariance = np.sqrt(kept) * mean, kept * covariance + (1 - kept) * eye
            continue
        beta = 1 - a / a_s
        posterior = np.sqrt(a) * SIGMA @ np.linalg.inv(a * SIGMA + (1 - a) * eye)
        slope = np.sqrt(a_s) * beta * posterior + np.sqrt(a / a_s) * (1 - a_s) * eye
        slope, noise = slope / (1 - a), beta if s >= 0 else 0
        mean, covariance = slope @ mean, slope @ covariance @ slope.T + noise * eye
        mean = new @ mean + np.sqrt(a_s) * np.array([Y, 0])
        covariance = new @ covariance @ new + (1 - a_s) * np.diag([1, 0])
    return Moments(mean, covariance)


def inpaint_pair(jump_length, resamplings, count):
    """The second pixel of each sample, given the first."""
    project = inpainting(np.array([[True, False]]))

    def method(known):
        sampler = projected(ancestral(GRID, "fixedlarge"), GRID, project, known)
        return resampled(sampler, GRID, jump_length, resamplings) if jump_length else sampler

    known = jnp.full((count, 1, 2, 1), Y)
    return draw(method, correlated(0.0, SIGMA), count, known, shape=(1, 2, 1))[:, 0, 1, 0]


class TestResampled:
    @pytest.mark.parametrize(("jump_length", "resamplings"), [(0, 1), (1, 4), (10, 3)])
    def test_moments_follow_the_recursion(self, jump_length, resamplings):
        """Jump length 0 is projection alone."""
        count = 5000
        x = inpaint_pair(jump_length, resamplings, count)
        expected = recursion(visited(40, max(jump_length, 1), resamplings))
        mean, var = expected.mean[1], expected.covariance[1, 1]
        np.testing.assert_allclose(x.mean(), mean, atol=5 * np.sqrt(var / count))
        np.testing.assert_allclose(x.var(), var, rtol=5 * np.sqrt(2 / count))

    def test_approaches_the_conditional_distribution(self):
        """Its mean is ρ·y = 0.9 and its variance 1 - ρ² = 0.19; projection alone is far from it."""
        count, errors = 1500, []
        for resamplings in (1, 3, 10):
            x = inpaint_pair(1, resamplings, count)
            errors.append([abs(x.mean() - 0.9), abs(x.var() - 0.19)])
        assert np.all(np.diff(errors, axis=0) < 0)
        assert errors[0][0] > 0.25
        assert np.all(np.array(errors[-1]) < 0.06)

    @pytest.mark.parametrize("solver", STOCHASTIC)
    def test_once_is_the_sampler_itself_to_the_last_bit(self, known, solver):
        plain = partial(projected, STOCHASTIC[solver](SHORT), SHORT, colourisation)

        def once(known):
            return resampled(plain(known), SHORT, 3, 1)

        denoiser = GaussianDenoiser(0.3, 0.25, CHAIN)
        np.testing.assert_array_equal(
            draw(once, denoiser, 5, known), draw(plain, denoiser, 5, known)
        )

    @pytest.mark.parametrize(
        ("num_steps", "jump_length", "resamplings"),
        [(10, 1, 4), (10, 3, 2), (10, 4, 3), (10, 9, 2), (12, 4, 3), (2, 1, 5)],
    )
    @pytest.mark.parametrize("rows_per_step", [1, 3])
    def test_evaluates_where_the_paper_does(
        self, num_steps, jump_length, resamplings, rows_per_step
    ):
        """One row for each way down; only those lead anywhere that the denoiser is asked for."""
        grid = to_clean(CHAIN, np.arange(num_steps - 1, -1, -1, dtype=float))
        sampler = predictor_corrector(grid, corrector_steps=rows_per_step - 1)
        states = visited(num_steps, jump_length, resamplings)
        downwards = [t for t, s in pairwise(states) if s < t]
        nodes = resampled(sampler, grid, jump_length, resamplings).nodes
        np.testing.assert_array_equal(nodes.time, np.repeat(downwards, rows_per_step))
        np.testing.assert_array_equal(nodes.inside.time, nodes.time)
        repeated = (num_steps - 1) // jump_length * jump_length * (resamplings - 1)
        assert len(nodes.time) == (num_steps + repeated) * rows_per_step

    def test_climbs_as_the_chain_does(self):
        """√(1-β) times x plus √β times noise, step by step."""
        nodes = resampled(ddim(GRID), GRID, 7, 2).nodes
        steps = np.append(np.diff(nodes.time), 0).astype(int)
        assert np.sum(steps >= 0) == 1 + 39 // 7
        for t, step, factor, std in zip(nodes.time, steps, nodes.factor, nodes.std, strict=True):
            assert (step == 6) == (std > 0)
            betas = CHAIN.betas[int(t) : int(t) + 7] if std else np.zeros(1)
            np.testing.assert_allclose(factor, np.sqrt(np.prod(1 - betas)), rtol=1e-13)
            np.testing.assert_allclose(std**2, 1 - np.prod(1 - betas), rtol=1e-12)

    def test_climbs_back_to_pure_noise(self):
        """Nothing is left of x_0 at the start of a flow: x is drawn anew."""
        nodes = resampled(ddim(FLOW), FLOW, 7, 2).nodes
        climbs = nodes.std > 0
        np.testing.assert_array_equal(climbs, np.arange(15) == 6)
        np.testing.assert_array_equal(nodes.factor[climbs], 0)
        np.testing.assert_array_equal(nodes.std[climbs], 1)

    @pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in STOCHASTIC])
    def test_history_is_refused(self, solver):
        with pytest.raises(ValueError, match="without history"):
            resampled(SOLVERS[solver](SHORT), SHORT, 1, 2)

    @pytest.mark.parametrize(("jump_length", "resamplings"), [(0, 2), (10, 2), (2, 0)])
    def test_impossible_schedules_are_refused(self, jump_length, resamplings):
        named = "resamplings is 0" if not resamplings else f"jump_length is {jump_length}.*1 to 9"
        with pytest.raises(ValueError, match=named):
            resampled(ddim(SHORT), SHORT, jump_length, resamplings)


class TestFromImages:
    def test_last_steps_are_the_grid_of_their_times(self):
        found, expected = last_steps(GRID, 7), to_clean(CHAIN, np.arange(6, -1, -1, dtype=float))
        jax.tree.map(np.testing.assert_array_equal, found[1:], expected[1:])
        assert found.process is CHAIN

    @pytest.mark.parametrize("num_steps", [0, 41])
    def test_more_steps_than_there_are_is_refused(self, num_steps):
        with pytest.raises(ValueError, match="take 1 to 40"):
            last_steps(GRID, num_steps)

    @pytest.mark.parametrize("num_steps", [1, 20, 40])
    def test_images_get_the_noise_of_the_first_of_them(self, num_steps, rng):
        count, pair = 5000, rng.uniform(-1, 1, (1, 2))
        images = jnp.broadcast_to(jnp.asarray(pair), (count, 2))
        keys = jax.random.split(jax.random.key(0), count)
        x = np.asarray(perturbed(last_steps(GRID, num_steps), images, keys))
        a = np.cumprod(1 - CHAIN.betas)[num_steps - 1]
        error = 5 * np.sqrt((1 - a) / count)
        np.testing.assert_allclose(x.mean(0), np.sqrt(a) * pair[0], atol=error)
        np.testing.assert_allclose(x.var(0), 1 - a, rtol=5 * np.sqrt(2 / count))

    def test_all_steps_of_a_flow_know_nothing_of_the_image(self, known):
        keys = jax.random.split(jax.random.key(0), 5)
        start = perturbed(last_steps(FLOW, 8), known, keys)
        np.testing.assert_array_equal(start, perturbed(last_steps(FLOW, 8), 0 * known, keys))

    def test_the_fewer_steps_the_closer_to_the_image(self, known):
        """The last step alone starts from noise of √β_0, and takes most of that away again."""
        keys, denoiser = jax.random.split(jax.random.key(0), 5), GaussianDenoiser(0.0, 0.5, CHAIN)
        distances = []
        for num_steps in (1, 10, 20, 40):
            grid = last_steps(GRID, num_steps)
            x = run(lambda grid=grid: ddim(grid), denoiser, perturbed(grid, known, keys), keys)
            distances.append(np.sqrt(np.mean((x - known) ** 2)))
        assert np.all(np.diff(distances) > 0)
        assert distances[0] < 1.5 * np.sqrt(CHAIN.betas[0])
