"""The sampling driver: sample i is a function only of (parameters, seed, i, label)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jax_ddpm import generate
from jax_ddpm.conditions.label import with_label
from jax_ddpm.diffusion.process import per_example_normal
from jax_ddpm.diffusion.samplers.scan import Snapshots
from jax_ddpm.errors import UserError
from jax_ddpm.factory import Model
from jax_ddpm.generate import Diverged, Generator, require_finite
from jax_ddpm.keys import Stream, example_keys, stream_key
from jax_ddpm.models.network import Network
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.runtime.stopping import Stopped

SHAPE = (4, 4, 1)


quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)


@pytest.fixture(scope="module")
def model():
    """Conditional, over three classes."""
    return tiny.model(tiny.config(model__class_conditional=True), tiny.spec(SHAPE))


@pytest.fixture(scope="module")
def params(model):
    return model.network.init(jax.random.key(0))


def mesh(num_devices=1):
    return make_mesh(devices=jax.devices()[:num_devices])


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model, 4, mesh())


@pytest.fixture(scope="module")
def samples(generator, params):
    return generator(params, seed=0, num_samples=6)


def test_number_and_range(samples):
    assert samples.shape == (6, *SHAPE)
    assert np.abs(samples).max() <= 1, "the last step returns the clipped x_0"
    assert len(np.unique(samples.reshape(6, -1), axis=0)) == 6


@pytest.mark.parametrize(("batch_size", "num_devices"), [(2, 1), (5, 4)])
def test_depends_neither_on_batch_size_nor_on_devices(
    model, params, samples, batch_size, num_devices
):
    other = Generator(model, batch_size, mesh(num_devices))(params, seed=0, num_samples=6)
    np.testing.assert_allclose(other, samples, atol=1e-5)


def test_fewer_samples_are_the_first_ones(generator, params, samples):
    six, three = (generator(params, 0, count, {"label": 1}) for count in (6, 3))
    np.testing.assert_array_equal(three, six[:3])
    np.testing.assert_array_equal(samples[1::3], six[1::3])  # column 1 holds class 1


@pytest.mark.parametrize(("batch_size", "num_devices"), [(2, 1), (8, 4)])
def test_noise_is_keyed_by_seed_and_index(model, params, monkeypatch, batch_size, num_devices):
    """A sampler that returns what it is given shows it."""

    def unsampled(sampler, denoiser, x, keys, *_):
        return x, Snapshots(x[None], per_example_normal(keys, x)[None])

    monkeypatch.setattr(generate, "sample", unsampled)
    generator = Generator(model, batch_size, mesh(num_devices))
    for stream, seen in zip(
        (Stream.SAMPLE_PRIOR, Stream.SAMPLE_STEPS), generator.snapshots(params, 5, 6), strict=True
    ):
        keys = example_keys(stream_key(jax.random.key(5), stream), jnp.arange(6))
        expected = per_example_normal(keys, jnp.zeros((6, *SHAPE)))
        np.testing.assert_allclose(seen[0], expected, rtol=1e-6)


def test_seeds_differ(generator, params, samples):
    other = generator(params, seed=1, num_samples=6)
    assert np.all(np.any(other != samples, axis=(1, 2, 3)))


@pytest.mark.parametrize("label", [None, 2])
def test_labels_are_by_column_or_as_asked(label):
    """The samples of a "network" that predicts x_0 from the label alone show them."""
    fields = {"parameterisation__target": "x0", "model__class_conditional": True}
    model = tiny.model(tiny.config(**fields), tiny.spec(SHAPE))

    def apply(params, x, time, conditioning, dropout_keys=None):
        return 0 * x + tiny.per_example(conditioning["label"] / 4)

    model.network = Network(model.network.init, apply)
    generator = Generator(model, 4, mesh())
    assert generator.layout(7) == (3, ("0", "1", "2"))
    seen = 4 * generator({}, 0, 7, with_label(label))[:, 0, 0, 0]
    np.testing.assert_allclose(seen, [0, 1, 2, 0, 1, 2, 0] if label is None else [2] * 7, atol=1e-5)


@pytest.mark.parametrize("label", [None, 2])
def test_labels_are_those_of_the_samples_however_many(generator, label):
    index = np.array([5, 0, 10**6, 7], np.int32)
    labels = generator.asked(index, with_label(label))["label"]
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, [2, 0, 1, 1] if label is None else [2] * 4)


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_is_one_line(generator, params, label):
    with pytest.raises(UserError, match=rf"^--class={label}: .* 0 to 2$"):
        generator(params, 0, 4, {"label": label})


@pytest.fixture(scope="module")
def unconditional():
    return Generator(tiny.model(tiny.config(), tiny.spec(SHAPE, num_classes=0)), 4, mesh())


def test_label_for_an_unconditional_model_is_one_line(unconditional, params):
    with pytest.raises(UserError, match="--class=0: this model is told no class"):
        unconditional(params, 0, 4, {"label": 0})


def test_an_unconditional_model_has_no_labels(unconditional):
    assert unconditional.asked(np.arange(4, dtype=np.int32)) == {}


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (9, 3), (10, 4), (64, 8)])
def test_grids_without_classes_are_about_square(generator, unconditional, count, columns):
    assert unconditional.layout(count) == (columns, ())
    assert generator.layout(count, {"label": 1}) == (columns, ()), (
        "nor do those of one class differ"
    )


@pytest.mark.parametrize(("num_classes", "columns"), [(2, 2), (10, 10), (1000, 10)])
def test_grids_have_a_column_for_each_class_up_to_ten(num_classes, columns):
    data = tiny.spec(SHAPE, num_classes=num_classes)
    model = tiny.model(tiny.config(model__class_conditional=True), data)
    heads = () if num_classes > 10 else data.class_names
    assert Generator(model, 4, mesh()).layout(100) == (columns, heads)


class TestNotFinite:
    """Outputs that are not finite are no images; those that are not are named."""

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("part", ["x", "x0"])
    def test_examples_are_named_by_their_numbers(self, bad, part):
        moments = {"x": np.zeros((3, 4, *SHAPE)), "x0": np.zeros((3, 4, *SHAPE))}
        require_finite(moments, "samples", axis=1, first=8)
        moments[part][1, 2, 0, 0, 0] = bad
        moments[part][2, 3, 3, 3, 0] = bad
        with pytest.raises(Diverged, match=r"^samples are not finite: 10, 11; .*--checkpoint_step"):
            require_finite(moments, "samples", axis=1, first=8)

    def test_the_rest_of_many_is_counted(self):
        with pytest.raises(UserError, match="finite: 0, 1, 2, 3, 4 and 1,195 more;"):
            require_finite(np.full((1200, 2), np.nan), "samples")

    def test_states_that_are_whole_numbers_are(self):
        require_finite(np.zeros((2, 3), np.int32), "samples")

    def test_are_refused_batch_by_batch(self, generator, params, monkeypatch):
        run = generator._run

        def diverging(denoiser, key, index, asked):
            return jax.tree.map(
                lambda x: np.where(np.array(index)[:, None, None, None] == 9, np.nan, x),
                run(denoiser, key, index, asked),
            )

        monkeypatch.setattr(generator, "_run", diverging)
        assert len(generator(params, 0, 8)) == 8
        with pytest.raises(Diverged, match=r"^samples of seed 5 are not finite: 9;"):
            generator(params, 5, 12)


class TestDraw:
    def test_gives_the_batches_that_are_asked_for_in_that_order(self, generator, params, samples):
        wanted = [4, 0, 400]
        for start, (found, batch) in zip(
            wanted, generator.draw(params, 0, iter(wanted)), strict=True
        ):
            assert found == start
            assert batch.x.shape == batch.x0.shape == (1, 4, *SHAPE)
            known = samples[start : start + 4]
            np.testing.assert_allclose(batch.x[-1][: len(known)], known, atol=1e-5)

    @pytest.mark.parametrize("number", [0, 1, 2, 5])
    def test_dispatches_one_batch_ahead(self, generator, params, monkeypatch, number):
        """A batch is fetched when the next one is under way, but no more than that one."""
        run, get, events = generator._run, jax.device_get, []
        monkeypatch.setattr(generator, "_run", lambda *_: events.append("run") or run(*_))
        monkeypatch.setattr(jax, "device_get", lambda _: events.append("get") or get(_))
        starts = range(0, 4 * number, 4)
        for _ in generator.draw(params, 0, starts, poll=lambda: events.append("poll")):
            events.append("caller")
        first, fetch = ["poll", "run"], ["get", "caller"]
        ahead = [*first, *(number - 1) * [*first, *fetch], *fetch]
        assert events == (ahead if number else [])

    def test_takes_new_starts_only_as_it_goes(self, generator, params):
        taken = []
        starts = (taken.append(start) or start for start in range(0, 400, 4))
        batches = generator.draw(params, 0, starts)
        for seen in range(1, 4):
            next(batches)
            assert taken == [4 * i for i in range(seen + 1)]

    @pytest.mark.parametrize("polls", range(4))
    def test_stops_when_the_poll_says_so(self, generator, params, samples, polls):
        """It stops at any batch; none that it has given is wrong."""
        allowed, seen = iter(range(polls)), []

        def poll():
            if next(allowed, None) is None:
                raise Stopped("SIGTERM")

        batches = generator.draw(params, 0, range(0, 400, 4), poll=poll)
        with pytest.raises(Stopped):
            seen.extend(batches)
        assert [start for start, _ in seen] == [0, 4, 8][: len(seen)]
        for start, batch in seen:
            known = samples[start : start + 4]
            np.testing.assert_allclose(batch.x[-1][: len(known)], known, atol=1e-5)
        assert len(seen) in (polls, max(0, polls - 1))

    def test_refuses_unknown_classes_before_anything_runs(self, generator, params, monkeypatch):
        monkeypatch.setattr(generator, "_run", lambda *_: pytest.fail("drawn"))
        with pytest.raises(UserError, match="--class=3"):
            next(generator.draw(params, 0, [0], {"label": 3}))


class TestSnapshots:
    @pytest.fixture(scope="class")
    @staticmethod
    def snapshots(model, params):
        return Generator(model, 4, mesh(), num_snapshots=4).snapshots(params, 0, 6)

    def test_end_in_the_samples(self, snapshots, samples):
        x, x0 = snapshots
        assert x.shape == x0.shape == (4, 6, *SHAPE)
        np.testing.assert_allclose(x[-1], samples, atol=1e-5)
        np.testing.assert_allclose(x0[-1], samples, atol=1e-5)

    def test_hold_less_and_less_noise(self, snapshots):
        x, x0 = snapshots
        distance = np.sqrt(np.mean((x - x0) ** 2, axis=(1, 2, 3, 4)))
        assert np.all(np.diff(distance) < 0)


def test_new_parameters_seeds_and_labels_reuse_the_program(params):
    model, traces = tiny.model(tiny.config(model__class_conditional=True), tiny.spec(SHAPE)), []

    def apply(*args):
        traces.append(args)
        return tiny.apply(*args)

    model.network = Network(model.network.init, apply)
    generator = Generator(model, 4, mesh())
    first = generator(params, 0, 4)
    num_traces = len(traces)
    second = generator(jax.tree.map(lambda leaf: leaf + 1, params), 0, 7, {"label": 1})
    assert len(traces) == num_traces
    assert not np.allclose(first, second[:4])


class TestSteps:
    """``sampling.num_steps`` of the chain's T: evenly spaced, with both of its ends."""

    @staticmethod
    def times(num_timesteps, num_steps):
        fields = {
            "process__num_timesteps": num_timesteps,
            "sampling__num_steps": num_steps,
            "parameterisation__variance": "fixedsmall",
        }
        return tiny.model(tiny.config(**fields), tiny.spec(SHAPE)).sampler().nodes.time

    @staticmethod
    def check(times, num_timesteps, num_steps):
        assert len(times) == num_steps
        np.testing.assert_array_equal(times, np.round(times), "of the chain")
        assert times[0] == num_timesteps - 1
        if num_steps > 1:
            assert times[-1] == 0
            gap = (num_timesteps - 1) / (num_steps - 1)
            assert np.all(-np.diff(times) >= max(1, np.floor(gap)))
            assert np.all(-np.diff(times) <= np.ceil(gap))

    @pytest.mark.parametrize("num_timesteps", range(2, 61))
    def test_of_a_short_chain(self, num_timesteps):
        model = tiny.model(tiny.config(process__num_timesteps=num_timesteps), tiny.spec(SHAPE))
        for num_steps in range(1, num_timesteps + 1):
            model._sampling.num_steps = num_steps
            self.check(model.sampler().nodes.time, num_timesteps, num_steps)

    @pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 10, 50, 250, 333, 500, 501, 750, 998, 999])
    def test_of_the_papers_chain(self, num_steps):
        self.check(self.times(1000, num_steps), 1000, num_steps)

    @pytest.mark.parametrize("num_steps", [0, 8])
    def test_zero_is_all_of_them(self, num_steps):
        np.testing.assert_array_equal(self.times(8, num_steps), np.arange(7.0, -1, -1))


class TestGuidance:
    """Guidance with a tiny UNet whose parameters are all nonzero."""

    CONFIG = tiny.config(model__class_conditional=True, process__num_timesteps=3)

    @pytest.fixture(scope="class")
    @staticmethod
    def unet():
        return Model(TestGuidance.CONFIG, tiny.spec(SHAPE))

    @pytest.fixture(scope="class")
    @staticmethod
    def unet_params(unet):
        rng = np.random.default_rng(0)
        zeros = unet.network.init(jax.random.key(0))
        return jax.tree.map(lambda p: p + np.float32(0.1 * rng.normal(size=p.shape)), zeros)

    @staticmethod
    def model(scale):
        config = TestGuidance.CONFIG.copy_and_resolve_references()
        config.sampling.guidance_scale = scale
        return Model(config, tiny.spec(SHAPE))

    def draw(self, unet_params, scale, label=None):
        return Generator(self.model(scale), 4, mesh())(unet_params, 0, 4, with_label(label))

    def test_scale_1_draws_what_is_drawn_without_it(self, unet, unet_params):
        """The samples agree to the last bit, also with code that knows nothing of guidance."""
        np.testing.assert_array_equal(
            self.draw(unet_params, 1.0), Generator(unet, 4, mesh())(unet_params, 0, 4)
        )
        assert type(unet.guided_denoiser(unet_params)) is type(unet.denoiser(unet_params))

    @pytest.mark.slow
    @pytest.mark.parametrize("scale", [0.0, 2.0])
    def test_other_scales_follow_from_the_two_predictions(self, unet, unet_params, scale):
        """One prediction is told the label; the other, by the network's null label, none."""
        x = per_example_normal(jax.random.split(jax.random.key(1), 3), jnp.zeros((3, *SHAPE)))
        t, label = jnp.float32(1), jnp.array([2, 0, 1])
        null = {"label": label, "label_drop": jnp.ones(3, bool)}
        of_scale = self.model(scale)

        @jax.jit
        def predict(params):
            plain = unet.denoiser(params).denoiser
            guided = of_scale.guided_denoiser(params).denoiser
            given = {"label": label}
            return plain(x, t, given).eps, plain(x, t, null).eps, guided(x, t, given).eps

        conditional, unconditional, guided = predict(unet_params)
        assert np.all(np.abs(conditional - unconditional).max(axis=(1, 2, 3)) > 1e-3)
        expected = (1 - scale) * unconditional + scale * conditional
        np.testing.assert_allclose(guided, expected, atol=1e-5)

    @pytest.mark.slow
    def test_the_scale_of_the_config_is_that_of_the_samples(self, unet_params):
        """All of them differ; at 0 the label does not matter."""
        zero, half, one, two = (self.draw(unet_params, scale) for scale in (0.0, 0.5, 1.0, 2.0))
        assert len({x.tobytes() for x in (zero, half, one, two)}) == 4
        np.testing.assert_array_equal(self.draw(unet_params, 0.0, label=2), zero)
