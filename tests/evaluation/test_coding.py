"""Progressive coding: x_t of one forward trajectory, decoded where it is, drawn as it was."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser
from PIL import Image

from jax_ddpm import images
from jax_ddpm.codecs.pixels import PICTURES, Pixels
from jax_ddpm.data.source import ArraySource
from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.process import q_sample
from jax_ddpm.diffusion.schedules import make_betas
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.coding import (
    Sender,
    decoding_picture,
    draw_coding,
    interpolation_picture,
    progressive_decoding,
)
from jax_ddpm.inference.trained import Trained
from jax_ddpm.models.network import Network

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

CHAIN = Chain(make_betas("linear", 100))
DENOISER = GaussianDenoiser(0.3, 0.25, CHAIN)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def decode(x0, times, denoiser=DENOISER, seed=0, chain=CHAIN):
    run = jax.jit(partial(progressive_decoding, chain, times=np.array(times, float)))
    found = run(denoiser, x0, key=jax.random.key(seed), conditioning={})
    return jax.tree.map(np.asarray, found)


@pytest.mark.usefixtures("x64")
class TestProgressiveDecoding:
    """Moments in float64, over a key for each of many examples."""

    TIMES = (99, 60, 59, 20, 3, 0)
    COUNT = 40_000

    @pytest.fixture(scope="class")
    @staticmethod
    def noise():
        """(x_t - α_t·x_0)/σ_t of one example over many keys, by t, with x_0 = 0.7."""
        with jax.enable_x64(True):
            of = TestProgressiveDecoding
            xt, _ = decode(jnp.full((of.COUNT, 1), 0.7), of.TIMES)
            t = np.array(of.TIMES, float)
            return (xt[:, :, 0] - 0.7 * CHAIN.alpha(t)[:, None]) / CHAIN.sigma(t)[:, None]

    def test_marginals_are_those_of_the_forward_process(self, noise):
        np.testing.assert_allclose(noise.mean(axis=1), 0, atol=5 / np.sqrt(self.COUNT))
        np.testing.assert_allclose(noise.var(axis=1), 1, atol=5 * np.sqrt(2 / self.COUNT))

    def test_covariance_is_that_of_one_trajectory(self, noise):
        """Cov(x_t, x_s) = (α_t/α_s)·σ_s² for s < t, as x_t = (α_t/α_s)·x_s + independent noise."""
        t = np.array(self.TIMES, float)
        ratio = CHAIN.alpha(t) / CHAIN.sigma(t)
        expected = np.minimum(ratio[:, None] / ratio, ratio / ratio[:, None])
        np.testing.assert_allclose(np.cov(noise), expected, atol=6 / np.sqrt(self.COUNT))

    def test_is_markov(self, noise):
        """Given x_s, the x_t after it and the x_r before it are uncorrelated."""
        inverse = np.linalg.inv(np.cov(noise))
        scale = np.sqrt(np.diag(inverse))
        partial_correlation = -inverse / np.outer(scale, scale)
        far = np.abs(np.subtract.outer(np.arange(6), np.arange(6))) > 1
        assert np.max(np.abs(partial_correlation[far])) < 6 / np.sqrt(self.COUNT)

    def test_examples_and_pixels_have_noise_of_their_own(self):
        xt, _ = decode(jnp.full((30, 4, 5, 1), 0.7), self.TIMES)
        assert xt.shape == (6, 30, 4, 5, 1)
        for of_t in xt:
            assert len(np.unique(of_t)) == of_t.size

    def test_the_image_enters_by_alpha(self):
        """The difference of two images is that of their x_t, under one key."""
        x0 = jnp.linspace(-1, 1, 24).reshape(3, 8)
        xt, blank = (decode(image, self.TIMES)[0] for image in (x0, 0 * x0))
        alpha = CHAIN.alpha(np.array(self.TIMES, float))[:, None, None]
        np.testing.assert_allclose(xt - blank, alpha * np.asarray(x0), atol=1e-12)

    def test_x0_is_predicted_from_exactly_these_states_and_times(self):
        """The denoiser here depends on both, and on the conditioning."""
        x0 = jnp.linspace(-1, 1, 24).reshape(3, 8)
        given = {"label": jnp.array([2, 0, 1])}

        def denoiser(xt, t, conditioning):
            assert xt.dtype == t.dtype == x0.dtype
            shift = conditioning["label"].astype(xt.dtype)[:, None]
            prediction = DENOISER(xt, t, {})
            return prediction._replace(x0=prediction.x0 + shift + t / 7)

        run = jax.jit(
            lambda x0, key: progressive_decoding(
                CHAIN, denoiser, x0, np.array(self.TIMES, float), key, given
            )
        )
        xt, decoded = run(x0, jax.random.key(3))
        for x, found, t in zip(xt, decoded, self.TIMES, strict=True):
            expected = denoiser(x, jnp.asarray(float(t)), given).x0
            np.testing.assert_allclose(found, expected, atol=1e-12)

    def test_what_is_sent_does_not_depend_on_the_receiver(self):
        x0 = jnp.linspace(-1, 1, 24).reshape(3, 8)
        other = GaussianDenoiser(-0.5, 0.1, CHAIN)
        sent, found = zip(*(decode(x0, self.TIMES, d) for d in (DENOISER, other)), strict=True)
        np.testing.assert_array_equal(*sent)
        assert np.all(found[0] != found[1])

    def test_keys_decide(self):
        x0 = jnp.zeros((3, 8))
        one, again, other = (decode(x0, self.TIMES, seed=seed)[0] for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, again)
        assert np.all(one != other)

    @pytest.mark.parametrize("times", [(42,), (99, 98), tuple(range(99, -1, -1))], ids=len)
    def test_at_any_number_of_times(self, times):
        """It holds at a single time, and at every step, where x_{t-1} is nearly x_t."""
        xt, decoded = decode(jnp.full((2000, 1), 0.7), times)
        assert xt.shape == decoded.shape == (len(times), 2000, 1)
        t = np.array(times, float)
        noise = (xt[:, :, 0] - 0.7 * CHAIN.alpha(t)[:, None]) / CHAIN.sigma(t)[:, None]
        np.testing.assert_allclose(noise.var(axis=1), 1, atol=6 * np.sqrt(2 / 2000))

    def test_of_a_chain_that_ends_without_signal(self):
        """β_T = 1: the first state is noise and nothing else."""
        chain = Chain(make_betas("jsd", 20))
        x0 = jnp.linspace(-1, 1, 24).reshape(3, 8)
        denoiser = GaussianDenoiser(0.3, 0.25, chain)
        xt, decoded = decode(x0, (19, 10, 0), denoiser, chain=chain)
        blank, _ = decode(0 * x0, (19, 10, 0), denoiser, chain=chain)
        assert np.all(np.isfinite(xt))
        np.testing.assert_array_equal(xt[0], blank[0])
        np.testing.assert_allclose(decoded[0], 0.3)

    def test_the_sender_is_consistent(self):
        x0, eps = jnp.linspace(-1, 1, 48).reshape(2, 3, 8)
        xt = q_sample(CHAIN, x0, jnp.array(40.0), eps)
        prediction = Sender(x0, CHAIN)(xt, jnp.array(40.0), {})
        np.testing.assert_array_equal(prediction.x0, x0)
        np.testing.assert_allclose(prediction.eps, eps, atol=1e-12)


SHAPE = (4, 4, 1)


def make_source(labels, channels=1):
    rng = np.random.default_rng(0)
    shape = (len(labels), 4, 4, channels)
    batch = {"image": rng.integers(0, 17, shape, dtype=np.uint8)}
    if labels[0] is not None:
        batch["label"] = np.array(labels, np.int32)
    return ArraySource({"train": batch, "heldout": batch}, 17, "random")


def make_trained(source, apply=tiny.apply, **fields):
    settings = tiny.config(**({"process__num_timesteps": 16} | fields))
    network = Network(tiny.network(source.spec.image_shape[-1]).init, apply)
    trained = Trained(settings, source.spec, 0, "ema", network.init(jax.random.key(0)))
    trained.model.network = network
    return trained


def by_label(params, x, time, conditioning, dropout_keys=None):
    """A "network" whose x_0 is the label alone."""
    return 0 * x + tiny.per_example(conditioning["label"] / 4)


CONDITIONAL = {"parameterisation__target": "x0", "model__class_conditional": True}


@pytest.fixture(scope="module")
def source():
    return make_source([0, 1, 2, 0, 1, 2, 0, 1])


@pytest.fixture(scope="module")
def x0(source):
    levels = source.batch("heldout", np.arange(3))["image"]
    return Pixels((), 17).encode({"image": levels})


class TestDecodingPicture:
    @pytest.fixture(scope="class")
    @staticmethod
    def rows(source, x0):
        """Image, x_t or x_0, moment."""
        picture = decoding_picture(make_trained(source), x0, {})
        assert picture.shape == (3 * 2 * 13, *SHAPE)
        return picture.reshape(3, 2, 13, *SHAPE)

    def test_rows_end_in_the_image_itself(self, rows, x0):
        for row in (0, 1):
            np.testing.assert_array_equal(rows[:, row, -1], x0)

    def test_rows_begin_with_noise_and_end_with_little(self, rows, x0):
        """The first x_t is from t = T-1, the last from t = 0."""
        chain = make_trained(make_source([0, 1])).model.chain
        error = rows[:, 0, :12] - np.asarray(x0)[:, None]
        assert np.sqrt(np.mean(error[:, -1] ** 2)) < 2 * np.sqrt(chain.betas[0])
        assert np.abs(np.mean(rows[:, 0, 0] * np.asarray(x0))) < 0.3
        np.testing.assert_allclose(np.std(rows[:, 0, 0]), 1, atol=0.35)

    def test_decoded_are_predictions(self, rows):
        """They are in the range of images, as the model clips."""
        assert np.abs(rows[:, 1, :12]).max() <= 1
        assert np.abs(rows[:, 0, :12]).max() > 1

    def test_the_labels_are_those_of_the_images(self, source, x0):
        trained = make_trained(source, by_label, **CONDITIONAL)
        picture = decoding_picture(trained, x0, {"label": np.array([2, 0, 1], np.int32)})
        decoded = picture.reshape(3, 2, 13, *SHAPE)[:, 1, :12]
        for of_image, label in zip(decoded, (2, 0, 1), strict=True):
            np.testing.assert_allclose(of_image, label / 4, atol=1e-6)

    def test_again_it_is_the_same(self, rows, source, x0):
        again = decoding_picture(make_trained(source), x0, {})
        np.testing.assert_array_equal(again, rows.reshape(again.shape))


class TestInterpolationPicture:
    @pytest.mark.slow
    def test_four_rows_of_nine(self, source, x0):
        """t = T, ¾T, ½T, ¼T: ends ever nearer to the images, each end knowing one image alone."""
        trained = make_trained(source, process__num_timesteps=8)
        picture = interpolation_picture(trained, x0[:2], {})
        assert picture.shape == (4 * 9, *SHAPE)
        assert isinstance(picture, np.ndarray)
        changed = interpolation_picture(trained, jnp.stack([x0[0], x0[2]]), {})
        differs = np.any(changed != picture, axis=(1, 2, 3)).reshape(4, 9)
        assert not np.any(differs[:, 0])
        assert np.all(differs[1:, 1:])

    def test_the_coarsest_row_first(self, source, x0, monkeypatch):
        """The decoder returns the time that it starts from, which shows it."""
        starts = []

        def interpolate(sampler, denoiser, process, pair, weights, key, conditioning):
            starts.append(sampler.nodes.time)
            np.testing.assert_allclose(weights, np.arange(9) / 8)
            return jnp.zeros((9, *pair.shape[1:]))

        monkeypatch.setattr("jax_ddpm.evaluation.coding.interpolate", interpolate)
        interpolation_picture(make_trained(source), x0[:2], {})
        assert [times[0] for times in starts] == [15, 11, 7, 3]
        for times in starts:
            np.testing.assert_array_equal(times, np.arange(times[0], -1, -1))

    @pytest.mark.slow
    def test_all_are_of_the_class(self, source, x0):
        trained = make_trained(source, by_label, **CONDITIONAL)
        picture = interpolation_picture(trained, x0[:2], {"label": np.array([2], np.int32)})
        np.testing.assert_allclose(picture, 0.5, atol=1e-5)

    @pytest.mark.slow
    def test_of_the_shortest_chain(self, source, x0):
        trained = make_trained(source, process__num_timesteps=2)
        assert np.all(np.isfinite(interpolation_picture(trained, x0[:2], {})))


@pytest.fixture
def pairs(monkeypatch):
    """The pairs that are mixed, with nothing drawn, as that compiles four programs."""
    pairs = []

    def picture(trained, pair, conditioning):
        pairs.append(np.asarray(pair))
        return np.zeros((36, *pair.shape[1:]), np.float32)

    monkeypatch.setattr("jax_ddpm.evaluation.coding.interpolation_picture", picture)
    return pairs


def in_range(source):
    """All held-out images."""
    levels = source.batch("heldout", np.arange(source.spec.split_sizes["heldout"]))["image"]
    return np.asarray(Pixels((), 17).encode({"image": levels}))


class TestDrawCoding:
    @pytest.mark.slow
    def test_writes_both_files(self, source, tmp_path):
        draw_coding(make_trained(source), source, "heldout", tmp_path / "folder" / "run.1")
        names = sorted(path.name for path in (tmp_path / "folder").iterdir())
        assert names == ["run.1_decoding.png", "run.1_interpolation.png"]
        for name in names:
            with Image.open(tmp_path / "folder" / name) as image:
                assert image.format == "PNG"

    @pytest.mark.parametrize("num_timesteps", [2, 8, 12, 16])
    def test_a_row_of_the_picture_is_a_row_of_the_grid(
        self, source, pairs, tmp_path, num_timesteps
    ):
        """It holds for a chain of fewer than twelve moments too: the image itself ends each row."""
        trained = make_trained(source, process__num_timesteps=num_timesteps)
        draw_coding(trained, source, "heldout", tmp_path / "run")
        picture = images.load_png(tmp_path / "run_decoding.png")
        columns = min(num_timesteps, 12) + 1
        blank = images.grid(np.zeros((8 * columns, *SHAPE), np.uint8), columns)
        assert picture.shape == blank.shape

    def test_the_images_are_four_of_the_split(self, source, pairs, tmp_path):
        draw_coding(make_trained(source), source, "heldout", tmp_path / "run")
        picture, known = (
            images.load_png(tmp_path / "run_decoding.png"),
            PICTURES.decode(in_range(source)),
        )
        size, gap = 64, 4
        left = 12 * (size + gap) + gap
        ends = [
            picture[top : top + size : 16, left : left + size : 16]
            for top in range(gap, 8 * (size + gap), size + gap)
        ]
        for above, below in zip(ends[::2], ends[1::2], strict=True):
            np.testing.assert_array_equal(above, below)
            assert np.any(np.all(known == above[None], axis=(1, 2, 3)))
        assert len(np.unique(np.stack(ends).reshape(8, -1), axis=0)) == 4

    @pytest.mark.parametrize(
        "labels",
        [(1, 0, 0), (2, 0, 1, 1), (0, 1, 2, 2, 3), (0, 0), (None, None)],
        ids=str,
    )
    def test_the_pair_is_of_one_class_whichever_has_two(self, pairs, tmp_path, labels):
        """An image that is alone in its class, as with a thousand classes, is no obstacle."""
        source = make_source(labels)
        draw_coding(make_trained(source), source, "heldout", tmp_path / "run")
        (pair,) = pairs
        assert pair.shape == (2, *SHAPE)
        known = in_range(source)
        first, second = (int(np.all(known == x[None], axis=(1, 2, 3)).argmax()) for x in pair)
        assert first != second
        if labels[0] is not None:
            assert labels[first] == labels[second]

    def test_what_is_not_finite_is_not_drawn(self, source, pairs, tmp_path):
        trained = make_trained(source)
        trained.params = jax.tree.map(lambda x: np.full_like(x, np.nan), trained.params)
        with pytest.raises(
            UserError, match=r"^cells of the picture of decoding are not finite: 1[23]"
        ):
            draw_coding(trained, source, "heldout", tmp_path / "run")
        assert not [*tmp_path.iterdir()]

    def test_of_colour_images(self, tmp_path, pairs):
        source = make_source([None] * 5, channels=3)
        draw_coding(make_trained(source), source, "heldout", tmp_path / "run")
        assert images.load_png(tmp_path / "run_decoding.png").shape[-1] == 3
