"""Frozen networks: a run reads those that it began with, by the fields of its config."""

import json

import pytest
import tiny

from jax_ddpm.errors import UserError
from jax_ddpm.models.network import Frozen
from jax_ddpm.runs import frozen
from jax_ddpm.runs.frozen import FrozenReader, save_frozen

CONFIG = tiny.config(init_from="donor")


@pytest.fixture
def hashes(monkeypatch):
    """The hash of the parameters that are read at each step."""
    found = {None: "new", 4: "old"}
    monkeypatch.setattr(
        frozen,
        "_read",
        lambda donor, step: Frozen({}, None, {"checkpoint_step": step or 8, "sha256": found[step]}),
    )
    monkeypatch.setattr(
        frozen.checkpoint,
        "steps",
        lambda folder: [4, 8] if folder.name == "donor" or (folder / "begun").exists() else [],
    )
    return found


def begun(workdir, records):
    (workdir / "begun").touch()
    save_frozen(workdir, records)


def test_a_new_run_reads_the_newest_and_notes_it(hashes, tmp_path):
    read = FrozenReader(CONFIG, tmp_path)
    assert read("init_from").record["sha256"] == "new"
    assert read.records == {"init_from": {"checkpoint_step": 8, "sha256": "new"}}


def test_one_that_goes_on_reads_that_of_then(hashes, tmp_path):
    begun(tmp_path, {"init_from": {"checkpoint_step": 4, "sha256": "old"}})
    assert FrozenReader(CONFIG, tmp_path)("init_from").record["sha256"] == "old"


def test_other_parameters_are_refused_whatever_the_recipe_calls_them(hashes, tmp_path):
    begun(tmp_path, {"init_from": {"checkpoint_step": 4, "sha256": "old"}})
    hashes[4] = "retrained"
    with pytest.raises(UserError, match=r"not the parameters that .* began with; bring them back"):
        FrozenReader(CONFIG, tmp_path)("init_from")
    with pytest.warns(UserWarning, match="going on with these"):
        FrozenReader(CONFIG, tmp_path, accept_changes=True)("init_from")


@pytest.mark.parametrize("text", [None, "{", "[]", json.dumps({"other": {}})])
def test_a_note_that_is_lost_is_not_passed_over(hashes, tmp_path, text):
    begun(tmp_path, {})
    if text is not None:
        (tmp_path / "frozen.json").write_text(text)
    with pytest.raises(UserError, match=r"frozen.json, .*, is missing or damaged; bring it back"):
        FrozenReader(CONFIG, tmp_path)("init_from")
    with pytest.warns(UserWarning, match="missing or damaged"):
        FrozenReader(CONFIG, tmp_path, accept_changes=True)("init_from")


def test_fields_that_hold_no_run_are_named(tmp_path):
    with pytest.raises(UserError, match=r"read of config.teacher: no such field"):
        FrozenReader(CONFIG, tmp_path)("teacher")
    with pytest.raises(
        UserError, match=r"^config.init_from is ''; it must be the workdir of a run"
    ):
        FrozenReader(tiny.config(), tmp_path)("init_from")
