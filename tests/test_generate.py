"""The sampling driver: sample i is a function of (parameters, seed, i, label) and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

from jax_ddpm import generate
from jax_ddpm.diffusion.process import per_example_normal
from jax_ddpm.diffusion.samplers.loop import Snapshots
from jax_ddpm.errors import UserError
from jax_ddpm.generate import Generator
from jax_ddpm.keys import Stream, example_keys, stream_key
from jax_ddpm.models.network import Network

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
    return Mesh(np.array(jax.devices()[:num_devices]), ("data",))


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
    label = 1
    six, three = (generator(params, 0, count, label) for count in (6, 3))
    np.testing.assert_array_equal(three, six[:3])
    np.testing.assert_array_equal(samples[1::3], six[1::3])  # column 1 holds class 1


@pytest.mark.parametrize(("batch_size", "num_devices"), [(2, 1), (8, 4)])
def test_noise_is_keyed_by_seed_and_index(model, params, monkeypatch, batch_size, num_devices):
    """Seen with a sampler that returns what it is given."""

    def unsampled(sampler, denoiser, x, keys, conditioning, num_snapshots):
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
    """Read off the samples of a "network" that predicts x_0 from the label alone."""
    fields = {"parameterisation__target": "x0", "model__class_conditional": True}
    model = tiny.model(tiny.config(**fields), tiny.spec(SHAPE))

    def apply(params, x, time, conditioning, dropout_keys=None):
        return 0 * x + tiny.per_example(conditioning["label"] / 4)

    model.network = Network(model.network.init, apply)
    generator = Generator(model, 4, mesh())
    assert generator.columns(7) == 3
    seen = 4 * generator({}, 0, 7, label)[:, 0, 0, 0]
    np.testing.assert_allclose(seen, [0, 1, 2, 0, 1, 2, 0] if label is None else [2] * 7, atol=1e-5)


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_is_one_line(generator, params, label):
    with pytest.raises(UserError, match=rf"^--class={label}: .* 0 to 2$"):
        generator(params, 0, 4, label)


@pytest.fixture(scope="module")
def unconditional():
    return Generator(tiny.model(tiny.config(), tiny.spec(SHAPE, num_classes=0)), 4, mesh())


def test_label_for_an_unconditional_model_is_one_line(unconditional, params):
    with pytest.raises(UserError, match="--class=0: this model has no classes"):
        unconditional(params, 0, 4, label=0)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (9, 3), (10, 4), (64, 8)])
def test_grids_without_classes_are_about_square(unconditional, count, columns):
    assert unconditional.columns(count) == columns


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
    second = generator(jax.tree.map(lambda leaf: leaf + 1, params), 0, 7, label=1)
    assert len(traces) == num_traces
    assert not np.allclose(first, second[:4])
