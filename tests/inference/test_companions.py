"""The companions of a sampled model: a classifier or a worse model that guides it."""

import dataclasses
import shutil
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jax_ddpm
from jax_ddpm import factory
from jax_ddpm.codecs.pixels import Pixels
from jax_ddpm.codecs.table import CODECS
from jax_ddpm.errors import UserError
from jax_ddpm.factory import Companions
from jax_ddpm.models.classifier import ResNet
from jax_ddpm.models.network import Network
from jax_ddpm.options import Option
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.checkpoint import Checkpoints
from jax_ddpm.runs.frozen import FrozenReader, save_frozen
from jax_ddpm.runs.identity import save_identity
from jax_ddpm.tasks.table import make_model
from jax_ddpm.training.state import TrainState, to_items

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

CLASSES = 10


def classify(params, x, dropout_keys=None, time=None):
    """The logits are projections of the image, the features the same."""
    logits = x.reshape(len(x), -1) @ params["weight"]
    return logits, logits


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """Networks of a few parameters, in place of the U-Net and of the classifier."""

    def make_network(module, x, *_):
        if not isinstance(module, ResNet):
            network = tiny.network(x.shape[-1])

            def apply(params, x, time, conditioning):
                return network.apply(params, x, time, {})  # as a U-Net without classes

            return network._replace(apply=apply)
        shape = x[0].size, module.num_classes
        return Network(lambda key: {"weight": jax.random.normal(key, shape) / 8}, classify)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "make_network", make_network)
        yield


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """``make(section__field=value)`` is the folder of a run on the digits, of two checkpoints."""

    def make(**fields):
        config = tiny.config(**fields)
        workdir = tmp_path_factory.mktemp("run")
        spec = factory.make_source(config).spec
        save_identity(workdir, config, spec)
        read = FrozenReader(config, workdir)
        params = make_model(config, spec, Companions(read)).network.init(jax.random.key(0))
        save_frozen(workdir, read.records)
        with Checkpoints(workdir, keep_last=2, keep_every=0) as checkpoints:
            for step, scale in ((1, 0.5), (2, 1.0)):
                network = {"network": jax.tree.map(lambda p, scale=scale: scale * p, params)}
                state = TrainState(np.int32(step), network, network, ({"mu": jnp.zeros(1)},), ())
                checkpoints.save(int(state.step), to_items(jax.device_put(state)), config, {})
                checkpoints.wait()
        return workdir

    return make


@pytest.fixture(scope="module")
def model(make):
    return make()


@pytest.fixture(scope="module")
def classifier(make):
    return make(task="noisy_classification")


def guided(model, guidance, guide, scale, **fields):
    return jax_ddpm.load(model, guidance=guidance, guide=str(guide), guidance_scale=scale, **fields)


class TestClassifier:
    @staticmethod
    def logit(classifier, images, label):
        """The logit of the class, by the classifier's newest parameters."""
        weight = checkpoint.restore_item(classifier, 2, "ema")["network"]["weight"]
        return (images.reshape(len(images), -1) / 127.5 - 1) @ weight[:, label]

    def test_draws_what_it_takes_for_the_class(self, model, classifier):
        """The model has no classes; a larger scale shows the class more."""
        for label in (0, 7):
            plain = jax_ddpm.load(model).sample(32)
            once, more = (
                guided(model, "classifier", classifier, scale).sample(32, label=label)
                for scale in (1.0, 4.0)
            )
            of_plain, of_once, of_more = (
                self.logit(classifier, x, label).mean() for x in (plain, once, more)
            )
            assert of_plain < of_once < of_more

    def test_gives_a_model_without_classes_those_of_the_classifier(self, model, classifier):
        run = guided(model, "classifier", classifier, 3.0)
        in_turn = run.sample(CLASSES)
        np.testing.assert_array_equal(run.sample(CLASSES, label=7)[7], in_turn[7])
        with pytest.raises(UserError, match=f"classes, 0 to {CLASSES - 1}"):
            run.sample(1, label=CLASSES)

    def test_scale_0_is_the_model_alone(self, model, classifier):
        run = guided(model, "classifier", classifier, 0.0)
        np.testing.assert_array_equal(run.sample(5), jax_ddpm.load(model).sample(5))


class TestAutoguidance:
    def test_scale_0_is_the_guide_and_1_the_model(self, model):
        guide = jax_ddpm.load(model, step=1).sample(5)
        plain = jax_ddpm.load(model).sample(5)
        assert np.any(guide != plain)
        for scale, expected in ((0.0, guide), (1.0, plain)):
            run = guided(model, "autoguidance", model, scale, guide_step=1)
            np.testing.assert_array_equal(run.sample(5), expected)

    def test_goes_beyond_the_model_away_from_the_guide(self, model):
        runs = [guided(model, "autoguidance", model, s, guide_step=1) for s in (1.0, 2.0, 4.0)]
        assert len({run.sample(5).tobytes() for run in runs}) == 3

    def test_by_the_model_itself_changes_nothing(self, model):
        run = guided(model, "autoguidance", model, 3.0)
        difference = run.sample(5).astype(int) - jax_ddpm.load(model).sample(5)
        assert np.all(np.abs(difference) <= 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """Pixels times a number that another run has learned."""

    factor: Any
    record: Any = dataclasses.field(metadata={"static": True})
    shape: Any = dataclasses.field(metadata={"static": True})
    num_levels: int = dataclasses.field(metadata={"static": True})
    bounded = False

    def with_levels(self, num_levels):
        return dataclasses.replace(self, num_levels=num_levels)

    def encode(self, batch, keys=None):
        return self.factor * Pixels(self.shape, self.num_levels).encode(batch)

    def decode(self, x):
        return Pixels(self.shape, 256).decode(x / self.factor)


def scaled(spec, read, coder: Annotated[str, Option("Workdir of the factor.", default="")]):
    frozen = read("model.coder")
    factor = jnp.exp(frozen.params["gain"])
    record = tuple(frozen.record.items())
    return Scaled(factor, record, spec.image_shape, spec.num_levels)


class TestCodecOfAnotherRun:
    @pytest.fixture
    def coder(self, model, tmp_path):
        return shutil.copytree(model, tmp_path / "coder")

    @pytest.fixture
    def coded(self, make, coder):
        dict.__setitem__(CODECS, "scaled", scaled)  # as a row of the project itself
        yield make(model__codec="scaled", model__coder=str(coder))
        del CODECS["scaled"]

    def test_is_read_where_its_model_is_sampled(self, coded, coder):
        run = jax_ddpm.load(coded)
        assert run.sample(3).shape == (3, 8, 8, 1)
        assert run.record["codec"]["sha256"] == jax_ddpm.load(coder).record["sha256"]

    def test_is_the_one_that_the_run_began_with(self, coded, coder):
        shutil.rmtree(coder / "checkpoints" / "2")
        with pytest.raises(UserError, match=r"^config.model.coder=.*: its checkpoint 2, .* gone"):
            jax_ddpm.load(coded)

    def test_belongs_to_a_guide_as_well(self, coded, model):
        guided(coded, "autoguidance", coded, 2.0, guide_step=1).sample(2)
        with pytest.raises(UserError, match=r"^config.sampling.guide=.*: its codec is .*pixels"):
            guided(coded, "autoguidance", model, 2.0)

    def test_is_refused_where_codes_have_another_shape(self, make, monkeypatch):
        def lying(spec, read):
            return dataclasses.replace(Pixels(spec.image_shape, 17), shape=(4, 4, 1))

        monkeypatch.setitem(CODECS, "lying", lying)
        with pytest.raises(UserError, match=r"encode gives its shape \(4, 4, 1\), not \(8, 8, 1\)"):
            make(model__codec="lying")


class TestFits:
    """A guide of another kind is refused in one line that names what differs."""

    def refused(self, model, guidance, guide, **fields):
        with pytest.raises(UserError) as caught:
            guided(model, guidance, guide, 2.0, **fields)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_of_another_task(self, make, model, classifier):
        clean = make(task="classification")
        assert "task is classification; needed" in self.refused(model, "classifier", clean)
        assert "task is noisy_classification" in self.refused(model, "autoguidance", classifier)

    def test_of_another_process(self, make, model):
        other = make(task="noisy_classification", process__num_timesteps=9)
        assert "process" in self.refused(model, "classifier", other)

    def test_without_a_run_or_the_checkpoint(self, model, tmp_path):
        assert str(tmp_path) in self.refused(model, "classifier", tmp_path)
        assert "checkpoints at 1, 2" in self.refused(model, "autoguidance", model, guide_step=3)


def test_the_record_tells_guides_apart(model, classifier):
    records = [jax_ddpm.load(model).record] + [
        guided(model, *guide, 1.0).record
        for guide in (("classifier", classifier), ("autoguidance", model))
    ]
    records.append(guided(model, "autoguidance", model, 1.0, guide_step=1).record)
    assert len({str(record) for record in records}) == 4
    assert len({record["sha256"] for record in records}) == 1
