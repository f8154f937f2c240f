"""The exact denoiser of Gaussian data makes the sampler affine, with moments known exactly.

One step is x_s = slope·x_t + offset + noise·z. All three follow from the paper's formulas in β and
ᾱ, written out here a second time, and are read off the sampler's own steps.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import GaussianDenoiser

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.denoiser import NetworkDenoiser
from jax_ddpm.diffusion.parameterisation import Parameterisation
from jax_ddpm.diffusion.process import per_example_normal
from jax_ddpm.diffusion.samplers.ancestral import AncestralNode, ancestral
from jax_ddpm.diffusion.samplers.grid import to_clean
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.diffusion.schedules import make_betas

MEAN, VAR = 0.3, 0.25


def descending(num_timesteps, stride=1):
    return np.arange(num_timesteps - 1, -1, -stride, dtype=float)


class Affine(NamedTuple):
    """x_s = slope·x_t + offset + noise·z per step, from the noisiest to the clean end."""

    slope: np.ndarray
    offset: np.ndarray
    noise: np.ndarray

    def moments(self, mean, variance):
        """Mean and variance after every step."""
        rows = []
        for slope, offset, noise in zip(*self, strict=True):
            mean, variance = slope * mean + offset, slope**2 * variance + noise**2
            rows.append((mean, variance))
        return np.transpose(rows)


class Paper:
    """Ho et al. 2020, eqs. 6-7 and 11 with x̂_0 = E[x_0 | x_t], from β alone; index is t."""

    def __init__(self, betas, mean=MEAN, var=VAR):
        self.betas, self.mean, self.var = betas, mean, var
        self.alpha_bar = np.cumprod(1 - betas)
        self.previous = np.append(1, self.alpha_bar[:-1])
        self.noise = 1 - self.alpha_bar
        self.coef_x0 = np.sqrt(self.previous) * betas / self.noise
        self.coef_xt = np.sqrt(1 - betas) * (1 - self.previous) / self.noise
        self.smallest = betas * (1 - self.previous) / self.noise
        self.marginal = self.alpha_bar * var + self.noise
        #: β̃ plus what x_t leaves unknown of x_0: the variance of the true p(x_{t-1} | x_t).
        self.optimal = self.smallest + self.coef_x0**2 * var * self.noise / self.marginal

    def variance(self, name, fraction=0.3):
        if name == "optimal":
            return self.optimal
        variance = {
            "fixedsmall": self.smallest,
            "fixedlarge": self.betas,
            "learned": self.smallest ** (1 - fraction) * self.betas**fraction,
        }[name]
        return np.append(0, variance[1:])  # no noise in the step to clean data

    def steps(self, variance):
        gain = np.sqrt(self.alpha_bar) * self.var / self.marginal
        slope = self.coef_x0 * gain + self.coef_xt
        offset = self.coef_x0 * (1 - gain * np.sqrt(self.alpha_bar)) * self.mean
        noise = np.sqrt(variance)
        return Affine(slope[::-1], offset[::-1], noise[::-1])


def learned(denoiser, fraction=0.3):
    """The denoiser with a variance of its own."""

    def with_fraction(xt, t, conditioning):
        prediction = denoiser(xt, t, conditioning)
        return prediction._replace(variance_fraction=jnp.full_like(xt, fraction))

    return with_fraction


def read_off(sampler, denoiser):
    """Slope, offset and noise of every step, from its results at x = 0, 1 and two draws of z."""
    x = jnp.array([[0.0], [1.0], [0.0]])
    keys = jax.random.split(jax.random.key(0))[np.array([0, 0, 1])]
    z, _, other_z = np.ravel(per_example_normal(keys, x))

    def step(node):
        bound = partial(denoiser, conditioning={})
        return sampler.step(bound, x, node, sampler.init(x), keys)[0][:, 0]

    # Samplers of every length are repeated to one, for which JAX compiles once.
    nodes = jax.tree.map(lambda column: jnp.asarray(np.resize(column, 1000)), sampler.nodes)
    after = np.asarray(jax.vmap(step)(nodes))[: len(sampler.nodes.time)]
    at_0, at_1, other = after.T
    noise = (at_0 - other) / (z - other_z)
    return Affine(at_1 - at_0, at_0 - noise * z, noise)


def as_given(name, paper):
    """The argument of ``ancestral``: the name of a variance, or one value per step."""
    return paper.optimal[::-1] if name == "optimal" else name


VARIANCES = ["fixedsmall", "fixedlarge", "learned", "optimal"]


@pytest.mark.usefixtures("x64")
class TestSteps:
    @pytest.mark.parametrize("variance", VARIANCES)
    def test_are_the_papers(self, chain, variance):
        paper = Paper(chain.betas)
        sampler = ancestral(to_clean(chain, descending(1000)), as_given(variance, paper))
        actual = read_off(sampler, learned(GaussianDenoiser(MEAN, VAR, chain)))
        expected = paper.steps(paper.variance(variance))
        for name in Affine._fields:
            np.testing.assert_allclose(
                getattr(actual, name), getattr(expected, name), rtol=1e-9, atol=1e-12, err_msg=name
            )
        assert (actual.noise[-1] == 0) == (variance != "optimal")

    @pytest.mark.parametrize(("num_timesteps", "shrinkage"), [(1000, 0.9845), (100, 0.877)])
    def test_fixedsmall_shrinks_the_data(self, num_timesteps, shrinkage):
        """β̃ leaves out what x_t does not tell of x_0; at variance ¼ these are the factors."""
        chain = Chain(make_betas("linear", num_timesteps))
        sampler = ancestral(to_clean(chain, descending(num_timesteps)), "fixedsmall")
        steps = read_off(sampler, GaussianDenoiser(MEAN, VAR, chain))
        mean, variance = steps.moments(0.0, 1.0)[:, -1]
        np.testing.assert_allclose(variance / VAR, shrinkage, atol=5e-4)
        np.testing.assert_allclose(mean, MEAN, atol=1e-3)

    @pytest.mark.parametrize("num_timesteps", [5, 20, 100])
    def test_optimal_variance_follows_the_marginals_exactly(self, num_timesteps):
        """Every x_t from q(x_T) has the moments of q(x_t), and x_0 the data's, in any few steps."""
        chain = Chain(make_betas("cosine", num_timesteps))
        paper = Paper(chain.betas)
        sampler = ancestral(to_clean(chain, descending(num_timesteps)), paper.optimal[::-1])
        steps = read_off(sampler, GaussianDenoiser(MEAN, VAR, chain))
        start = np.sqrt(paper.alpha_bar[-1]) * MEAN, paper.marginal[-1]
        mean, variance = steps.moments(*start)
        np.testing.assert_allclose(mean[:-1], np.sqrt(paper.alpha_bar[-2::-1]) * MEAN, rtol=1e-9)
        np.testing.assert_allclose(variance[:-1], paper.marginal[-2::-1], rtol=1e-9)
        np.testing.assert_allclose((mean[-1], variance[-1]), (MEAN, VAR), rtol=1e-9)

    def test_a_given_variance_of_zero_draws_nothing(self):
        chain = Chain(make_betas("linear", 100))
        sampler = ancestral(to_clean(chain, descending(100)), np.zeros(100))
        steps = read_off(sampler, GaussianDenoiser(MEAN, VAR, chain))
        np.testing.assert_array_equal(steps.noise, 0)

    @pytest.mark.parametrize("chain", ["linear", "cosine"], indirect=True)
    def test_learned_log_variances_are_drawn_as_the_network_says(self, chain):
        """The way through the fraction and back is the identity on the chain itself."""

        def log_variance(t):
            return -3 - t / 100

        def network(params, x, time, conditioning):
            return jnp.concatenate([x, log_variance(time[:, None])], axis=-1)

        denoiser = NetworkDenoiser((), network, Parameterisation(chain, "x0", variance="learned"))
        steps = read_off(ancestral(to_clean(chain, descending(1000)), "learned"), denoiser)
        expected = np.exp(log_variance(descending(1000)[:-1]) / 2)
        np.testing.assert_allclose(steps.noise[:-1], expected, rtol=1e-6)


class TestNodes:
    def test_of_the_full_chain_are_its_posterior(self, chain):
        nodes = ancestral(to_clean(chain, descending(1000)), "fixedsmall").nodes
        np.testing.assert_array_equal(nodes.time, descending(1000))
        for actual, expected in (
            (nodes.coef_x0, chain.posterior.coef_x0),
            (nodes.coef_xt, chain.posterior.coef_xt),
            (np.append(np.exp(nodes.log_variance[:-1]), 0), chain.posterior.variance),
        ):
            assert actual.dtype == np.float64
            np.testing.assert_allclose(actual, expected[::-1], rtol=1e-10)

    @pytest.mark.parametrize("stride", [10, 37])
    def test_of_fewer_steps_are_those_of_the_respaced_chain(self, chain, stride):
        """β' = 1 - ᾱ_t/ᾱ_s, by which the marginals at the kept times stay what they were."""
        times = descending(1000, stride)
        alpha_bar = chain.alpha_bar[times[::-1].astype(int)]
        respaced = Chain(1 - alpha_bar / np.append(1, alpha_bar[:-1]))
        nodes = ancestral(to_clean(chain, times), "fixedlarge").nodes
        np.testing.assert_array_equal(nodes.time, times)
        for actual, expected in (
            (nodes.coef_x0, respaced.posterior.coef_x0),
            (nodes.coef_xt, respaced.posterior.coef_xt),
            (nodes.log_variance[:-1], respaced.posterior_log_variance[1:]),
            ((nodes.log_variance + nodes.log_variance_span)[:-1], np.log(respaced.betas)[1:]),
        ):
            np.testing.assert_allclose(actual, expected[::-1], rtol=1e-9)


SHORT = Chain(make_betas("linear", 100))
DENOISER = GaussianDenoiser(MEAN, VAR, SHORT)
SAMPLER = ancestral(to_clean(SHORT, descending(100)), "fixedsmall")
TRACES = []


@partial(jax.jit, static_argnames="num_snapshots")
def run_jit(nodes, denoiser, x, keys, num_snapshots):
    TRACES.append(denoiser)
    return sample(SAMPLER._replace(nodes=nodes), denoiser, x, keys, {}, num_snapshots)


def run(x, keys, nodes=SAMPLER.nodes, denoiser=DENOISER, num_snapshots=3):
    """The end and the snapshots of a run of 100 steps, as NumPy arrays."""
    return jax.tree.map(np.asarray, run_jit(nodes, denoiser, x, keys, num_snapshots))


class TestSampling:
    @pytest.fixture
    def x(self, rng):
        return jnp.asarray(rng.standard_normal((2000, 16)), jnp.float32)

    @pytest.fixture
    def keys(self, x):
        return jax.random.split(jax.random.key(0), len(x))

    @pytest.mark.parametrize("variance", ["fixedsmall", "fixedlarge", "optimal"])
    def test_moments_follow_the_recursion(self, x, keys, variance):
        paper = Paper(SHORT.betas)
        nodes = ancestral(to_clean(SHORT, descending(100)), as_given(variance, paper)).nodes
        samples, _ = run(x, keys, nodes)
        mean, var = paper.steps(paper.variance(variance)).moments(0.0, 1.0)[:, -1]
        np.testing.assert_allclose(samples.mean(), mean, atol=4 * np.sqrt(var / x.size))
        np.testing.assert_allclose(samples.var(), var, rtol=4 * np.sqrt(2 / x.size))

    def test_noise_depends_on_the_examples_own_key_alone(self, x, keys):
        (whole, _), (part, _) = run(x, keys), run(x[::-2], keys[::-2])
        np.testing.assert_allclose(part, whole[::-2], rtol=1e-5, atol=1e-6)

    def test_noise_is_fresh_in_every_step(self, x, keys):
        """x_s - slope·x_t is the noise drawn, up to a constant: uncorrelated between steps."""
        _, every = run(x, keys, num_snapshots=100)
        states = every.x[:-1, :, 0]
        slope = Paper(SHORT.betas).steps(SHORT.betas).slope[1:-1, None]
        drawn = states[1:] - slope * states[:-1]
        assert np.max(np.abs(np.corrcoef(drawn) - np.eye(98))) < 6 / np.sqrt(len(x))

    def test_snapshots(self, x, keys):
        """k evenly spaced states, the last the end, with the x̂_0 that each was reached by."""
        end, three = run(x, keys)
        _, every = run(x, keys, num_snapshots=100)
        np.testing.assert_array_equal(three.x[-1], end)
        for snapshots, all_steps in zip(three, every, strict=True):
            np.testing.assert_allclose(snapshots, all_steps[[33, 66, 99]], rtol=1e-5)
        predict = jax.jit(jax.vmap(lambda x, t: DENOISER(x, t, {}).x0))
        predicted = predict(every.x[:-1], SAMPLER.nodes.time[1:].astype(np.float32))
        np.testing.assert_allclose(every.x0[1:], predicted, rtol=1e-5, atol=1e-6)

    def test_more_snapshots_than_steps_is_an_error(self, x, keys):
        """Some would be left empty, the last among them."""
        with pytest.raises(ValueError, match="snapshots"):
            run(x, keys, num_snapshots=101)

    def test_new_parameters_do_not_recompile(self, x, keys):
        first, _ = run(x, keys)
        num_traces = len(TRACES)
        second, _ = run(x, keys, denoiser=GaussianDenoiser(10.0, VAR, SHORT))
        assert np.all(second > first)
        assert len(TRACES) == num_traces

    def test_memory_does_not_grow_with_steps(self):
        """Only the table of nodes grows: no trajectory is kept, with snapshots or without."""
        x, keys = jnp.zeros((4, 64, 64)), jax.random.split(jax.random.key(0), 4)

        def temporary_bytes(num_timesteps):
            chain = Chain(make_betas("linear", num_timesteps))
            sampler = ancestral(to_clean(chain, descending(num_timesteps)), "fixedsmall")
            draw = jax.jit(lambda d, x, keys: sample(sampler, d, x, keys, {}, num_snapshots=3))
            compiled = draw.lower(GaussianDenoiser(MEAN, VAR, chain), x, keys).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        table = 450 * 4 * (len(AncestralNode._fields) + 1)
        assert temporary_bytes(500) - temporary_bytes(50) <= table < x.nbytes
