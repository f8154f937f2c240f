"""What the quick tests leave out: the real network, compiled as users compile it."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny

from jax_ddpm import factory
from jax_ddpm.tasks.table import make_recipe
from jax_ddpm.training.compiled_step import compile_step
from jax_ddpm.training.layout import spread
from jax_ddpm.training.loop import train
from jax_ddpm.training.state import init_state

pytestmark = pytest.mark.slow
DIGITS = pathlib.Path(__file__).parents[2] / "configs" / "digits.py"


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Switched off here."""


def test_splitting_the_batch_changes_nothing(mesh_of):
    """Dropout inside the U-Net and convolutions split over devices included."""
    config = tiny.config(
        model__class_conditional=True, data__flip=True, training__learning_rate=1e-3
    )
    model = factory.Model(config, tiny.spec((8, 8, 1)))
    recipe = make_recipe(config, model)

    def run(accumulate, num_devices):
        mesh = mesh_of(num_devices)
        params = {"network": model.network.init(jax.random.key(0))}
        state = spread(init_state(recipe, params), mesh)
        step = compile_step(recipe._replace(accumulate=accumulate), state, mesh)
        for i in range(3):
            batches = jax.tree.map(lambda x: x[None], tiny.batch(model.spec, seed=i))
            state, metrics = step(state, batches, jax.random.key(1))
        return jax.device_get((state.params, metrics))

    (whole, metrics), (split, split_metrics) = run(1, 1), run(2, 4)
    # Adam turns round-off in gradients near 0 into steps of the size of the learning rate.
    moved = np.concatenate(
        [np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (whole, split)), strict=True)]
    )
    assert np.sqrt(np.mean(moved**2)) < 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), split_metrics, metrics)


def test_a_short_run_on_the_digits_beats_every_linear_denoiser(tmp_path):
    """The least ε-error of a linear x_t → ε̂ follows from the eigenvalues λ of the covariance:

    it is the mean of ᾱ·λ/(ᾱ·λ + 1 - ᾱ), 0.22 when averaged over t; predicting 0 gives 1.
    """
    spec = importlib.util.spec_from_file_location("digits_config", DIGITS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update_from_flattened_dict(
        {
            "training.num_steps": 150,
            "training.heldout_every": 150,
            "training.sample_every": 150,
            "sampling.num_samples": 4,
            "sampling.batch_size": 4,
        }
    )
    train(config, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    heldout_loss = json.loads(lines[-1])["heldout_loss"]

    source = factory.make_source(config)
    images = source.batch("train", np.arange(source.spec.split_sizes["train"]))["image"]
    eigenvalues = np.linalg.eigvalsh(np.cov(images.reshape(len(images), -1).T / 8))
    alpha_bar = factory.Model(config, source.spec).chain.alpha_bar[:, None]
    linear = np.mean(alpha_bar * eigenvalues / (alpha_bar * eigenvalues + 1 - alpha_bar))
    assert heldout_loss < 0.95 * linear
