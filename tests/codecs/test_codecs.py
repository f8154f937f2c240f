"""Codecs: pixels, and toys of what is to come, a pyramid of resolutions and a frozen transform.

Under an orthogonal transform a Gaussian stays one, so that likelihoods and samples are known.
"""

import dataclasses
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jax_ddpm import factory
from jax_ddpm.codecs.codec import Codec
from jax_ddpm.codecs.pixels import PICTURES, Pixels
from jax_ddpm.codecs.table import CODECS
from jax_ddpm.config.validation import validate
from jax_ddpm.data.source import ArraySource
from jax_ddpm.diffusion.ode_likelihood import ode_log_likelihood
from jax_ddpm.diffusion.parameterisation import Prediction
from jax_ddpm.diffusion.process import expand
from jax_ddpm.diffusion.processes import make_process
from jax_ddpm.diffusion.samplers.ddim import ddim
from jax_ddpm.diffusion.samplers.grid import to_clean
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.diffusion.thresholding import ClippedDenoiser
from jax_ddpm.errors import UserError
from jax_ddpm.generate import Generator
from jax_ddpm.models.network import Frozen, Network
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.tasks.table import make_recipe
from jax_ddpm.training.compiled_step import compile_step
from jax_ddpm.training.heldout import HeldOut
from jax_ddpm.training.layout import spread
from jax_ddpm.training.state import init_state

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

SHAPE, LEVELS = (8, 8, 1), 17
SIZE = 64
ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))[0]


class TestPixels:
    @pytest.mark.parametrize("num_levels", [2, 17, 256])
    def test_span_minus_1_to_1_evenly(self, num_levels):
        found = Pixels((), num_levels).encode({"image": np.arange(num_levels, dtype=np.uint8)})
        np.testing.assert_allclose(found, np.linspace(-1, 1, num_levels), atol=1e-6)

    def test_all_256_come_back(self):
        levels = np.arange(256, dtype=np.uint8)
        np.testing.assert_array_equal(PICTURES.decode(PICTURES.encode({"image": levels})), levels)

    def test_rounds_to_the_nearest_and_clips(self):
        """Truncation would darken every image by half a level."""
        exact = np.array([-1.2, 0.0, 10.4, 10.6, 254.7, 255.0, 300.0, -1e9, 1e9])
        expected = [0, 0, 10, 11, 255, 255, 255, 0, 255]
        np.testing.assert_array_equal(PICTURES.decode(exact / 127.5 - 1), expected)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Pyramid:
    """An image and its 2×2 averages, flat, side by side."""

    shape: tuple[int, ...] = (SIZE + SIZE // 4,)
    num_levels: int = LEVELS
    bounded: ClassVar[bool] = True
    record: ClassVar[Any] = MappingProxyType({})

    def with_levels(self, num_levels):
        return dataclasses.replace(self, num_levels=num_levels)

    def encode(self, batch, keys=None):
        x = Pixels(SHAPE, self.num_levels).encode(batch)
        half = x.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4))
        return jnp.concatenate([x.reshape(len(x), -1), half.reshape(len(x), -1)], axis=1)

    def decode(self, x):
        return PICTURES.decode(x[:, :SIZE].reshape(-1, *SHAPE))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotated:
    """A frozen orthogonal matrix times the pixels: codes without bounds."""

    matrix: Any
    num_levels: int = dataclasses.field(default=LEVELS, metadata={"static": True})
    shape: ClassVar[tuple[int, ...]] = (SIZE,)
    bounded: ClassVar[bool] = False
    record: ClassVar[Any] = MappingProxyType({"sha256": "of the matrix"})

    def with_levels(self, num_levels):
        return dataclasses.replace(self, num_levels=num_levels)

    def encode(self, batch, keys=None):
        pixels = Pixels(SHAPE, self.num_levels).encode(batch).reshape(-1, SIZE)
        return pixels @ self.matrix.T

    def decode(self, x):
        return PICTURES.decode((np.asarray(x) @ np.asarray(self.matrix)).reshape(-1, *SHAPE))


CODECS_HERE = {
    "pixels": Pixels(SHAPE, LEVELS),
    "pyramid": Pyramid(),
    "rotated": Rotated(jnp.asarray(ROTATION, "f")),
}


@pytest.fixture
def batch():
    return tiny.batch(tiny.spec(SHAPE, LEVELS), 6)


@pytest.fixture(params=CODECS_HERE)
def codec(request):
    return CODECS_HERE[request.param]


def test_every_codec_keeps_the_contract(codec, batch):
    assert isinstance(codec, Codec)
    x = codec.encode(batch)
    assert x.shape == (6, *codec.shape)
    images = codec.decode(np.asarray(x))
    assert images.dtype == np.uint8
    assert np.abs(images - batch["image"] * (255 / 16)).max() <= 0.5 + 1e-4
    pictures = codec.with_levels(256)
    np.testing.assert_array_equal(pictures.decode(pictures.encode({"image": images})), images)
    if codec.bounded:
        assert np.abs(x).max() <= 1


@pytest.fixture
def chosen(monkeypatch, codec):
    """The codec as a row, which reads its matrix as the network of another run."""
    name = next(name for name, each in CODECS_HERE.items() if each is codec)

    def row(spec, read):
        return Rotated(read("judge").params) if name == "rotated" else codec

    if name != "pixels":
        monkeypatch.setitem(CODECS, name, row)
    return name


def flat_network(shape):
    """A few parameters, for x of any shape."""

    def apply(params, x, time, conditioning, dropout_keys=None):
        return params["gain"] * x + expand(jnp.cos(time), x) * params["bias"]

    def init(key):
        return {"gain": jnp.full((), 0.5), "bias": jnp.full((1, *shape), 0.1)}

    return Network(init, apply)


def make_model(monkeypatch, name, **fields):
    def read(field):
        return Frozen(jnp.asarray(ROTATION, "f"), None, {})

    monkeypatch.setattr(factory, "make_module", lambda *_, **__: None)
    monkeypatch.setattr(factory, "make_network", lambda _, x, *__: flat_network(x.shape[1:]))
    config = tiny.config(model__codec=name, training__batch_size=4, **fields)
    spec = tiny.spec(SHAPE, LEVELS)
    return config, factory.Model(config, spec, factory.Companions(read))


def test_training_sampling_and_the_held_out_loss_take_any_codec(monkeypatch, chosen, codec):
    """The loop's parts know images only through it; its parameters are arguments of the step."""
    config, model = make_model(monkeypatch, chosen)
    recipe, mesh = make_recipe(config, model), make_mesh()
    params = {"network": model.network.init(None)}
    state = spread(init_state(recipe, params), mesh)
    step = compile_step(recipe, state, mesh)
    sizes = [leaf.size for leaf in jax.tree.leaves(step.held.frozen)]
    assert sizes == ([SIZE**2] if chosen == "rotated" else [])
    data = tiny.batch(model.spec, 40)
    source = ArraySource({"train": data, "heldout": data}, LEVELS, "tiny")
    heldout = HeldOut(recipe, source, jax.random.key(0), mesh, 8, 8)
    before = heldout(state)["heldout_loss"]
    for i in range(2):
        batches = jax.tree.map(lambda x, i=i: x[None, 4 * i : 4 * i + 4], data)
        state, metrics = step(state, batches, jax.random.key(1))
        assert metrics["finite"][0] == 1
    assert heldout(state)["heldout_loss"] != before
    x = Generator(model, 4, mesh)(jax.device_get(state.params["network"]), 0, 4)
    assert x.shape == (4, *codec.shape)
    assert model.codec.decode(x).shape == (4, *SHAPE)


def test_only_bounded_codes_are_clipped(monkeypatch, chosen, codec):
    _, model = make_model(monkeypatch, chosen)
    for denoiser in (model.denoiser({}), model.guided_denoiser({})):
        assert isinstance(denoiser, ClippedDenoiser) == codec.bounded


def test_thresholds_need_bounds(monkeypatch):
    monkeypatch.setitem(CODECS, "rotated", lambda spec, read: CODECS_HERE["rotated"])
    with pytest.raises(UserError, match=r"^config.sampling.dynamic_threshold is 0.9; it must be 0"):
        make_model(monkeypatch, "rotated", sampling__dynamic_threshold=0.9)


def test_an_unknown_codec_is_refused():
    with pytest.raises(UserError, match=r"^config.model.codec is 'jpeg'; it must be one of pixels"):
        validate(tiny.config(model__codec="jpeg"), 1)


def test_images_that_a_network_does_not_take_are_refused(monkeypatch):
    """A flat pyramid is nothing that a U-Net could halve."""
    monkeypatch.setitem(CODECS, "pyramid", lambda spec, read: Pyramid())
    config = tiny.config(model__codec="pyramid")
    with pytest.raises(UserError, match=r"^config.model: this network takes images .* x is \[80\]"):
        factory.Model(config, tiny.spec(SHAPE, LEVELS))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The exact denoiser of Gaussian data whose covariance has these eigenvalues and -vectors."""

    mean: Any
    values: Any
    vectors: Any
    process: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, xt, t, conditioning):
        alpha, sigma = (expand(f(t), xt) for f in (self.process.alpha, self.process.sigma))
        shift = xt - alpha * self.mean[None]
        gain = alpha * self.values[None] / (alpha**2 * self.values[None] + sigma**2)
        x0 = self.mean[None] + (gain * (shift @ self.vectors)) @ self.vectors.T
        return Prediction(x0, (xt - alpha * x0) / sigma)


class TestRotatedGaussian:
    """The likelihood and the samples of a Gaussian in codes are exactly those in pixels."""

    @pytest.fixture(scope="class")
    @classmethod
    def both(cls):
        rng = np.random.default_rng(1)
        mean, values = rng.normal(size=SIZE), rng.uniform(0.01, 1, SIZE)
        vectors = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
        process = make_process("vp_linear")
        return process, [
            Gaussian(rotation @ mean, values, rotation @ vectors, process)
            for rotation in (np.eye(SIZE), ROTATION)
        ]

    def test_samples(self, both):
        """From the rotated noise DDIM draws the rotated sample, which decodes to the same image."""
        process, denoisers = both
        noise = np.random.default_rng(2).normal(size=(3, SIZE))
        sampler = ddim(to_clean(process, np.linspace(1, 1e-3, 20)))
        keys = jax.random.split(jax.random.key(0), 3)
        with jax.enable_x64(True):
            pixels, codes = (
                np.asarray(sample(sampler, denoiser, jnp.asarray(x), keys, {})[0])
                for denoiser, x in zip(denoisers, (noise, noise @ ROTATION.T), strict=True)
            )
        np.testing.assert_allclose(codes @ ROTATION, pixels, atol=1e-9)
        codec = Rotated(ROTATION)
        np.testing.assert_array_equal(
            codec.decode(codes), PICTURES.decode(pixels.reshape(-1, *SHAPE))
        )

    def test_likelihood(self, both):
        process, denoisers = both
        data = np.random.default_rng(3).normal(size=(2, SIZE))
        keys = jax.random.split(jax.random.key(0), 2)
        with jax.enable_x64(True):
            pixels, codes = (
                ode_log_likelihood(
                    process, denoiser, jnp.asarray(x), keys, {}, exact_trace=True
                ).log_p
                for denoiser, x in zip(denoisers, (data, data @ ROTATION.T), strict=True)
            )
        np.testing.assert_allclose(codes, pixels, rtol=1e-4)
