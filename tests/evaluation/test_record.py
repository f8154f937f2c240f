"""Records of results: what they hold, and that only what was measured alike is compared."""

import json
import platform
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation import record as module
from jax_ddpm.evaluation.record import compare, load_record, provenance, save_record, show

EXTRACTOR = {"name": "inception", "weights_sha256": "0f", "resize": "299"}
PROTOCOL = {
    "image_shape": [32, 32, 3],
    "num_images": 50_000,
    "extractor": EXTRACTOR,
    "reference": {"data": "cifar10", "split": "train", "count": 50_000},
}
BOUND = {
    "data": "cifar10",
    "split": "heldout",
    "num_examples": 10_000,
    "num_levels": 256,
    "given": None,
    "draws_per_term": 1,
}
KID = {"value": 0.0012, "standard_error": 0.0001}
RECORD = {
    "subject": {
        "parameters": "ema",
        "checkpoint_step": 800_000,
        "sampler": {"name": "ancestral", "num_steps": 1000},
        "seeds": [0],
    },
    "measured": {
        "fid": {"protocol": PROTOCOL, "result": {"value": 3.17}},
        "kid": {"protocol": PROTOCOL | {"kernel": "cubic"}, "result": KID},
        "bpd": {"protocol": BOUND, "result": {"value": 3.75, "standard_error": 0.01}},
    },
    "calibration": {},
    "provenance": {"command": "…", "seconds": 1.5},
}


@pytest.fixture
def write(tmp_path):
    """``write(name, change)``: a record, changed in place by a function."""

    def write(name, change=lambda record: None):
        record = json.loads(json.dumps(RECORD))  # shares nothing
        change(record)
        save_record(tmp_path / f"{name}.json", record)
        return tmp_path / f"{name}.json"

    return write


def leaves(tree, path=()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name)


def parent(tree, path):
    for name in path[:-1]:
        tree = tree[name]
    return tree


class TestProvenance:
    @pytest.fixture(scope="class")
    @staticmethod
    def found():
        return provenance(12.34)

    def test_says_where_and_with_what(self, found):
        assert found["seconds"] == 12.3
        assert found["python"] == platform.python_version()
        for name in ("jax", "jaxlib", "flax", "numpy"):
            assert found["packages"][name] == __import__(name).__version__
        assert found["random_numbers"] == "threefry2x32"
        assert found["device"] == f"{jax.device_count()} × {jax.devices()[0].device_kind}"
        assert found["command"] == shlex.join(["python", *sys.argv])
        assert found["date"].endswith("+00:00")

    @pytest.mark.parametrize("program", ["bin/jax_ddpm", "src/jax_ddpm/main.py"])
    def test_says_the_command_however_it_was_started(self, monkeypatch, program):
        monkeypatch.setattr(sys, "argv", [program, "--out=two words"])
        assert provenance(0.0)["command"] == "python -m jax_ddpm.main '--out=two words'"

    def test_names_the_random_numbers_in_force(self):
        with jax.default_prng_impl("rbg"):
            assert provenance(0.0)["random_numbers"] == "rbg"

    def test_is_json(self, found, tmp_path):
        save_record(tmp_path / "new" / "record.json", RECORD | {"provenance": found})
        assert load_record(tmp_path / "new" / "record.json") == RECORD | {"provenance": found}

    def checkout(self, folder, monkeypatch):
        """A repository of one commit that holds the module's file."""
        code = folder / "src" / "record.py"
        code.parent.mkdir(parents=True)
        code.write_text("")
        monkeypatch.setattr(module, "__file__", str(code))

        def git(*arguments):
            names = ["-c", "user.name=a", "-c", "user.email=a"]
            command = ["git", "-C", str(folder), *names, *arguments]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        git("init", "-q")
        git("add", ".")
        git("commit", "-q", "-m", "one")
        return git("rev-parse", "HEAD").strip()

    def test_names_the_commit_and_whether_it_was_changed(self, tmp_path, monkeypatch):
        commit = self.checkout(tmp_path, monkeypatch)
        assert provenance(0.0)["git"] == {"commit": commit, "dirty": False}
        (tmp_path / "src" / "record.py").write_text("changed")
        assert provenance(0.0)["git"] == {"commit": commit, "dirty": True}

    def test_results_beside_the_code_do_not_count(self, tmp_path, monkeypatch):
        self.checkout(tmp_path, monkeypatch)
        (tmp_path / "result.json").write_text("new")
        assert not provenance(0.0)["git"]["dirty"]

    def test_is_not_that_of_a_surrounding_checkout(self, tmp_path, monkeypatch):
        self.checkout(tmp_path, monkeypatch)
        installed = tmp_path / "venv" / "record.py"
        installed.parent.mkdir()
        installed.write_text("")
        monkeypatch.setattr(module, "__file__", str(installed))
        assert provenance(0.0)["git"] is None

    def test_outside_of_a_checkout_is_none(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "__file__", str(tmp_path / "record.py"))
        assert provenance(0.0)["git"] is None


def test_round_trip(write):
    assert load_record(write("a")) == RECORD


@pytest.mark.parametrize("bad", [float("nan"), np.float64("inf")])
def test_what_is_not_finite_is_not_written(write, tmp_path, bad):
    def change(record):
        record["measured"]["fid"]["result"] = {"value": bad}

    with pytest.raises(UserError, match=r"not written, for measured\.fid\.result\.value "):
        write("a", change)
    assert not [*tmp_path.iterdir()]


def test_numbers_of_numpy_become_json(write):
    def change(record):
        record["measured"]["fid"]["result"] = {"value": np.float64(3.5), "std": np.float64(0.25)}

    assert load_record(write("a", change))["measured"]["fid"]["result"] == {
        "value": 3.5,
        "std": 0.25,
    }


class TestCompare:
    @staticmethod
    def refuses(first, second):
        with pytest.raises(UserError) as caught:
            compare(first, second)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_shows_results_side_by_side_and_in_what_the_subjects_differ(self, write):
        def change(record):
            record["measured"]["fid"]["result"]["value"] = 4.5
            record["subject"]["sampler"]["num_steps"] = 50
            record["subject"]["label"] = "new"

        lines = [line.split() for line in compare(write("a"), write("b", change)).splitlines()]
        assert lines[0] == ["a", "b"]
        assert lines[1] == ["fid", "3.17", "4.5"]
        error = ["±", "0.01", "standard", "error"]
        assert lines[3] == ["bpd", "3.75", *error, "3.75", *error]
        assert lines[4:] == [["sampler.num_steps", "1000", "50"], ["label", "–", "new"]]

    def test_shows_only_what_is_shared(self, write):
        def change(record):
            del record["measured"]["fid"]
            record["measured"]["bpd"]["protocol"] = BOUND

        table = compare(write("a"), write("b", change))
        assert "fid" not in table
        assert "bpd" in table

    def test_of_the_same_is_results_alone(self, write):
        assert len(compare(write("a"), write("b")).splitlines()) == 4

    @pytest.mark.parametrize(
        ("metric", "path"),
        [
            (metric, path)
            for metric, measured in RECORD["measured"].items()
            for path in leaves(measured["protocol"])
        ],
        ids=lambda value: value if isinstance(value, str) else ".".join(value),
    )
    @pytest.mark.parametrize("kind", ["changed", "absent"])
    @pytest.mark.parametrize("which", ["first", "second"])
    def test_refuses_any_other_protocol(self, write, metric, path, kind, which):
        def change(record):
            place = parent(record["measured"][metric]["protocol"], path)
            if kind == "absent":
                del place[path[-1]]
            else:
                place[path[-1]] = "another"

        paths = [write("a"), write("b", change)]
        line = self.refuses(*(paths if which == "second" else paths[::-1]))
        assert metric in line
        assert f"{'.'.join(path)} is " in line
        assert all(str(path) in line for path in paths)

    @pytest.mark.parametrize("extra", [{"new": 1}, {"new": {"a": 1}}, {"new": None}, {"new": {}}])
    def test_refuses_another_field(self, write, extra):
        def change(record):
            record["measured"]["fid"]["protocol"] |= extra

        assert "new" in self.refuses(write("a"), write("b", change))

    def test_refuses_where_nothing_is_shared(self, write):
        def only(*names):
            def change(record):
                record["measured"] = {name: record["measured"][name] for name in names}

            return change

        line = self.refuses(write("a", only("fid", "kid")), write("b", only("bpd")))
        assert "fid, kid and bpd" in line

    def test_refuses_an_empty_one(self, write):
        self.refuses(write("a"), write("b", lambda record: record["measured"].clear()))


def without(name):
    return {field: value for field, value in RECORD.items() if field != name}


def with_fid(**changes):
    fid = RECORD["measured"]["fid"] | changes
    return RECORD | {"measured": {"fid": fid}}


NO_RECORDS = {
    "text": "no record",
    "list": [RECORD],
    "number": 3,
    "empty": {},
    "no_measured": without("measured"),
    "no_subject": without("subject"),
    "subject_is_text": RECORD | {"subject": "model"},
    "measured_is_list": RECORD | {"measured": ["fid"]},
    "measured_is_number": RECORD | {"measured": {"fid": 3.17}},
    "no_value": with_fid(result={}),
    "value_is_text": with_fid(result={"value": "3.17"}),
    "value_is_none": with_fid(result={"value": None}),
    "result_is_list": with_fid(result=[3.17]),
    "no_protocol": {"subject": {}, "measured": {"fid": {"result": {"value": 3.17}}}},
    "protocol_is_text": with_fid(protocol="usual"),
    "protocol_is_none": with_fid(protocol=None),
}


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("kind", NO_RECORDS)
def test_what_is_no_record_is_named(write, tmp_path, kind, which):
    path = tmp_path / "wrong.json"
    content = NO_RECORDS[kind]
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    pair = (path, write("a")) if which == "first" else (write("a"), path)
    with pytest.raises(UserError, match=r"wrong\.json: not a result record"):
        compare(*pair)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"PK\x03\x04"])
def test_other_files_are_named(write, tmp_path, content):
    path = tmp_path / "wrong.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"wrong\.json: not a result record"):
        compare(write("a"), path)


def test_shows_real_images_beside_the_samples():
    calibration = {
        "heldout": {"fid": {"value": 1.25}},
        "heldout + noise 8": {"fid": {"value": 9.5}},
    }
    lines = show(RECORD | {"calibration": calibration}).splitlines()
    assert lines[0].split() == ["result", "heldout", "heldout", "+", "noise", "8"]
    assert lines[1].split() == ["fid", "3.17", "1.25", "9.5"]
    assert lines[3].split() == ["bpd", "3.75", "±", "0.01", "standard", "error"]
