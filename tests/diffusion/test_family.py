"""Families of noise under one contract and one scan: the Gaussian, and a chain of two states.

Two equal bits, 1 with probability p, cost their entropy H where one of them is shown before the
other. Bits that are shown in one step are drawn, and paid for, apart from each other. A masked
chain of T steps shows both in one with probability 1/T.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser
from masked import MASK, Masked, TwinBits

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import edm, rectified_flow, ve, vp_cosine
from jax_ddpm.diffusion.denoiser import X0_ESTIMATE
from jax_ddpm.diffusion.family import Family, Gaussian
from jax_ddpm.diffusion.likelihood import variational_bound
from jax_ddpm.diffusion.process import noise_between
from jax_ddpm.diffusion.samplers.grid import to_clean
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.diffusion.samplers.table import SAMPLERS
from jax_ddpm.diffusion.schedules import make_betas
from jax_ddpm.errors import UserError

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

N, BITS = 20_000, TwinBits(0.3)
every_length = pytest.mark.parametrize("num_timesteps", [1, 4])


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(0), N)


@pytest.mark.parametrize("family", [Gaussian(edm()), Masked(8)], ids=["gaussian", "masked"])
def test_the_contract(family):
    assert isinstance(family, Family)


@pytest.mark.parametrize(
    ("family", "end", "x0"), [(Gaussian(edm()), 80.0, 0.5), (Masked(8), 8.0, 1)]
)
def test_nothing_is_left_of_the_data_at_the_end(family, end, x0, keys):
    xt, _ = family.corrupt(keys, jnp.full((N, 2), x0), jnp.full(N, end))
    left = family.prior(keys, (2,))
    assert (left.shape, left.dtype) == (xt.shape, xt.dtype)
    np.testing.assert_allclose(left.mean(), xt.mean(), atol=0.5 + 5 * left.std() / np.sqrt(2 * N))
    np.testing.assert_allclose(left.std(), xt.std(), rtol=0.03)


class TestMasked:
    @staticmethod
    def sampler(num_timesteps):
        return Masked.samplers["unmasking"].make(Masked(num_timesteps))

    def run(self, keys, num_timesteps, **options):
        sampler = self.sampler(num_timesteps)
        draw = jax.jit(partial(sample, sampler, BITS, conditioning={}, **options))
        return draw(x=sampler.start(keys, (2,)), keys=keys)

    @every_length
    def test_samples_are_those_of_the_exact_chain(self, keys, num_timesteps):
        x = np.asarray(self.run(keys, num_timesteps)[0])
        assert x.dtype == np.int32
        together, p = 1 / num_timesteps, BITS.p
        shares = {
            (0, 0): (1 - together) * (1 - p) + together * (1 - p) ** 2,
            (0, 1): together * p * (1 - p),
            (1, 0): together * p * (1 - p),
            (1, 1): (1 - together) * p + together * p**2,
        }
        for state, share in shares.items():
            found = np.mean(np.all(x == state, axis=1))
            np.testing.assert_allclose(found, share, atol=5 * np.sqrt(share / N))

    @every_length
    def test_bound_is_the_entropy_and_what_is_shown_together(self, keys, num_timesteps):
        x0 = BITS.draw(jax.random.key(1), N)
        total = jax.jit(partial(Masked(num_timesteps).bound, BITS))(x0, keys, {}).total
        expected = BITS.entropy * (1 + 1 / num_timesteps) / 2
        np.testing.assert_allclose(total.mean(), expected, atol=5 * total.std() / np.sqrt(N))

    def test_hides_a_share_of_t(self, keys):
        t = jnp.linspace(0, 8, N)
        xt, hidden = Masked(8).corrupt(keys, jnp.ones((N, 2), jnp.int32), t)
        np.testing.assert_array_equal(xt, np.where(hidden, MASK, 1))
        np.testing.assert_allclose(hidden.mean(), 0.5, atol=5 / np.sqrt(2 * N))
        assert not hidden[0].any()
        assert hidden[-1].all()

    def test_snapshots_show_states_of_what_is_hidden(self, keys):
        x, snapshots = self.run(keys[:100], 4, num_snapshots=4)
        np.testing.assert_array_equal(snapshots.x[-1], x)
        hidden = np.mean(snapshots.x == MASK, axis=(1, 2))
        assert np.all(np.diff(hidden) < 0)
        assert snapshots.x0.dtype == x.dtype
        assert np.all(snapshots.x0 < MASK)

    def test_columns_and_estimates_keep_their_kinds(self, keys):
        """Real numbers take the default precision beside states; numbers and truths stay."""
        sampler, seen = self.sampler(3), []

        def step(denoiser, x, node, carry, keys):
            seen.append([column.dtype for column in node])
            return sampler.step(denoiser, x, node, carry, keys)

        def denoiser(xt, t, conditioning):
            seen.append([t.dtype, conditioning[X0_ESTIMATE].dtype])
            return BITS(xt, t, {})

        spied, few = sampler._replace(step=step), keys[:2]
        sample(spied, denoiser, sampler.start(few, (2,)), few, {}, self_condition=True)
        assert seen[:2] == [[jnp.int32, jnp.float32, jnp.bool_], [jnp.int32, jnp.int32]]


class TestGaussian:
    chain = Chain(make_betas("linear", 20))

    def test_corrupts_by_the_noise_that_it_tells(self, keys):
        x0, t = jnp.zeros((3, 2)) + 0.5, jnp.array([0.0, 5.0, 19.0])
        xt, eps = Gaussian(self.chain).corrupt(keys[:3], x0, t)
        np.testing.assert_allclose(noise_between(self.chain, x0, xt, t), eps, rtol=1e-4)

    def test_bound_is_that_of_its_chain(self, keys):
        x0 = jnp.linspace(-1, 1, 3)[:, None]
        denoiser = GaussianDenoiser(0.0, 0.5, self.chain)

        @jax.jit
        def both(*given):
            of_family = Gaussian(self.chain, "fixedlarge", 3).bound(denoiser, *given)
            return of_family, variational_bound(self.chain, denoiser, *given, "fixedlarge", 3)

        jax.tree.map(np.testing.assert_array_equal, *both(x0, keys[:3], {}))

    def test_has_no_bound_in_continuous_time(self, keys):
        denoiser = GaussianDenoiser(0.0, 0.5, edm())
        with pytest.raises(UserError, match="no chain"):
            Gaussian(edm()).bound(denoiser, jnp.zeros((3, 2)), keys[:3], {})

    @pytest.mark.parametrize("name", SAMPLERS)
    @pytest.mark.parametrize(
        ("process", "times", "std"),
        [
            (edm(), (80.0, 4.0, 1.0), 80.0),
            (edm(), (9.0, 4.0, 1.0), 9.0),
            (ve(0.01, 100.0), (0.5, 0.2), 1.0),
            (rectified_flow(), (0.75, 0.5), 0.75),
            (vp_cosine(), (0.75, 0.5), 1.0),
        ],
    )
    def test_every_sampler_starts_from_the_noise_of_its_first_time(
        self, name, process, times, std, keys
    ):
        grid = to_clean(process, np.array(times))
        options = {"variance": "fixedsmall"} if name == "ancestral" else {}
        sampler = Gaussian(process).samplers[name].make(grid, **options)
        found = sampler.start(keys[:5], (2, 3))
        unit = jax.vmap(lambda key: jax.random.normal(key, (2, 3)))(keys[:5])
        np.testing.assert_allclose(found, std * unit, rtol=1e-6)

    def test_few_steps_from_below_the_end_keep_the_datas_width(self, keys):
        process = edm()
        sampler = SAMPLERS["ddim"].make(to_clean(process, np.array([10.0, 1.0, 0.1, 0.01])))
        denoiser = GaussianDenoiser(0.0, 0.75**2, process)
        x = sample(sampler, denoiser, sampler.start(keys, (2,)), keys, {})[0]
        # Each Euler step of σ: std of x times (v + σ'·σ)/(v + σ²), with the variance v.
        width, v = 10.0, 0.75**2
        for now, after in ((10, 1), (1, 0.1), (0.1, 0.01), (0.01, 0)):
            width *= (v + now * after) / (v + now**2)
        np.testing.assert_allclose(x.std(), width, rtol=0.02)
        assert width == pytest.approx(0.436, abs=0.003)  # 3.49 from the noise of 80
