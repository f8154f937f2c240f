"""The DDPM objective against its parts put together by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.stats import lognorm, norm

from jax_ddpm.diffusion.likelihood import variational_bound
from jax_ddpm.diffusion.time_sampling import Uniform
from jax_ddpm.keys import StepKeys, Stream

SIZE = 6


@pytest.fixture
def keys():
    return StepKeys(jax.random.key(3), jnp.array(5), jnp.arange(SIZE), SIZE)


@dataclasses.dataclass(frozen=True)
class Given(Uniform):
    """Times as given: a stub."""

    times: tuple[int, ...] = ()

    def draw(self, state, step, shared_key, keys, position):
        return jnp.array(self.times, jnp.float32), jnp.ones_like(position)


def output_is_parameter(params, x, time, conditioning, dropout_keys=None):
    """A "network" whose output is its parameter, whatever it is fed."""
    return params


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


def scaled(batch, num_levels):
    return np.asarray(batch["image"], "f") / (num_levels - 1) * 2 - 1


def time_and_noise_keys(keys, i):
    """The keys of example i in step 5, each from its own stream."""
    return (
        jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(keys.seed, stream), 5), i)
        for stream in (Stream.TIME, Stream.NOISE)
    )


def test_error_is_that_of_algorithm_1(make_setting, keys):
    """‖ε - network(√ᾱ·x_0 + √(1-ᾱ)·ε, 1000·t/T)‖², each ε and t from its own stream and index."""
    setting = make_setting(data__flip=False, model__class_conditional=False)
    params, batch = setting.model.network.init(jax.random.key(0)), tiny.batch(setting.spec, SIZE)
    measured = dataclasses.replace(setting.objective, augment=False)
    loss, _, _ = jax.jit(measured)(
        {"codec": tiny.CODEC, "network": params}, (), batch, keys, keys.step
    )

    num_timesteps = setting.config.process.num_timesteps
    steps = np.arange(num_timesteps + 1) / num_timesteps
    alpha_bar = np.cos((steps + 0.008) / 1.008 * np.pi / 2) ** 2  # Nichol & Dhariwal, eq. 17
    alpha_bar = np.cumprod(np.maximum(alpha_bar[1:] / alpha_bar[:-1], 0.001))
    for i, x0 in enumerate(scaled(batch, setting.spec.num_levels)):
        time_key, noise_key = time_and_noise_keys(keys, i)
        t = int(jax.random.randint(time_key, (), 0, num_timesteps))
        eps = np.asarray(jax.random.normal(noise_key, x0.shape))
        xt = np.sqrt(alpha_bar[t]) * x0 + np.sqrt(1 - alpha_bar[t]) * eps
        output = params["gain"] * np.cos(1000 / num_timesteps * t) * xt + params["bias"][0]
        np.testing.assert_allclose(loss[i], np.mean((eps - output) ** 2), rtol=1e-4)


def test_quarters_of_t_share_out_the_loss(make_setting, keys):
    sampler = Given(8, times=(0, 1, 2, 5, 7, 6))
    setting = make_setting(data__flip=False, model__class_conditional=False)
    objective = dataclasses.replace(setting.objective, time_sampler=sampler)
    params = {"codec": tiny.CODEC, "network": setting.model.network.init(jax.random.key(0))}
    batch = tiny.batch(setting.spec, SIZE)
    loss, metrics, _ = jax.jit(objective)(params, (), batch, keys, keys.step)
    sums = [(np.sum(values), np.sum(weights)) for values, weights in metrics.values()]
    loss = np.asarray(loss)
    assert list(metrics) == [f"loss_quarter{i}" for i in (1, 2, 3, 4)]
    expected = [(loss[:2].sum(), 2), (loss[2], 1), (loss[3], 1), (loss[4:].sum(), 2)]
    np.testing.assert_allclose(sums, expected, rtol=1e-6)


CONTINUOUS = {"model__class_conditional": False, "data__flip": False, "loss__weighting": "target"}
EDM = CONTINUOUS | {
    "process__name": "edm",
    "parameterisation__target": "edm",
    "parameterisation__normalise_input": True,
    "parameterisation__condition_on": "log_snr",
    "parameterisation__data_std": 0.6,
    "loss__time_sampler": "log_normal",
    "loss__time_mean": -1.2,
    "loss__time_std": 1.2,
}
FLOW = CONTINUOUS | {
    "process__name": "rectified_flow",
    "parameterisation__target": "velocity",
    "loss__time_sampler": "logit_normal",
    "loss__time_mean": 0.0,
    "loss__time_std": 1.0,
}


class TestContinuousTime:
    """Losses against the papers' own, in NumPy."""

    @staticmethod
    def losses(make_setting, keys, fields):
        setting = make_setting(**fields)
        params = setting.model.network.init(jax.random.key(0))
        batch = tiny.batch(setting.spec, SIZE)
        loss, _, _ = jax.jit(setting.objective)(
            {"codec": tiny.CODEC, "network": params}, (), batch, keys, keys.step
        )
        return params, scaled(batch, setting.spec.num_levels), loss

    @staticmethod
    def draws(keys, shape):
        """The quantile of each example's time, and its noise."""
        for i in range(SIZE):
            time_key, noise_key = time_and_noise_keys(keys, i)
            yield jax.random.uniform(time_key), np.asarray(jax.random.normal(noise_key, shape))

    def test_error_of_edm_is_the_papers(self, make_setting, keys):
        """λ(σ)·‖D(x_0 + n; σ) - x_0‖², n ~ N(0, σ²), log σ normal (Karras et al. 2022, table 1).

        With D = c_skip·x + c_out·F(c_in·x; c_noise), c_noise = 1000·¼·log σ here.
        """
        params, images, loss = self.losses(make_setting, keys, EDM)
        for i, (u, eps) in enumerate(self.draws(keys, images[0].shape)):
            sigma, std = lognorm(s=1.2, scale=np.exp(-1.2)).ppf(u), 0.6
            total = np.hypot(sigma, std)
            x = images[i] + sigma * eps
            output = params["gain"] * np.cos(250 * np.log(sigma)) * x / total + params["bias"][0]
            denoised = std**2 / total**2 * x + sigma * std / total * output
            weight = (total / (sigma * std)) ** 2
            expected = weight * np.mean((denoised - images[i]) ** 2)
            np.testing.assert_allclose(loss[i], expected, rtol=2e-3)

    def test_error_of_a_flow_is_flow_matching(self, make_setting, keys):
        """‖ε - x_0 - u(x_t, t)‖² at x_t = (1-t)·x_0 + t·ε, log(t/(1-t)) normal."""
        params, images, loss = self.losses(make_setting, keys, FLOW)
        for i, (u, eps) in enumerate(self.draws(keys, images[0].shape)):
            t = 1 / (1 + np.exp(-norm.ppf(u)))
            x = (1 - t) * images[i] + t * eps
            velocity = params["gain"] * np.cos(1000 * t) * x + params["bias"][0]
            expected = np.mean((eps - images[i] - velocity) ** 2)
            np.testing.assert_allclose(loss[i], expected, rtol=2e-3)

    @pytest.mark.parametrize(
        "fields",
        [
            EDM,
            FLOW,
            EDM | {"loss__time_sampler": "uniform"},
            FLOW | {"loss__time_sampler": "stratified"},
        ],
        ids=["log_normal", "logit_normal", "uniform", "stratified"],
    )
    def test_quarters_are_of_the_times_drawn_and_share_out_the_loss(self, make_setting, fields):
        """Each has a fourth of the examples, and every example is in one of them."""
        size = 2000
        setting = make_setting(**fields)
        keys = StepKeys(jax.random.key(3), jnp.array(5), jnp.arange(size), size)
        params = {"codec": tiny.CODEC, "network": setting.model.network.init(jax.random.key(0))}
        batch = tiny.batch(setting.spec, size)
        loss, metrics, _ = jax.jit(setting.objective)(params, (), batch, keys, keys.step)
        values, weights = map(np.stack, zip(*metrics.values(), strict=True))
        np.testing.assert_array_equal(weights.sum(axis=0), 1)
        np.testing.assert_allclose(values.sum(axis=0), loss, rtol=1e-6)
        standard_error = np.sqrt(0.25 * 0.75 / size)
        np.testing.assert_allclose(weights.mean(axis=1), 0.25, atol=5 * standard_error)

    @pytest.mark.parametrize("fields", [EDM, FLOW], ids=["edm", "rectified_flow"])
    def test_measuring_spreads_the_same_times_evenly(self, make_setting, keys, fields):
        """One in each sixth of their distribution, whichever step asks."""
        objective = make_setting(**fields).objective.measuring()
        seen = {}

        def spy(params, x, time, conditioning, dropout_keys=None):
            seen["time"] = time
            return x

        spying = dataclasses.replace(objective, apply=spy)
        batch = on_device(tiny.batch(tiny.spec(), SIZE))
        spying({"codec": tiny.CODEC, "network": ()}, (), batch, keys, keys.step)
        if fields is EDM:
            rank = norm(-1.2, 1.2).cdf(np.asarray(seen["time"]) / 250)
        else:
            t = np.asarray(seen["time"]) / 1000
            rank = norm.cdf(np.log(t / (1 - t)))
        np.testing.assert_array_equal(np.sort(np.floor(SIZE * rank)), np.arange(SIZE))


class TestSelfConditioning:
    """A "network" that answers by what it is told, and is asked twice, shows it."""

    size = 400

    @pytest.fixture
    def keys(self):
        return StepKeys(jax.random.key(3), jnp.array(5), jnp.arange(self.size), self.size)

    @staticmethod
    def answer(params, x, time, conditioning, dropout_keys=None):
        if "x0_estimate" not in conditioning:
            return params["first"] * x
        return params["second"] * x + params["told"] * conditioning["x0_estimate"]

    @pytest.fixture
    def objective(self, make_setting):
        setting = make_setting(model__self_condition=True, parameterisation__target="v")
        return dataclasses.replace(setting.objective, apply=self.answer)

    @pytest.fixture
    def batch(self):
        return on_device(tiny.batch(tiny.spec(), self.size))

    @pytest.fixture
    def asked(self, objective, batch, keys):
        """``asked(objective)`` is what the network is given each time, and its answers."""

        def asked(objective):
            @jax.jit
            def run(batch, keys):
                calls = []

                def spy(params, x, time, conditioning, dropout_keys=None):
                    output = self.answer(params, x, time, conditioning)
                    calls.append((dict(conditioning), x, output, dropout_keys))
                    return output

                spying = dataclasses.replace(objective, apply=spy)
                params = {"first": 0.5, "second": 0.7, "told": 0.3}
                spying({"codec": tiny.CODEC, "network": params}, (), batch, keys, keys.step)
                return calls

            return run(batch, keys)

        return asked

    def test_tells_half_of_the_examples_what_the_network_made_of_them(self, objective, asked):
        """x̂_0 = α·x_t - σ·v̂ (Salimans & Ho 2022) of the first answer; the others are told 0."""
        (first, x, _, _), (second, same_x, _, _) = asked(objective)
        assert "x0_estimate" not in first
        np.testing.assert_array_equal(x, same_x)
        told = np.asarray(second["x0_estimate"])
        silent = np.all(told == 0, axis=(1, 2, 3))
        assert abs(silent.mean() - 0.5) < 5 * np.sqrt(0.25 / self.size)
        # v̂ = x_t/2, so that x̂_0 is x_t times a number that t decides.
        ratio = told[~silent] / np.asarray(x)[~silent]
        np.testing.assert_allclose(ratio, ratio[:, :1, :1, :1] + 0 * ratio, rtol=1e-3)
        chain = objective.parameterisation.process
        known = chain.alpha(np.arange(8.0)) - 0.5 * chain.sigma(np.arange(8.0))
        nearest = np.min(np.abs(ratio[:, 0, 0, 0, None] - known), axis=1)
        assert np.all(nearest < 1e-4)

    def test_asks_twice_under_the_same_conditions(self, objective, asked):
        """The labels and which of them are dropped, and the keys of dropout."""
        (first, _, _, keys), (second, _, _, same_keys) = asked(objective)
        for name in ("label", "label_drop"):
            np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_array_equal(*map(jax.random.key_data, (keys, same_keys)))

    def test_tells_all_of_them_when_measuring(self, objective, asked):
        _, (second, _, _, _) = asked(objective.measuring())
        assert np.all(np.any(second["x0_estimate"] != 0, axis=(1, 2, 3)))

    def test_does_not_train_the_first_answer(self, objective, batch, keys):
        def loss(params):
            return jnp.mean(
                objective({"codec": tiny.CODEC, "network": params}, (), batch, keys, keys.step)[0]
            )

        params = {"first": jnp.array(0.5), "second": jnp.array(0.7), "told": jnp.array(0.3)}
        gradient = jax.jit(jax.grad(loss))(params)
        assert gradient["first"] == 0
        assert gradient["second"] != 0
        assert gradient["told"] != 0

    def test_does_not_depend_on_how_the_batch_is_split(self, objective, batch, keys):
        params = {"codec": tiny.CODEC, "network": {"first": 0.5, "second": 0.7, "told": 0.3}}

        @jax.jit
        def losses(batch, keys):
            return objective(params, (), batch, keys, keys.step)[0]

        part = jnp.array([399, 3, 250])
        of_part = losses(jax.tree.map(lambda leaf: leaf[part], batch), keys.take(part))
        np.testing.assert_allclose(of_part, losses(batch, keys)[part], rtol=1e-5)

    def test_is_left_out_by_default(self, make_setting, asked):
        objective = make_setting(parameterisation__target="v").objective
        assert len(asked(objective)) == 1


class TestHybrid:
    """The error trains the mean alone, bound_weight times the bound the variance alone."""

    @pytest.fixture
    def gradient(self, make_setting, keys):
        def gradient(**fields):
            setting = make_setting(
                model__class_conditional=False,
                data__flip=False,
                parameterisation__variance="learned_range",
                **fields,
            )
            objective = dataclasses.replace(setting.objective, apply=output_is_parameter)
            rng, batch = np.random.default_rng(0), on_device(tiny.batch(setting.spec, SIZE))
            output = jnp.asarray(rng.standard_normal((SIZE, 4, 4, 2)), jnp.float32)

            def total(output):
                loss, _, _ = objective(
                    {"codec": tiny.CODEC, "network": output}, (), batch, keys, keys.step
                )
                return loss.sum()

            return np.split(jax.jit(jax.grad(total))(output), 2, axis=-1)

        return gradient

    def test_mean_and_variance(self, gradient):
        mean, variance = gradient(loss__kind="hybrid", loss__bound_weight=0.25)
        mean_of_error, variance_of_error = gradient(loss__kind="error")
        _, variance_of_bound = gradient(loss__kind="bound")
        np.testing.assert_allclose(mean, mean_of_error, rtol=1e-6)
        assert not variance_of_error.any()
        np.testing.assert_allclose(variance, 0.25 * variance_of_bound, rtol=1e-5)
        assert np.all(np.abs(variance).max(axis=(1, 2, 3)) > 0)


def test_mean_of_the_bound_over_t_is_the_variational_bound(make_setting):
    """Both are in bits/dim, less L_T. An x̂_0 that ignores x_t makes every term free of noise."""
    setting = make_setting(
        model__class_conditional=False,
        data__flip=False,
        loss__kind="bound",
        parameterisation__target="x0",
        parameterisation__variance="fixedlarge",
    )
    model, num_timesteps = setting.model, setting.model.chain.num_timesteps
    images = np.repeat(tiny.batch(setting.spec, 1)["image"], num_timesteps, axis=0)
    x0_hat = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, images.shape), jnp.float32)[:1]
    x0_hat = jnp.repeat(x0_hat, num_timesteps, axis=0)

    objective = dataclasses.replace(
        setting.objective,
        apply=output_is_parameter,
        time_sampler=Given(num_timesteps, times=tuple(range(num_timesteps))),
    )
    index = jnp.arange(num_timesteps)
    keys = StepKeys(jax.random.key(0), jnp.array(0), index, num_timesteps)
    loss, _, _ = jax.jit(objective)(
        {"codec": tiny.CODEC, "network": x0_hat}, (), {"image": images}, keys, keys.step
    )

    model.network = model.network._replace(apply=output_is_parameter)
    bound = variational_bound(
        model.chain,
        model.denoiser(x0_hat, clip=False),
        jnp.asarray(scaled({"image": images}, setting.spec.num_levels)),
        jax.random.split(jax.random.key(1), num_timesteps),
        {},
        "fixedlarge",
        setting.spec.num_levels,
    )
    expected = (bound.total - bound.prior)[0] / np.log(2)
    np.testing.assert_allclose(loss.mean(), expected, rtol=1e-4)


class TestAugmentation:
    """A "network" that returns what it is told to look at shows it."""

    size = 400

    @pytest.fixture
    def keys(self):
        return StepKeys(jax.random.key(3), jnp.array(5), jnp.arange(self.size), self.size)

    def seen(self, objective, batch, keys):
        """The network's input, at t = 0 where hardly any noise is added."""

        @jax.jit
        def run(batch, keys):
            fed = {}

            def spy(params, x, time, conditioning, dropout_keys=None):
                fed.update(x=x, dropout_keys=dropout_keys, **conditioning)
                return x

            sampler = Given(8, times=(0,) * self.size)
            spying = dataclasses.replace(objective, apply=spy, time_sampler=sampler)
            spying({"codec": tiny.CODEC, "network": ()}, (), batch, keys, keys.step)
            return fed

        return run(batch, keys)

    @pytest.fixture
    def objective(self, make_setting):
        return make_setting(training__label_drop=0.3, process__num_timesteps=1000).objective

    @pytest.fixture
    def batch(self):
        """Images that are white on the left and black on the right."""
        images = np.broadcast_to(np.array([16, 16, 0, 0], np.uint8)[:, None], (self.size, 4, 4, 1))
        return {"image": images, "label": np.arange(self.size, dtype=np.int32) % 3}

    def test_flips_whole_images_of_half_the_examples(self, objective, batch, keys):
        sides = np.sign(self.seen(objective, batch, keys)["x"])
        straight = np.sign(scaled(batch, 17))
        flipped = np.array(
            [np.array_equal(a, b[:, ::-1]) for a, b in zip(sides, straight, strict=True)]
        )
        kept = np.array([np.array_equal(a, b) for a, b in zip(sides, straight, strict=True)])
        assert np.all(flipped ^ kept)
        assert abs(flipped.mean() - 0.5) < 5 * np.sqrt(0.25 / self.size)

    def test_drops_labels_at_their_rate(self, objective, batch, keys):
        fed = self.seen(objective, batch, keys)
        np.testing.assert_array_equal(fed["label"], batch["label"])
        standard_error = np.sqrt(0.3 * 0.7 / self.size)
        assert abs(fed["label_drop"].mean() - 0.3) < 5 * standard_error

    def test_measuring_switches_all_of_it_off(self, objective, batch, keys):
        fed = self.seen(dataclasses.replace(objective, augment=False), batch, keys)
        np.testing.assert_array_equal(np.sign(fed["x"]), np.sign(scaled(batch, 17)))
        assert fed["dropout_keys"] is None
        assert not np.any(fed.get("label_drop", False))

    def test_unconditional_models_see_no_label(self, make_setting, batch, keys):
        objective = make_setting(model__class_conditional=False).objective
        assert "label" not in self.seen(objective, batch, keys)
