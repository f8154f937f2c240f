"""A run's identity: kept beside it, and compared field by field when it goes on."""

import errno
import itertools
import json
import os
import pathlib

import pytest
import tiny

from jax_ddpm.config import default
from jax_ddpm.config.validation import validate
from jax_ddpm.data.source import Field, image_spec
from jax_ddpm.errors import UserError
from jax_ddpm.options import NAME_OR_NUMBER
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.identity import (
    differences,
    load_identity,
    require_same_run,
    save_identity,
    to_json,
)
from jax_ddpm.runs.manifest import sign


def flat(sections):
    return {
        f"{section}.{name}" if isinstance(fields, dict) else section: value
        for section, fields in sections.items()
        for name, value in (fields.items() if isinstance(fields, dict) else [(None, fields)])
    }


FIELDS = flat(default().to_dict())

# What may change while a run goes on: how long, how often and on what it runs. A new field is
# entered here if it has no meaning.
FREE = {
    "parallel",
    "fsdp",
    "deterministic",
    "data.path",
    "data.class_names",
    "data.resident_gigabytes",
    "model.remat",
    "training.num_steps",  # while the learning rate does not decay towards it
    "training.accumulate",
    "training.steps_per_dispatch",
    "training.log_every",
    "training.heldout_every",
    "training.heldout_examples",
    "training.sample_every",
    "training.checkpoint_every",
    "training.keep_last",
    "training.keep_every",
} | {f"sampling.{name}" for name in default().sampling}


def another(field):
    value = FIELDS[field]
    if value is None:  # a placeholder
        section, name = field.split(".")
        kind = default()[section].get_type(name)
        return "3" if kind is NAME_OR_NUMBER else kind(3)
    if field == "training.decay":
        return "cosine"
    if field == "modules":
        return ("json",)  # which is there to be imported
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return (*value, 4)
    return f"{value}_other"


def config_with(**fields):
    config = default()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def changed(field):
    return config_with(**{field: another(field)})


FLAT_SPEC = {
    "image_shape": (4, 4, 1),
    "num_levels": 17,
    "num_classes": 3,
    "split_sizes": {"train": 40, "heldout": 10},
    "identity": "tiny",
}

# A field of the spec, other data, and what is told of both.
OTHER_DATA = {
    "image_shape": ((4, 8, 1), "image", "4×4×1 of 17 values", "4×8×1 of 17 values"),
    "num_levels": (256, "image", "4×4×1 of 17 values", "4×4×1 of 256 values"),
    "num_classes": (0, "label", "one of 3 values", None),
    "split_sizes": ({"train": 41}, "split_sizes", {"train": 40, "heldout": 10}, {"train": 41}),
    "identity": ("other", "identity", "tiny", "other"),
}


class TestKeeping:
    def test_comes_back_equal(self, tmp_path):
        config = tiny.config(seed=3, process__name="jsd", model__channel_multipliers=(1, 2, 4))
        spec = tiny.spec((8, 16, 3), num_levels=256)
        save_identity(tmp_path, config, spec)
        stored_config, stored_spec = load_identity(tmp_path)
        assert stored_config.to_dict() == config.to_dict()
        assert stored_spec == spec
        assert isinstance(stored_config.model.channel_multipliers, tuple)
        assert isinstance(stored_spec.image_shape, tuple)

    def test_any_array_of_the_data_comes_back_equal(self, tmp_path):
        spec = tiny.spec()
        fields = {
            "label": Field((), "int32", 3, ("cat", "dog", "Käuzchen")),
            "tokens": Field((5,), "int32", 100),
            "size": Field((2,), "float32"),
        }
        spec = spec._replace(fields=spec.fields | fields)
        save_identity(tmp_path, tiny.config(), spec)
        assert load_identity(tmp_path)[1] == spec

    def test_of_before_contents_were_told_is_compared_by_names_and_sizes(self, tmp_path):
        spec = tiny.spec()._replace(identity="by contents", formerly="by sizes")
        old, other = spec._replace(identity="by sizes", formerly=""), spec._replace(formerly="")
        with pytest.warns(UserWarning, match="contents were the same cannot be known"):
            assert not differences((tiny.config(), old), (tiny.config(), spec))
        assert differences((tiny.config(), old), (tiny.config(), other))

    @pytest.mark.parametrize("num_classes", [0, 3])
    def test_data_noted_before_it_had_fields_is_read(self, tmp_path, num_classes):
        save_identity(tmp_path, tiny.config(), tiny.spec())
        stored = json.dumps(FLAT_SPEC | {"num_classes": num_classes})
        (tmp_path / "data.json").write_text(stored)
        assert load_identity(tmp_path)[1] == tiny.spec(num_classes=num_classes)

    @pytest.mark.parametrize("place", ["before", "label", "image", "split"])
    def test_numbers_that_are_missing_are_no_zeros(self, tmp_path, place):
        save_identity(tmp_path, tiny.config(), tiny.spec())
        stored = json.loads((tmp_path / "data.json").read_text())
        if place == "before":
            stored = FLAT_SPEC | {"num_classes": None}
        elif place == "split":
            stored["split_sizes"]["train"] = None
        else:
            stored["fields"][place]["num_values"] = None
        (tmp_path / "data.json").write_text(json.dumps(stored))
        with pytest.raises(UserError, match="is damaged"):
            load_identity(tmp_path)

    @pytest.mark.parametrize("field", FIELDS)
    def test_every_field_is_kept(self, tmp_path, field):
        save_identity(tmp_path, changed(field), tiny.spec())
        stored, _ = load_identity(tmp_path)
        assert flat(stored.to_dict()) == FIELDS | {field: another(field)}

    def test_a_config_gets_the_defaults_of_newer_fields(self, tmp_path):
        """Runs stay readable when a setting is added."""
        config = tiny.config()
        with config.unlocked():
            del config.training["accumulate"]
        save_identity(tmp_path, config, tiny.spec())
        stored, _ = load_identity(tmp_path)
        assert stored.training.accumulate == 1
        validate(stored, num_devices=1)

    def test_is_replaced(self, tmp_path):
        save_identity(tmp_path, tiny.config(seed=1), tiny.spec())
        save_identity(tmp_path, tiny.config(seed=2), tiny.spec(num_classes=9))
        config, spec = load_identity(tmp_path)
        assert (config.seed, spec.num_classes) == (2, 9)
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "data.json"}

    @pytest.mark.parametrize("moment", ["while writing", "before the rename"])
    def test_a_kill_leaves_the_old_one(self, tmp_path, monkeypatch, moment):
        """It does not stand in the way of the next one either."""

        class Killed(BaseException):
            pass

        def write_half(file):
            os.ftruncate(file, os.fstat(file).st_size // 2)
            raise Killed

        def do_not_replace(*_):
            raise Killed

        save_identity(tmp_path, tiny.config(seed=1), tiny.spec())
        with monkeypatch.context() as patch:
            if moment == "while writing":
                patch.setattr(os, "fsync", write_half)
            else:
                patch.setattr(pathlib.Path, "replace", do_not_replace)
            with pytest.raises(Killed):
                save_identity(tmp_path, tiny.config(seed=2), tiny.spec())
        assert load_identity(tmp_path)[0].seed == 1
        save_identity(tmp_path, tiny.config(seed=3), tiny.spec())
        assert load_identity(tmp_path)[0].seed == 3


class TestMistakes:
    def test_nothing_there_is_one_line_naming_the_workdir(self, tmp_path):
        with pytest.raises(UserError, match=f"--workdir={tmp_path}") as caught:
            load_identity(tmp_path)
        assert "\n" not in str(caught.value)

    DAMAGE = (
        *itertools.product(
            ("config.json", "data.json"),
            ("", "{", "[]", "null", "3", "\udcff{}"),
        ),
        ("config.json", '{"seed": "zero"}'),
        ("config.json", '{"model": []}'),
        ("data.json", '{"unknown": 1}'),
        ("data.json", "{}"),
        ("data.json", json.dumps(FLAT_SPEC | {"image_shape": [4, 4]})),
        ("data.json", json.dumps(FLAT_SPEC | {"image_shape": 4})),
        ("data.json", '{"fields": {}, "split_sizes": {}, "identity": ""}'),
        ("data.json", '{"fields": {"image": [4, 4, 1]}, "split_sizes": {}, "identity": ""}'),
    )

    @pytest.mark.parametrize(("file", "text"), DAMAGE)
    def test_damage_is_one_line_naming_the_files(self, tmp_path, file, text):
        save_identity(tmp_path, tiny.config(), tiny.spec())
        (tmp_path / file).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=f"--workdir={tmp_path}: .*{file}.*damaged") as caught:
            load_identity(tmp_path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("stored", "field"),
        [({"unknown": 1}, "unknown"), ({"model": {"base_chanels": 8}}, "model.base_chanels")],
    )
    def test_a_field_that_is_unknown_is_named(self, tmp_path, stored, field):
        save_identity(tmp_path, tiny.config(), tiny.spec())
        (tmp_path / "config.json").write_text(json.dumps(stored))
        with pytest.raises(UserError, match=f"config.json has {field}, which is unknown here"):
            load_identity(tmp_path)

    @pytest.mark.parametrize("file", ["config.json", "data.json"])
    def test_half_of_it_missing_is_one_line(self, tmp_path, file):
        save_identity(tmp_path, tiny.config(), tiny.spec())
        (tmp_path / file).unlink()
        with pytest.raises(UserError, match=f"--workdir={tmp_path}"):
            load_identity(tmp_path)


def keep_with_checkpoint(workdir, step, config, spec=None):
    """A checkpoint of nothing but its identity."""
    notes = {"config": json.loads(config.to_json())}
    notes |= {"data": to_json(spec)} if spec else {}
    folder = workdir / "checkpoints" / str(step)
    for name, note in notes.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "metadata").write_text(json.dumps(note))
    sign(folder)


class TestCheckpointsOwn:
    """What is hashed with the parameters decides over files that anyone may edit."""

    OTHER = tiny.config(process__num_timesteps=9)

    @pytest.fixture
    def workdir(self, tmp_path):
        save_identity(tmp_path, tiny.config(), tiny.spec())
        keep_with_checkpoint(tmp_path, 5, tiny.config(), tiny.spec())
        return tmp_path

    def decides(self, workdir, match):
        with pytest.warns(UserWarning, match=rf"{match}.*; checkpoint 5 decides$") as warned:
            config, spec = load_identity(workdir)
        assert config.to_dict() == tiny.config().to_dict()
        assert spec == tiny.spec()
        assert len(warned) == 1
        assert "\n" not in str(warned[0].message)

    def test_is_the_same_in_silence(self, workdir):
        assert load_identity(workdir)[1] == tiny.spec()
        assert load_identity(workdir, 5)[1] == tiny.spec()

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("parameterisation__target", "v"),
            ("process__num_timesteps", 9),
            ("sampling__clip", False),
            ("model__num_res_blocks", 2),
        ],
    )
    def test_decides_over_an_edited_config(self, workdir, field, value):
        save_identity(workdir, tiny.config(**{field: value}), tiny.spec())
        self.decides(workdir, rf"changed: {field.replace('__', '.')} .* → {value!r}")

    def test_decides_over_edited_data(self, workdir):
        save_identity(workdir, tiny.config(), tiny.spec((8, 8, 1)))
        self.decides(workdir, "changed: data set.image '4×4×1 of 17 values' → '8×8×1")

    @pytest.mark.parametrize("name", ["config.json", "data.json"])
    def test_is_there_where_a_file_is_not(self, workdir, name):
        (workdir / name).write_text("{")
        self.decides(workdir, f"{name}.* is damaged")
        (workdir / name).unlink()
        self.decides(workdir, f"{name} is missing")

    def test_is_each_checkpoints_own(self, workdir):
        keep_with_checkpoint(workdir, 7, self.OTHER, tiny.spec())
        save_identity(workdir, self.OTHER, tiny.spec())
        assert load_identity(workdir)[0].process.num_timesteps == 9
        with pytest.warns(UserWarning, match="num_timesteps 8 → 9; checkpoint 5 decides"):
            assert load_identity(workdir, 5)[0].process.num_timesteps == 8

    def test_is_refused_where_it_was_edited(self, workdir):
        note = workdir / "checkpoints" / "5" / "config" / "metadata"
        note.write_text(note.read_text().replace("8", "9"))
        with pytest.raises(UserError, match=r"checkpoint 5 in .*config/metadata has changed"):
            load_identity(workdir, 5)

    def test_needs_the_file_for_data_that_an_older_one_does_not_hold(self, workdir):
        keep_with_checkpoint(workdir, 7, tiny.config())
        assert load_identity(workdir)[1] == tiny.spec()

    def test_is_what_a_run_goes_on_from(self, workdir):
        save_identity(workdir, self.OTHER, tiny.spec())
        require_same_run(workdir, tiny.config(), tiny.spec())
        with pytest.raises(UserError, match=r"process.num_timesteps 8 → 9"):
            require_same_run(workdir, self.OTHER, tiny.spec())


class TestDifferences:
    def test_the_free_fields_are_fields(self):
        assert set(FIELDS) >= FREE

    @pytest.mark.parametrize("field", FIELDS)
    def test_each_field_is_free_or_told_with_both_values(self, field):
        old, new = (default(), tiny.spec()), (changed(field), tiny.spec())
        values = FIELDS[field], another(field)
        assert differences(old, new) == ({} if field in FREE else {field: values})
        assert differences(new, old) == ({} if field in FREE else {field: values[::-1]})
        assert differences(new, new) == {}

    def test_steps_have_meaning_where_the_rate_decays_towards_them(self):
        short, long = (
            (config_with(training__decay="cosine", training__num_steps=n), tiny.spec())
            for n in (100, 200)
        )
        assert differences(short, long) == {"training.num_steps": (100, 200)}
        constant = config_with(training__num_steps=200), tiny.spec()
        assert differences(short, constant) == {
            "training.decay": ("cosine", "constant"),
            "training.num_steps": (100, 200),
        }
        assert differences(constant, short).keys() == differences(short, constant).keys()

    @pytest.mark.parametrize("field", OTHER_DATA)
    def test_other_data_is_told(self, field):
        value, *told = OTHER_DATA[field]
        other = image_spec(**FLAT_SPEC | {field: value})
        (difference,) = differences((default(), tiny.spec()), (default(), other)).items()
        assert difference == (f"data set.{told[0]}", (told[1], told[2]))

    def test_another_array_beside_the_images_is_told(self):
        spec, tokens = tiny.spec(), Field((5,), "int32", 100)
        other = spec._replace(fields=spec.fields | {"tokens": tokens})
        told = differences((default(), spec), (default(), other))
        assert told == {"data set.tokens": (None, "5 of 100 values")}

    def test_names_and_the_kind_of_number_may_change(self):
        spec = tiny.spec()
        label = Field((), "int64", 3, ("cat", "dog", "owl"))
        named = spec._replace(fields=spec.fields | {"label": label})
        assert differences((default(), spec), (default(), named)) == {}

    def test_a_field_of_another_version_is_told(self):
        config = default()
        with config.unlocked():
            del config.model["dropout"]
        without, whole = (config, tiny.spec()), (default(), tiny.spec())
        assert differences(without, whole) == {"model.dropout": (None, 0.1)}
        assert differences(whole, without) == {"model.dropout": (0.1, None)}

    def test_being_stored_changes_nothing(self, tmp_path):
        config = config_with(seed=2**32 - 1, training__learning_rate=0.1 + 0.2)
        save_identity(tmp_path, config, tiny.spec())
        assert differences(load_identity(tmp_path), (config, tiny.spec())) == {}


class TestRequireSameRun:
    @pytest.fixture
    def workdir(self, tmp_path):
        """The workdir of a run with a checkpoint."""
        save_identity(tmp_path, tiny.config(), tiny.spec())
        keep_with_checkpoint(tmp_path, 5, tiny.config(), tiny.spec())
        return tmp_path

    OTHER = tiny.config(training__learning_rate=0.5, model__dropout=0.25)

    @pytest.mark.parametrize("state", ["new", "other", "damaged"])
    def test_where_there_is_no_checkpoint_any_run_may_start(self, tmp_path, state):
        """It was killed before its first; the line that a kill has cut in two says nothing."""
        (tmp_path / "checkpoints").mkdir()
        every = tiny.config().training.checkpoint_every
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": {2 * every}, "loss": 1}}\n{{"ste')
        if state == "other":
            save_identity(tmp_path, self.OTHER, tiny.spec())
        if state == "damaged":
            (tmp_path / "config.json").write_text("{")
        require_same_run(
            tmp_path / "new" if state == "new" else tmp_path, tiny.config(), tiny.spec()
        )

    @pytest.mark.parametrize("obstacle", ["file", "loop", "mode"])
    def test_a_folder_that_cannot_be_read_is_not_an_empty_one(self, workdir, monkeypatch, obstacle):
        folder = workdir / "checkpoints"
        if obstacle == "mode":  # which does not keep a test from reading that runs as root

            def listdir(path):
                raise PermissionError(errno.EACCES, "Permission denied", path)

            monkeypatch.setattr(os, "listdir", listdir)
        else:
            folder.rename(workdir / "moved")
            folder.touch() if obstacle == "file" else folder.symlink_to(folder)
        line = f"^--workdir={workdir}: .*cannot be read"
        for accept_changes in (False, True):
            with pytest.raises(UserError, match=line) as caught:
                require_same_run(workdir, tiny.config(), tiny.spec(), accept_changes)
            assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=line):
            checkpoint.choose_step(workdir, None, "ema")

    def test_passes_the_same_run_and_free_changes(self, workdir):
        require_same_run(workdir, tiny.config(), tiny.spec())
        fields = {field.replace(".", "__"): another(field) for field in FREE}
        require_same_run(workdir, tiny.config(**fields), tiny.spec())

    def test_refuses_a_change_in_one_line_with_both_values(self, workdir):
        with pytest.raises(UserError, match=f"--workdir={workdir}") as caught:
            require_same_run(workdir, self.OTHER, tiny.spec(num_classes=7))
        message = str(caught.value)
        assert "\n" not in message
        assert "training.learning_rate 0.0002 → 0.5" in message
        assert "model.dropout 0.1 → 0.25" in message
        assert "data set.label 'one of 3 values' → 'one of 7 values'" in message
        assert "--accept_changes" in message

    def test_goes_on_regardless_where_told_to(self, workdir):
        with pytest.warns(UserWarning, match=r"learning_rate 0\.0002 → 0\.5") as warned:
            require_same_run(workdir, self.OTHER, tiny.spec(), accept_changes=True)
        assert len(warned) == 1
        assert "\n" not in str(warned[0].message)

    def test_accepting_is_silent_where_nothing_changed(self, workdir):
        require_same_run(workdir, tiny.config(), tiny.spec(), accept_changes=True)

    def test_refuses_a_run_that_nothing_is_known_of(self, workdir):
        (workdir / "checkpoints" / "5" / "manifest.json").unlink()
        with (
            pytest.warns(UserWarning, match="checkpoint 5 is damaged"),
            pytest.raises(UserError, match=f"--workdir={workdir}: every checkpoint is damaged"),
        ):
            require_same_run(workdir, tiny.config(), tiny.spec())
