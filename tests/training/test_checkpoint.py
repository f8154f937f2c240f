import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jax_ddpm.config import validate
from jax_ddpm.errors import UserError
from jax_ddpm.training import checkpoint


def test_restores_exactly_what_was_saved(tmp_path):
    rng = np.random.default_rng(0)
    layer = {"kernel": rng.standard_normal((3, 3, 2, 4)).astype("f"), "bias": np.zeros(4, "f")}
    items = {
        "params": {"network": {"conv": layer, "norm": {"scale": np.float32([1.0, np.pi])}}},
        "ema": {"network": {"conv": jax.tree.map(lambda leaf: -leaf, layer)}},
    }
    assert not checkpoint.exists(tmp_path)
    checkpoint.save(tmp_path, jax.tree.map(jnp.asarray, items))
    assert checkpoint.exists(tmp_path)
    restored = checkpoint.restore(tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(items)
    for (path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(items), strict=True
    ):
        assert isinstance(leaf, np.ndarray), path
        assert leaf.dtype == expected.dtype, path
        np.testing.assert_array_equal(leaf, expected)


def test_saves_under_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path.relative_to(tmp_path) / "runs" / "x"
    checkpoint.save(run, {"ema": {"network": jnp.ones(2)}})
    np.testing.assert_array_equal(checkpoint.restore(tmp_path / "runs/x")["ema"]["network"], 1)


def test_identity_comes_back_equal(tmp_path):
    config = tiny.config(seed=3, process__name="jsd", model__channel_multipliers=(1, 2, 4))
    spec = tiny.spec((8, 16, 3), num_levels=256)
    checkpoint.save_identity(tmp_path / "new" / "run", config, spec)
    stored_config, stored_spec = checkpoint.load_identity(tmp_path / "new" / "run")
    assert stored_config.to_dict() == config.to_dict()
    assert stored_spec == spec
    assert isinstance(stored_config.model.channel_multipliers, tuple)


def test_a_stored_config_gets_the_defaults_of_newer_fields(tmp_path):
    """Runs stay readable when a setting is added."""
    config = tiny.config()
    del config.training["accumulate"]
    checkpoint.save_identity(tmp_path, config, tiny.spec())
    stored, _ = checkpoint.load_identity(tmp_path)
    assert stored.training.accumulate == 1
    validate(stored, num_devices=1)


@pytest.mark.parametrize("read", [checkpoint.load_identity, checkpoint.restore])
def test_nothing_there_is_one_line_naming_the_workdir(tmp_path, read):
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_workdir_that_cannot_be_written_is_one_line_naming_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--workdir=.*file"):
        checkpoint.save_identity(tmp_path / "file" / "run", tiny.config(), tiny.spec())
