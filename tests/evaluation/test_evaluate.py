"""Evaluations: one record says all, and one that is killed anywhere ends like one left alone."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jax_ddpm.data.source import ArraySource
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation import quality
from jax_ddpm.evaluation.evaluate import evaluate
from jax_ddpm.evaluation.extractors import make_extractor
from jax_ddpm.evaluation.features import Extractor
from jax_ddpm.evaluation.quality import Evaluation
from jax_ddpm.evaluation.record import compare, load_record
from jax_ddpm.inference.trained import Trained
from jax_ddpm.runtime.stopping import Stopped

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

LEVELS, WIDTH, N, SIZE = 17, 5, 22, 16
WEIGHTS = np.random.default_rng(0).integers(-2, 3, (16, WIDTH)).astype(np.float32)
QUALITY = ["fid", "kid", "is", "prdc", "memorisation", "agreement"]
EXTRACTOR = {"name": "classifier", "sha256": "0f"}


class Killed(BaseException):
    """Caught as little as SIGKILL."""


def project(params, images):
    features = images.reshape(len(images), -1).astype(jnp.float32) @ params / 100
    return features, features[:, :3]


@pytest.fixture(autouse=True)
def extractor(monkeypatch):
    """Stands in for a classifier's run."""
    found = Extractor("classifier", project, WEIGHTS, EXTRACTOR)
    monkeypatch.setattr(quality, "make_extractor", lambda choice, shape: found)


@pytest.fixture(scope="module")
def source():
    spec = tiny.spec((4, 4, 1), LEVELS)
    splits = {"train": tiny.batch(spec, 40, 0), "heldout": tiny.batch(spec, 32, 1)}
    return ArraySource(splits, LEVELS, "tiny")


@pytest.fixture(scope="module")
def trained(source):
    config = tiny.config(model__class_conditional=True)
    params = jax.device_get(tiny.network(1, 3).init(jax.random.key(0)))
    result = Trained(config, source.spec, 4, "ema", params)
    result.model = tiny.model(config, source.spec)
    return result


@pytest.fixture
def what(source, trained, tmp_path):
    def what(cache="cache", **changes):
        usual = {"trained": trained, "source": source, "num_samples": N, "batch_size": SIZE}
        return Evaluation(**{"cache": tmp_path / cache} | usual | changes)

    return what


@pytest.fixture
def npz(trained, tmp_path):
    """``npz(name, seed)``: samples in a file."""

    def npz(name="file.npz", seed=0):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(tmp_path / name, images=trained.sample(N, seed=seed))
        return tmp_path / name

    return npz


def unfailing(record):
    """The record without what may differ from time to time."""
    return {name: part for name, part in record.items() if name != "provenance"}


class TestRecord:
    @pytest.fixture(scope="class")
    @staticmethod
    def record(source, trained, tmp_path_factory):
        folder = tmp_path_factory.mktemp("record")
        with pytest.MonkeyPatch.context() as patch:
            found = Extractor("classifier", project, WEIGHTS, EXTRACTOR)
            patch.setattr(quality, "make_extractor", lambda choice, shape: found)
            what = Evaluation(
                folder / "cache", trained, source, num_samples=N, seeds=(5, 6), batch_size=SIZE
            )
            path, _ = evaluate(what, ["bpd", *QUALITY], folder)
        return json.loads(path.read_text())

    def test_names_the_model(self, record, trained):
        subject = record["subject"]
        assert subject.items() >= json.loads(json.dumps(trained.record)).items()
        assert subject["parameters"] == "ema"
        assert subject["checkpoint_step"] == 4
        assert (subject["sampler"], subject["num_steps"]) == ("ancestral", 8)
        assert subject["seeds"] == [5, 6]
        assert subject["config"] == json.loads(json.dumps(trained.config.to_dict()))
        assert len(subject["config_sha256"]) == 64

    def test_says_how_it_was_measured(self, record):
        for name, found in record["measured"].items():
            protocol = found["protocol"]
            assert np.isfinite(found["result"]["value"])
            if name == "bpd":
                assert protocol["data"] == "tiny"
                assert protocol["split"] == "heldout"
                assert protocol["num_examples"] == 32
            else:
                assert protocol["num_images"] == N
                assert protocol["extractor"] == EXTRACTOR
        assert {"fd/classifier", "kd/classifier", "agreement", "bpd"} <= record["measured"].keys()

    def test_shows_the_spread_over_seeds(self, record):
        result = record["measured"]["fd/classifier"]["result"]
        each = [seed["value"] for seed in result["per_seed"]]
        assert len(each) == 2
        assert result["value"] == pytest.approx(np.mean(each))
        assert result["std"] == pytest.approx(abs(each[0] - each[1]) / 2**0.5)

    def test_says_where(self, record):
        names = {"command", "seconds", "git", "packages", "random_numbers", "device"}
        assert record["provenance"].keys() >= names


def test_files_beside_it(what, tmp_path):
    report = evaluate(what(), ["bpd", "memorisation"], tmp_path / "folder")
    path = report.path
    assert path.parent == tmp_path / "folder"
    assert path.name.startswith("bpd-memorisation_")
    names = {file.name.removeprefix(path.stem) for file in path.parent.iterdir()}
    assert names == {".json", ".csv", ".png", "_nearest.png"}
    assert str(report).splitlines()[1].startswith("bpd")
    assert str(report).endswith(f"\n{path}")
    assert load_record(path) == json.loads(json.dumps(report.record))


def test_again_is_the_same_file(what, tmp_path):
    first, _ = evaluate(what(), QUALITY, tmp_path)
    content = load_record(first)
    second, _ = evaluate(what(cache="new"), QUALITY, tmp_path)
    assert second == first
    assert unfailing(load_record(second)) == unfailing(content)
    table = compare(first, second)
    assert len(table.splitlines()) == 1 + len(content["measured"])


@pytest.mark.parametrize(
    "other",
    [
        {"num_samples": N + 1},
        {"seeds": (1,)},
        {"seeds": (0, 1)},
        {"reference": "heldout"},
        {"calibrate": True},
    ],
)
def test_what_differs_lies_in_another_file(what, tmp_path, other):
    """One evaluation never replaces what another found."""
    first, _ = evaluate(what(), ["fid"], tmp_path)
    second, _ = evaluate(what(**other), ["fid"], tmp_path)
    assert first != second or load_record(first)["measured"] == load_record(second)["measured"]


class TestOfFiles:
    def test_the_subject_is_their_content(self, what, npz, tmp_path):
        """Files of one name in two folders are two things."""
        paths = [npz(f"{seed}/samples.npz", seed) for seed in (0, 1)]
        first, second = (
            evaluate(what(samples=path, trained=None), ["fid"], tmp_path)[0] for path in paths
        )
        assert first != second
        assert load_record(first)["subject"] != load_record(second)["subject"]

    def test_need_no_data_for_what_compares_with_none(self, what, npz, tmp_path):
        given = what(samples=npz(), trained=None, source=None)
        path, _ = evaluate(given, ["is"], tmp_path)
        assert [*load_record(path)["measured"]] == ["is/classifier"]

    @pytest.mark.parametrize("metric", ["bpd", "coding"])
    def test_are_no_model(self, what, npz, tmp_path, metric):
        given = what(samples=npz(), trained=None)
        with pytest.raises(UserError, match=f"--metrics={metric} measures a model"):
            evaluate(given, [metric], tmp_path)

    def test_beside_a_model_do_not_hide_it(self, what, npz, tmp_path):
        """The bits/dim of a model are never recorded as those of some images."""
        with pytest.raises(UserError, match="--samples"):
            evaluate(what(samples=npz()), ["bpd"], tmp_path)


class TestOut:
    def test_is_where_it_is_written(self, what, tmp_path):
        out = tmp_path / "new" / "mine.json"
        path, _ = evaluate(what(), ["bpd"], tmp_path, out)
        assert path == out
        assert {file.name for file in out.parent.iterdir()} == {"mine.json", "mine.csv", "mine.png"}

    def test_dots_in_names_keep_curves_apart(self, what, tmp_path):
        for name in ("lr0.1.json", "lr0.2.json"):
            evaluate(what(), ["bpd"], tmp_path, tmp_path / "out" / name)
        assert len([*(tmp_path / "out").glob("*.csv")]) == 2

    @pytest.mark.parametrize("other", ["metrics", "subject", "num_examples", "text", "record"])
    def test_is_written_over_by_the_same_request_alone(self, what, tmp_path, other, monkeypatch):
        out = tmp_path / "mine.json"
        first = evaluate(what(), ["bpd"], tmp_path, out).record
        assert unfailing(evaluate(what(), ["bpd"], tmp_path, out).record) == unfailing(first)
        if other in ("text", "record"):
            without = {name: part for name, part in first.items() if name != "request"}
            out.write_text("mine" if other == "text" else json.dumps(without))
        changes = {"num_examples": {"num_examples": 9}, "subject": {"seeds": (1,)}}.get(other, {})
        metrics = ["nll"] if other == "metrics" else ["bpd"]
        before = out.read_bytes()
        monkeypatch.setattr("jax_ddpm.evaluation.evaluate.measure_bound", pytest.fail)
        with pytest.raises(UserError, match=rf"^--out={out} (was made with {other}|exists alr)"):
            evaluate(what(**changes), metrics, tmp_path, out)
        assert out.read_bytes() == before

    @pytest.mark.parametrize(
        "name", ["mine.png", "mine_nearest.png", "mine_decoding.png", "mine.csv"]
    )
    def test_leaves_files_of_others_beside_it_alone(self, what, tmp_path, name):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=rf"mine\.json: .*{name} lies beside it; give another"):
            evaluate(what(), ["bpd"], tmp_path, tmp_path / "mine.json")
        assert (tmp_path / name).read_text() == "mine"

    def test_curves_without_their_record_are_those_of_a_killed_evaluation(self, what, tmp_path):
        out = tmp_path / "mine.json"
        evaluate(what(), ["bpd", "memorisation"], tmp_path, out)
        before = {path.name: path.read_bytes() for path in tmp_path.glob("mine*.*g")}
        assert len(before) == 2
        out.unlink()
        evaluate(what(), ["bpd", "memorisation"], tmp_path, out)
        assert {path.name: path.read_bytes() for path in tmp_path.glob("mine*.*g")} == before

    @pytest.mark.parametrize("name", ["folder.json", "file/mine.json"])
    def test_that_cannot_be_written_is_refused_first(self, what, tmp_path, name):
        (tmp_path / "folder.json").mkdir()
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=rf"--out=.*{name}: .*(is a folder|cannot be written)"):
            evaluate(what(), ["bpd"], tmp_path, tmp_path / name)
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("name", ["mine.png", "mine.csv", "mine.npz", "mine"])
    def test_of_another_kind_is_refused(self, what, tmp_path, name):
        """A record would replace its own curve."""
        with pytest.raises(UserError, match=f"--out=.*{name}"):
            evaluate(what(), ["bpd"], tmp_path, tmp_path / name)


class TestRefusals:
    """Refusals come before anything is computed."""

    @pytest.mark.parametrize(
        ("metrics", "changes", "named"),
        [
            ([], {}, "--metrics is missing"),
            (["fdi"], {}, "--metrics=fdi"),
            (["fid", ""], {}, "--metrics="),
            (["fid"], {"num_samples": None}, "--num_samples is missing"),
            (["fid"], {"source": None}, "--reference is missing"),
            (["fid"], {"source": None, "reference": "heldout"}, "--reference is missing"),
            (["is"], {"source": None, "calibrate": True}, "--calibrate"),
            (["memorisation"], {"reference": "heldout"}, "--metrics=memorisation"),
            (["fid"], {"num_samples": WIDTH}, "too few for a covariance"),
        ],
    )
    def test_in_one_line(self, what, tmp_path, metrics, changes, named):
        with pytest.raises(UserError) as caught:
            evaluate(what(**changes), metrics, tmp_path / "folder")
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "folder").exists()
        computed = [path.read_text() for path in tmp_path.glob("cache/*/identity.json")]
        assert not [text for text in computed if '"computes": "samples"' in text]

    def test_gray_images_without_an_extractor(self):
        with pytest.raises(UserError, match="--extractor is missing: gray images"):
            make_extractor(None, (8, 8, 1))

    def test_unknown_extractors(self, tmp_path):
        with pytest.raises(UserError, match="--extractor=vgg"):
            make_extractor("vgg", (8, 8, 3))
        (tmp_path / "weights.pth").write_text("no weights")
        with pytest.raises(UserError, match=r"weights\.pth"):
            make_extractor(str(tmp_path / "weights.pth"), (8, 8, 3))


class TestKilled:
    """A small evaluation writes about two dozen parts."""

    @pytest.fixture
    def replaced(self, monkeypatch):
        """The files put in place whole; a number of further files before death, if set."""
        replace, state = pathlib.Path.replace, {"left": None, "parts": []}

        def watched(path, target):
            if state["left"] == 0:
                raise Killed
            if state["left"]:
                state["left"] -= 1
            if target.suffix == ".npz":
                state["parts"].append(target.relative_to(target.parents[1]))
            return replace(path, target)

        monkeypatch.setattr(pathlib.Path, "replace", watched)
        return state

    GIVEN = {"seeds": (0, 1), "calibrate": True}  # noqa: RUF012

    def test_at_any_file_ends_like_one_left_alone(self, what, tmp_path, replaced):
        evaluate(what("alone", **self.GIVEN), QUALITY, tmp_path, tmp_path / "alone.json")
        expected, parts = load_record(tmp_path / "alone.json"), sorted(replaced["parts"])
        for left in range(1, len(parts) + 8, 5):
            replaced |= {"left": left, "parts": []}
            out, cache = tmp_path / f"{left}.json", f"cache{left}"
            with pytest.raises(Killed):
                evaluate(what(cache, **self.GIVEN), QUALITY, tmp_path, out)
            assert not out.exists()
            replaced["left"] = None
            evaluate(what(cache, **self.GIVEN), QUALITY, tmp_path, out)
            assert unfailing(load_record(out)) == unfailing(expected)
            assert sorted(replaced["parts"]) == parts, "a part was computed twice, or never"

    @pytest.mark.parametrize("polls", [0, 1, 4, 7, 10])
    def test_stopped_ends_like_one_left_alone(self, what, tmp_path, replaced, polls):
        left = iter(range(polls))

        def poll():
            if next(left, None) is None:
                raise Stopped

        given, out = what(**self.GIVEN), tmp_path / "out.json"
        with pytest.raises(Stopped):
            evaluate(given, ["bpd", *QUALITY], tmp_path, out, poll)
        assert not out.exists()
        assert len(replaced["parts"]) == polls  # all that was begun
        evaluate(given, ["bpd", *QUALITY], tmp_path, out)
        assert len(replaced["parts"]) == len(set(replaced["parts"]))
        evaluate(what("alone", **self.GIVEN), ["bpd", *QUALITY], tmp_path, tmp_path / "alone.json")
        assert unfailing(load_record(out)) == unfailing(load_record(tmp_path / "alone.json"))

    @pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
    def test_while_it_measures(self, what, tmp_path, monkeypatch, error):
        """All is computed by then, and nothing of it again."""

        def die(*_):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("jax_ddpm.evaluation.metrics.kernel_distance", die)
            with pytest.raises(error):
                evaluate(what(), QUALITY, tmp_path)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
        evaluate(what(), QUALITY, tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == before
