"""A trained classifier as an instrument: what it computes, and what its record says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jax_ddpm
from jax_ddpm import factory
from jax_ddpm.errors import UserError
from jax_ddpm.inference.trained_classifier import TrainedClassifier, load_classifier
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.identity import save_identity
from jax_ddpm.training.loop import train

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

CONFIG = tiny.config(
    task="classification",
    data__flip=True,
    data__shift=1,
    model__base_channels=4,
    model__attention_resolutions=(),
    training__batch_size=32,
    training__num_steps=30,
    training__learning_rate=0.03,
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("classifier")
    train(CONFIG, workdir)
    return workdir


@pytest.fixture(scope="module")
def classifier(workdir):
    return load_classifier(workdir)


@pytest.fixture(scope="module")
def heldout():
    return factory.make_source(CONFIG).batch("heldout", np.arange(359))


def test_has_the_averaged_parameters(workdir, classifier):
    assert classifier.step == 30
    expected = checkpoint.restore_item(workdir, 30, "ema")["network"]
    jax.tree.map(np.testing.assert_array_equal, classifier.params, expected)


def test_accuracy_is_what_training_measured(workdir, classifier):
    """Counted anew, over the whole of the held-out split."""
    *_, last = (workdir / "metrics.jsonl").read_text().splitlines()
    logged = json.loads(last)["heldout_accuracy"]
    assert 0.1 < logged < 1
    assert classifier.accuracy["accuracy"] == pytest.approx(logged, abs=1e-6)
    assert classifier.accuracy["count"] == 359


def test_record_is_json_and_the_same_again(workdir, classifier):
    assert json.loads(json.dumps(classifier.record)) == load_classifier(workdir).record
    assert classifier.record["kind"] == "classifier"
    assert classifier.record["checkpoint_step"] == 30
    assert classifier.record["data"] == classifier.spec.identity


def test_images_are_at_the_levels_of_the_data(classifier, heldout):
    """0 and 16 are the ends of [-1, 1]."""
    params, levels = classifier.params, jnp.asarray(heldout["image"][:5])
    features, logits = jax.jit(classifier.apply)(params, levels)
    assert (features.shape, logits.shape) == ((5, 8), (5, 10))
    scaled = levels.astype("float32") / 8 - 1
    expected = jax.jit(classifier.model.network.apply)(params, scaled)
    np.testing.assert_allclose(features, expected[0], atol=1e-5)
    np.testing.assert_allclose(logits, expected[1], atol=1e-5)


class TestRefusals:
    """One line, naming the folder."""

    @staticmethod
    def refuses(load, workdir):
        with pytest.raises(UserError, match=f"workdir={workdir}") as caught:
            load(workdir)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_of_drawing_samples_from_a_classifier(self, workdir):
        assert "holds a classifier" in self.refuses(jax_ddpm.load, workdir)

    def test_of_a_diffusion_model(self, tmp_path):
        save_identity(tmp_path, tiny.config(), tiny.spec())
        with checkpoint.Checkpoints(tmp_path, keep_last=1, keep_every=0) as checkpoints:
            averages = {"network": {"gain": jnp.ones(1)}}
            checkpoints.save(1, {"ema": averages}, tiny.config(), {})
        assert "holds no classifier" in self.refuses(load_classifier, tmp_path)

    def test_of_one_that_has_diverged(self, classifier):
        """Of NaN, the first class is the largest."""
        broken = jax.tree.map(lambda x: np.full_like(x, np.nan), classifier.params)
        with pytest.raises(UserError, match="logits are not finite"):
            TrainedClassifier(
                classifier.config, classifier.spec, 4, broken, factory.make_source(CONFIG)
            )

    def test_of_a_run_without_checkpoints(self, tmp_path):
        save_identity(tmp_path, CONFIG, tiny.spec())
        assert "no checkpoint" in self.refuses(load_classifier, tmp_path)

    def test_of_other_data_than_it_was_trained_on(self, workdir, monkeypatch):
        source = factory.make_source(CONFIG)
        source.spec = source.spec._replace(identity="other digits")
        monkeypatch.setattr(factory, "make_source", lambda config: source)
        assert "other digits" in self.refuses(load_classifier, workdir)
