"""Measuring from the command line: results, and mistakes in one line."""

import io
import json
import pathlib
import pickle
import zipfile

import command
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jax_ddpm import factory
from jax_ddpm.images import save_png
from jax_ddpm.models.classifier import ResNet
from jax_ddpm.models.network import Network
from jax_ddpm.runs.checkpoint import Checkpoints
from jax_ddpm.runs.identity import save_identity
from jax_ddpm.tasks.table import make_model
from jax_ddpm.training.state import TrainState, to_items

WIDTH = 6


def linear(size, num_classes):
    """A "classifier" whose features are sums of pixels."""

    def init(key):
        features, logits = jax.random.split(key)
        return {
            "features": jax.random.normal(features, (size, WIDTH)),
            "logits": jax.random.normal(logits, (WIDTH, num_classes)),
        }

    def apply(params, x, dropout_keys=None):
        features = x.reshape(len(x), -1) @ params["features"]
        return features, features @ params["logits"]

    return Network(init, apply)


def make_network(module, x, *_):
    if isinstance(module, ResNet):
        return linear(x.size, module.num_classes)
    return tiny.network(x.shape[-1], module.num_classes)


quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)


@pytest.fixture(autouse=True, scope="module")
def small_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "make_network", make_network)
        yield


def images(seed, count, shape=(8, 8, 1)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def make_run(workdir, **fields):
    """A run with a checkpoint at step 4, as if it had been trained."""
    config = tiny.config(**fields)
    spec = factory.make_source(config).spec
    params = {"network": jax.device_get(make_model(config, spec).network.init(KEY))}
    averaged = jax.tree.map(lambda leaf: leaf + np.float32(0.01), params)
    state = TrainState(np.int32(4), params, averaged, ({"mu": jnp.zeros(2)},), ())
    save_identity(workdir, config, spec)
    with Checkpoints(workdir, keep_last=1, keep_every=0) as checkpoints:
        checkpoints.save(int(state.step), to_items(jax.device_put(state)), config, {})
    return workdir


KEY = jax.random.key(0)
CLASSIFIER = {"task": "classification", "model__attention_resolutions": ()}


def torch_file(path):
    """A state dict of nothing."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))


@pytest.fixture(scope="module")
def places(small_networks, tmp_path_factory):
    """The files of the flags below."""
    folder = tmp_path_factory.mktemp("main_eval")
    files = folder / "files"
    files.mkdir()
    data = {"train_images": images(0, 40), "test_images": images(1, 20)}
    labels = {"train_labels": np.arange(40) % 10, "test_labels": np.arange(20) % 10}
    small = {name: array[:, :4, :4] for name, array in data.items()}
    np.savez(files / "data.npz", **data, **labels)
    np.savez(files / "small.npz", **small, **labels)
    npz, small = (
        {"data__source": "npz", "data__path": str(files / name)}
        for name in ("data.npz", "small.npz")
    )
    runs = {
        "digits": make_run(folder / "digits"),
        "conditional": make_run(folder / "conditional", model__class_conditional=True),
        "classifier": make_run(folder / "classifier", **CLASSIFIER),
        "small_classifier": make_run(folder / "small_classifier", **CLASSIFIER | small),
        "moved": make_run(folder / "moved", **npz),
    }
    (files / "data.npz").rename(files / "moved.npz")
    np.savez(files / "other.npz", train_images=images(2, 40), test_images=images(3, 20))

    np.savez(files / "gray.npz", images=images(4, 20))
    np.savez(files / "float.npz", images=images(4, 20) / 255)
    np.savez(files / "flat.npz", images=images(4, 20).reshape(20, -1))
    np.savez(files / "labels.npz", images=images(4, 20), labels=np.arange(7))
    np.savez(files / "large.npz", images=images(5, 20, (16, 16, 1)))
    np.savez(files / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(files / "moments.npz", mu=np.zeros(WIDTH), sigma=np.eye(WIDTH))
    np.savez(files / "flat_moments.npz", mu=np.zeros(WIDTH), sigma=np.ones(WIDTH))
    np.savez(files / "half_moments.npz", mu=np.zeros(WIDTH))
    record = {"reference": {}, "extractor": {"name": "inception", "weights_sha256": "0f" * 32}}
    of_inception = {"mu": np.zeros(WIDTH), "sigma": np.eye(WIDTH), "record": json.dumps(record)}
    np.savez(files / "inceptions.npz", **of_inception)
    content = (files / "moments.npz").read_bytes()
    (files / "damaged.npz").write_bytes(content[: len(content) // 2])
    (files / "text.npz").write_text("no arrays")
    for name in ("truncated", "mixed"):
        for i, image in enumerate(images(6, 12)):
            save_png(files / name / f"{i:06}.png", image)
    picture = files / "truncated" / "000007.png"
    picture.write_bytes(picture.read_bytes()[:60])
    save_png(files / "mixed" / "000007.png", images(6, 1, (8, 7, 1))[0])
    for name in ("no_pictures", "folder.npz", "folder.json"):
        (files / name).mkdir()
    (files / "weights.pth").write_text("no weights")
    torch_file(files / "empty.pth")
    records = {
        "a": {"fid": {"protocol": {"num_images": 50_000}, "result": {"value": 3.0}}},
        "b": {"fid": {"protocol": {"num_images": 10_000}, "result": {"value": 5.0}}},
        "c": {"bpd": {"protocol": {}, "result": {"value": 3.5}}},
        "d": {"fid": {"protocol": {"num_images": 50_000}, "result": {"value": 2.5}}},
    }
    for name, measured in records.items():
        record = {"subject": {"sampler": name}, "measured": measured}
        (files / f"{name}.json").write_text(json.dumps(record))
    (files / "text.json").write_text("no record")
    return runs | {"files": files, "new": folder / "new"}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A working directory away from the checkout."""
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def succeeds(places, elsewhere):
    """The lines that a successful command prints, with the places named in its flags."""

    def succeeds(*flags):
        return command.succeeds(*(flag.format(**places) for flag in flags), cwd=elsewhere)

    return succeeds


DIGITS = "--config=digits"
EVAL = ["--mode=eval", "--workdir={digits}", "--extractor={classifier}", "--num_samples=20"]
FID = [*EVAL, "--metrics=fid"]
FILES = ["--mode=eval", DIGITS, "--extractor={classifier}", "--metrics=fid"]
STATS = ["--mode=fid_stats", "--extractor={classifier}"]
# What is wrong: flags, and what the message must name.
WRONG = {
    # metrics
    "unknown_metric": ([*EVAL, "--metrics=fdi"], "--metrics=fdi: choose among bpd"),
    "no_metrics": (EVAL, "--metrics is missing"),
    "no_workdir": (["--mode=eval", "--metrics=fid"], "--workdir is missing"),
    "no_number": (
        ["--mode=eval", "--workdir={digits}", "--metrics=fid"],
        "--num_samples is missing",
    ),
    "too_few_samples": ([*FID, "--num_samples=6"], "6 samples are too few for a covariance of 6"),
    "bpd_of_images": ([*FILES, "--samples={files}/gray.npz", "--metrics=bpd"], "--metrics=bpd"),
    "bpd_of_images_beside_a_model": (
        [*EVAL, "--samples={files}/gray.npz", "--metrics=bpd"],
        "--samples",
    ),
    "agreement_without_classes": ([*EVAL, "--metrics=agreement"], "--metrics=agreement"),
    "memorisation_against_heldout": (
        [*EVAL, "--metrics=memorisation", "--reference=heldout"],
        "--metrics=memorisation",
    ),
    "memorisation_against_moments": (
        [*EVAL, "--metrics=memorisation", "--reference={files}/moments.npz"],
        "--metrics=memorisation",
    ),
    "kid_against_moments": (
        [*EVAL, "--metrics=kid", "--reference={files}/moments.npz"],
        "--metrics=kid",
    ),
    "too_many_to_calibrate": ([*FID, "--num_samples=360", "--calibrate"], "--calibrate"),
    # the model
    "both_kinds_of_parameters": ([*FID, "--ema", "--raw"], "--raw"),
    "no_such_checkpoint": ([*FID, "--checkpoint_step=3"], "--checkpoint_step=3"),
    "model_is_a_classifier": (
        ["--mode=eval", "--workdir={classifier}", "--metrics=bpd"],
        "holds a classifier",
    ),
    "model_is_no_run": (["--mode=eval", "--workdir={files}", "--metrics=bpd"], "no run there"),
    "too_many_steps": ([*FID, "--num_steps=9"], "num_steps"),
    "seeds_past_the_last": ([*FID, "--seed=4294967295", "--num_seeds=2"], "--num_seeds"),
    # the reference
    "no_reference": (
        ["--mode=eval", "--samples={files}/gray.npz", "--metrics=fid"],
        "--reference is missing",
    ),
    "reference_is_nothing": ([*FID, "--reference={files}/nothing.npz"], "nothing.npz"),
    "reference_is_text": ([*FID, "--reference={files}/text.npz"], "text.npz"),
    "reference_is_damaged": ([*FID, "--reference={files}/damaged.npz"], "damaged.npz"),
    "reference_of_another_extractor": (
        [*FID, "--reference={files}/inceptions.npz"],
        "made with extractor inception (0f0f0f0f)",
    ),
    "reference_of_another_width": (
        [*FID, "--reference={files}/wide.npz"],
        "7 features",
    ),
    "reference_of_wrong_shape": (
        [*FID, "--reference={files}/flat_moments.npz"],
        "flat_moments.npz: mu is [6] and sigma [6]",
    ),
    "reference_without_covariance": (
        [*FID, "--reference={files}/half_moments.npz"],
        "half_moments.npz",
    ),
    "reference_of_another_size": (
        [*FID, "--reference={files}/large.npz"],
        "samples are 8×8×1, real images 16×16×1",
    ),
    # images in files
    "samples_are_nothing": ([*FILES, "--samples={files}/nothing"], "nothing"),
    "samples_are_text": ([*FILES, "--samples={files}/text.npz"], "text.npz"),
    "samples_are_floats": ([*FILES, "--samples={files}/float.npz"], "float.npz"),
    "samples_are_flat": ([*FILES, "--samples={files}/flat.npz"], "flat.npz"),
    "samples_with_wrong_labels": (
        [*FILES, "--samples={files}/labels.npz", "--metrics=agreement"],
        "labels.npz",
    ),
    "samples_are_truncated": ([*FILES, "--samples={files}/truncated"], "000007.png"),
    "samples_of_mixed_sizes": ([*FILES, "--samples={files}/mixed"], "000007.png has 7×8"),
    "samples_without_pictures": ([*FILES, "--samples={files}/no_pictures"], "no_pictures"),
    "fewer_samples_than_wanted": (
        [*FILES, "--samples={files}/gray.npz", "--num_samples=21"],
        "21 images are wanted, but there are 20",
    ),
    "samples_of_another_size": (
        [*FILES, "--samples={files}/large.npz"],
        "made for images of 8×8×1, these are 16×16×1",
    ),
    # extractors
    "gray_without_extractor": (
        ["--mode=eval", "--workdir={digits}", "--metrics=fid", "--num_samples=20"],
        "--extractor is missing",
    ),
    "unknown_extractor": ([*FID, "--extractor=vgg"], "--extractor=vgg"),
    "extractor_is_text": ([*FID, "--extractor={files}/weights.pth"], "weights.pth"),
    "extractor_of_other_weights": ([*FID, "--extractor={files}/empty.pth"], "empty.pth"),
    "extractor_is_no_run": ([*FID, "--extractor={files}/mixed"], "mixed"),
    "extractor_is_a_diffusion_model": ([*FID, "--extractor={digits}"], "holds no classifier"),
    "extractor_for_another_size": (
        [*FID, "--extractor={small_classifier}"],
        "made for images of 4×4×1, these are 8×8×1",
    ),
    # data
    "data_that_moved": (["--mode=eval", "--workdir={moved}", "--metrics=bpd"], "data.npz"),
    "data_that_is_not_there": (
        ["--mode=eval", "--workdir={moved}", "--metrics=bpd", "--data_path={files}/no.npz"],
        "no.npz",
    ),
    "data_of_another_run": (
        ["--mode=eval", "--workdir={moved}", "--metrics=bpd", "--data_path={files}/other.npz"],
        "the run was trained on npz/sha256-",
    ),
    "unknown_data": ([*STATS, DIGITS, "--config.data.source=nope", "--out=a.npz"], "data.source"),
    # results
    "out_is_no_record": ([*FID, "--out={new}/result.png"], "--out="),
    "stats_without_out": ([*STATS, DIGITS], "--out is missing"),
    "stats_into_text": ([*STATS, DIGITS, "--out=a.txt"], "--out"),
    "stats_into_a_folder": ([*STATS, DIGITS, "--out={files}/folder.npz"], "folder.npz is a folder"),
    "stats_over_images": ([*STATS, DIGITS, "--out={files}/gray.npz"], "gray.npz exists already"),
    "result_into_a_folder": ([*FID, "--out={files}/folder.json"], "folder.json is a folder"),
    "result_over_text": ([*FID, "--out={files}/text.json"], "text.json exists already"),
    "stats_of_nothing": ([*STATS, "--out=a.npz"], "--config is missing"),
    "compare_nothing": (["--mode=compare"], "two records"),
    "compare_one": (["--mode=compare", "{files}/a.json"], "two records"),
    "compare_three": (["--mode=compare", *3 * ["{files}/a.json"]], "two records"),
    "compare_text": (["--mode=compare", "{files}/a.json", "{files}/text.json"], "text.json"),
    "compare_nowhere": (["--mode=compare", "{files}/a.json", "{files}/no.json"], "no.json"),
    "compare_samples": (["--mode=compare", "{files}/a.json", "{files}/gray.npz"], "gray.npz"),
    "compare_other_protocols": (
        ["--mode=compare", "{files}/a.json", "{files}/b.json"],
        "fid was measured differently: num_images is 50000",
    ),
    "compare_other_metrics": (
        ["--mode=compare", "{files}/a.json", "{files}/c.json"],
        "measure different things: fid and bpd",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_one_line(places, elsewhere, name):
    flags, named = WRONG[name]
    line = command.mistake(*(flag.format(**places) for flag in flags), cwd=elsewhere)
    assert named.format(**places) in line


class TestEval:
    def test_of_a_run(self, succeeds, places):
        metrics = "bpd,fid,kid,is,prdc,memorisation"
        *table, path = succeeds(*EVAL, f"--metrics={metrics}", "--num_seeds=2", "--calibrate")
        path = pathlib.Path(path)
        assert path.parent == places["digits"] / "evaluation"
        names = [line.split()[0] for line in table[1:]]
        assert {"bpd", "fd/classifier", "kd/classifier", "is/classifier", "recall"} <= set(names)
        assert not {"fid", "kid", "is"} & set(names)
        record = json.loads(path.read_text())
        assert record["subject"]["seeds"] == [0, 1]
        assert record["subject"]["checkpoint_step"] == 4
        assert record["subject"]["parameters"] == "ema"
        assert record["extractor_accuracy"]["count"] == 359
        assert [*record["calibration"]] == ["heldout", "heldout + noise 8", "heldout + noise 32"]
        assert record["provenance"]["command"].endswith("--num_seeds=2 --calibrate")

    def test_of_raw_parameters_is_another_record(self, succeeds):
        averaged, raw = (
            json.loads(pathlib.Path(succeeds(*FID, *flags)[-1]).read_text())
            for flags in ([], ["--raw"])
        )
        assert (averaged["subject"]["parameters"], raw["subject"]["parameters"]) == (
            "ema",
            "params",
        )
        values = [r["measured"]["fd/classifier"]["result"]["value"] for r in (averaged, raw)]
        assert values[0] != values[1]

    def test_agreement_of_a_conditional_model(self, succeeds):
        flags = [*EVAL, "--workdir={conditional}", "--metrics=agreement"]
        assert succeeds(*flags)[1].startswith("agreement")

    def test_of_images_in_files(self, succeeds):
        *table, path = succeeds(*FILES, "--samples={files}/gray.npz")
        assert table[1].startswith("fd/classifier")
        assert pathlib.Path(path).parts[0] == "evaluation"

    def test_against_usual_moments(self, succeeds):
        table = succeeds(*FID, "--reference={files}/moments.npz")
        assert table[1].startswith("fd/classifier")

    def test_data_may_move(self, succeeds):
        flags = ["--mode=eval", "--workdir={moved}", "--metrics=bpd"]
        assert succeeds(*flags, "--data_path={files}/moved.npz")[1].startswith("bpd")


def test_stats_serve_in_place_of_the_images(succeeds):
    """The result and the protocol are the same, so that the records compare."""
    out = "{new}/train.npz"
    assert succeeds(*STATS, DIGITS, "--split=train", f"--out={out}")[0].endswith("train.npz")
    succeeds(*FID, "--out={new}/images.json")
    succeeds(*FID, f"--reference={out}", "--out={new}/moments.json")
    lines = succeeds("--mode=compare", "{new}/images.json", "{new}/moments.json")
    assert lines[0].split() == ["images", "moments"]
    name, *values = lines[1].split()
    assert name == "fd/classifier"
    assert values[0] == values[1]
    assert len(lines) == 2


def test_stats_are_of_the_training_images_like_the_reference(succeeds, places):
    """--mode=eval compares with them by default."""
    succeeds(*STATS, DIGITS, "--out={new}/default.npz")
    with np.load(io.BytesIO((places["new"] / "default.npz").read_bytes())) as stored:
        assert json.loads(str(stored["record"]))["reference"]["split"] == "train"


def test_compare(succeeds):
    lines = succeeds("--mode=compare", "{files}/a.json", "{files}/d.json")
    assert [line.split() for line in lines] == [
        ["a", "d"],
        ["fid", "3", "2.5"],
        ["sampler", "a", "d"],
    ]
