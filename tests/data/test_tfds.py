"""A real set, written and read back by TensorFlow Datasets without TensorFlow."""

import io
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from jax_ddpm.data.source import image_spec
from jax_ddpm.data.tfds import tfds
from jax_ddpm.errors import UserError

SHAPE = (4, 6, 3)


def pixels(split, number, shape=SHAPE):
    seed = sum(split.encode()) + number
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "PNG")
    file.seek(0)
    return file


features = tensorflow_datasets.features


class JaxDdpmTiny(tensorflow_datasets.core.GeneratorBasedBuilder):
    """Random images; ``sizes`` examples per split."""

    VERSION = tensorflow_datasets.core.Version("1.2.0")
    sizes = {"train": 20, "test": 7}  # noqa: RUF012
    image = features.Image(shape=SHAPE)
    label = features.ClassLabel(num_classes=5)
    first_label = 0

    def _info(self):
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {"image": self.image, "label": self.label, "name": features.Text()}
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.sizes}

    def _generate_examples(self, split):
        for number in range(self.sizes[split]):
            shape = tuple(size or 5 + number for size in self.image.shape)
            label = self.first_label if self.first_label < 0 else number % 5
            image = png(pixels(split, number, shape))
            yield number, {"image": image, "label": label, "name": str(number)}


NAME = "jax_ddpm_tiny"


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    def prepare(**attributes):
        for attribute, value in attributes.items():
            monkeypatch.setattr(JaxDdpmTiny, attribute, value)
        builder = JaxDdpmTiny(data_dir=tmp_path, file_format="array_record")
        builder.download_and_prepare()
        return str(tmp_path)

    return prepare


def everything(source, split):
    return source.batch(split, np.arange(source.spec.split_sizes[split]))


def in_order(images, labels=None):
    rows = np.reshape(images, (len(images), -1)).astype(int)
    rows = rows if labels is None else np.column_stack([rows, labels])
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("name", [NAME, f"{NAME}:1.2.0"])
def test_images_and_labels_are_exact(prepare, name):
    """The order is TFDS's, shuffled once for all."""
    path = prepare()
    source = tfds(name, path, 0)
    sizes = {"train": 20, "heldout": 7}
    names = ("0", "1", "2", "3", "4")
    spec = image_spec(SHAPE, 256, 5, sizes, source.spec.identity, names)
    assert source.spec._replace(formerly="") == spec
    for split, stored in (("train", "train"), ("heldout", "test")):
        batch = everything(source, split)
        count = len(batch["image"])
        expected = [pixels(stored, number) for number in range(count)]
        np.testing.assert_array_equal(
            in_order(batch["image"], batch["label"]), in_order(expected, np.arange(count) % 5)
        )
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
    again = tfds(name, path, 0).batch("train", np.array([7, 2]))
    np.testing.assert_array_equal(again["image"], everything(source, "train")["image"][[7, 2]])


def test_tensorflow_is_not_imported(prepare):
    """Another interpreter has not imported what other tests did."""
    script = (
        "import sys, numpy; from jax_ddpm.data.tfds import tfds;"
        f"tfds({NAME!r}, {prepare()!r}, 3).batch('train', numpy.arange(20));"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_gray_images_of_many_sizes_are_brought_to_one(prepare):
    path = prepare(image=features.Image(shape=(None, None, 1)))
    source = tfds(NAME, path, 8)
    assert source.spec.image_shape == (8, 8, 1)
    assert everything(source, "train")["image"].shape == (20, 8, 8, 1)


def test_validation_images_are_preferred_to_test_images(prepare):
    path = prepare(sizes={"train": 20, "test": 7, "validation": 3})
    with pytest.warns(UserWarning, match="left out: test$"):
        heldout = everything(tfds(NAME, path, 0), "heldout")
    expected = [pixels("validation", number) for number in range(3)]
    np.testing.assert_array_equal(in_order(heldout["image"]), in_order(expected))


def test_without_other_splits_a_random_tenth_is_held_out(prepare):
    path = prepare(sizes={"train": 20})
    first, second = tfds(NAME, path, 0), tfds(NAME, path, 0)
    assert first.spec.split_sizes == {"train": 18, "heldout": 2}
    parts = [everything(first, split) for split in ("train", "heldout")]
    both = in_order(*(np.concatenate([p[name] for p in parts]) for name in ("image", "label")))
    expected = [pixels("train", number) for number in range(20)]
    np.testing.assert_array_equal(both, in_order(expected, np.arange(20) % 5))
    np.testing.assert_array_equal(everything(second, "heldout")["image"], parts[1]["image"])


def test_a_label_that_is_no_class_is_left_out(prepare):
    path = prepare(label=features.Scalar(np.int64))
    with pytest.warns(UserWarning, match="no classes, as its label is no ClassLabel"):
        source = tfds(NAME, path, 0)
    assert source.spec.num_classes == 0
    assert everything(source, "train").keys() == {"image"}


def test_classes_have_the_names_of_the_set(prepare):
    path = prepare(label=features.ClassLabel(names=["cat", "dog", "owl", "fox", "bee"]))
    assert tfds(NAME, path, 0).spec.class_names == ("cat", "dog", "owl", "fox", "bee")


def test_identity_names_version_splits_and_size(prepare, tmp_path):
    path = prepare()
    identities = [tfds(NAME, path, image_size).spec.identity for image_size in (0, 4)]
    assert len(set(identities)) == 2
    assert all(part in identities[0] for part in (NAME, "1.2.0", "train-20", "test-7"))
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}_moved"))
    assert tfds(NAME, str(moved), 0).spec.identity == identities[0]


def test_identity_follows_the_content(prepare, tmp_path, monkeypatch):
    path, original = prepare(), pixels
    first = tfds(NAME, path, 0).spec
    assert tfds(NAME, path, 0).spec == first
    shutil.rmtree(tmp_path / NAME)
    monkeypatch.setitem(globals(), "pixels", lambda *args: 255 - original(*args))
    second = tfds(NAME, prepare(), 0).spec
    assert first.identity != second.identity
    assert first.formerly == second.formerly == f"tfds/{NAME}/1.2.0/train-20/test-7/image-size-0"


def the_error(name, path, image_size=0, use=lambda source: None):
    with pytest.raises(UserError) as caught:
        use(tfds(name, str(path), image_size))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["cifar10", "imagenet_resized/64x64:0.1.0"])
def test_an_unprepared_set_comes_with_the_command_that_prepares_it(tmp_path, name, capfd):
    message = the_error(name, tmp_path)
    command = message.split('python -c "')[1].removesuffix('"')
    expected = f"builder('{name}', file_format='array_record', data_dir='{tmp_path}')"
    assert expected in command
    compile(command, "command", "exec")
    assert capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command_prepares_the_set(prepare, tmp_path):
    message = the_error(NAME, tmp_path)
    exec(message.split('python -c "')[1].removesuffix('"'), {})
    assert tfds(NAME, str(tmp_path), 0).spec.split_sizes["train"] == 20


def test_without_a_path_the_set_is_looked_for_where_tfds_keeps_it():
    assert f"builder('{NAME}', file_format='array_record').download" in the_error(NAME, "")


def test_an_unknown_name_comes_with_the_closest(tmp_path):
    assert ": cifar10," in the_error("cifar-10", tmp_path)
    assert "imagenet_resized" in the_error("imagenet_resize/64x64:0.1.0", tmp_path)
    assert "none" in the_error("no name", tmp_path)


@pytest.mark.parametrize("name", ["cifar10:9.9.9", "imagenet_resized/65x65"])
def test_unknown_versions_and_configs(tmp_path, name):
    assert f"data.name: {name!r}" in the_error(name, tmp_path)


def test_a_set_in_another_format_comes_with_the_command_for_this_one(prepare, tmp_path):
    path = prepare()
    for file in tmp_path.rglob("*.array_record-*"):
        file.rename(str(file).replace("array_record", "tfrecord"))
    info = tmp_path / NAME / "1.2.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    message = the_error(NAME, path)
    assert "as tfrecord" in message
    assert "file_format='array_record'" in message


def test_missing_and_cut_files(prepare, tmp_path):
    path = prepare()
    (file,) = tmp_path.rglob("*test.array_record-*")
    file.write_bytes(file.read_bytes()[:100])
    assert "damaged" in the_error(NAME, path)
    file.unlink()
    assert "damaged" in the_error(NAME, path)


BAD = {
    "no_train": ({"sizes": {"test": 7}}, "'train'"),
    "too_few": ({"sizes": {"train": 4}}, "too few"),
    "no_image": ({"image": features.Image(shape=(4, 6, 4))}, "channels"),
    "many_sizes": ({"image": features.Image(shape=(None, None, 3))}, "data.image_size"),
}


@pytest.mark.parametrize(("attributes", "named"), BAD.values(), ids=BAD)
def test_unusable_sets(prepare, attributes, named):
    assert named in the_error(NAME, prepare(**attributes))


@pytest.mark.parametrize("name", ["huggingface:mnist", "kaggle:a/b:1.0.0", "huggingface:a__b"])
def test_sets_of_others_are_refused_before_anything_is_asked(tmp_path, name, monkeypatch):
    asked = lambda *_, **__: pytest.fail("asked")  # noqa: E731
    monkeypatch.setattr(tensorflow_datasets, "builder", asked)
    assert "elsewhere than on this machine" in the_error(name, tmp_path)
    assert "elsewhere than on this machine" in the_error("cifar10", "gs://bucket/sets")


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name"])
@pytest.mark.parametrize("place", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("name", [f"{NAME}:1.2.0", "another", "Another", "link"])
def test_code_that_a_set_names_is_not_imported(prepare, tmp_path, monkeypatch, key, place, name):
    path = pathlib.Path(prepare(), NAME)
    if name.lower() == "another":
        path = path.rename(path.with_name("another"))
    if name == "link":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.2.0").symlink_to(path / "1.2.0")
        path = tmp_path / name
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign_code.py").write_text("raise SystemExit('imported')")
    file = path / "1.2.0" / place
    stored = json.loads(file.read_text())
    told = json.loads((path / "1.2.0" / "features.json").read_text())
    inner = told["featuresDict"]["features"]["label"]
    inner.pop("pythonClassName")
    inner[key] = "foreign_code.Feature"
    file.write_text(json.dumps(told if place == "features.json" else stored | {"features": told}))
    assert f"{file}: names foreign_code.Feature" in the_error(name, tmp_path)


def test_a_number_of_classes_that_is_missing(prepare, tmp_path):
    path = prepare()
    file = tmp_path / NAME / "1.2.0" / "features.json"
    stored = json.loads(file.read_text())
    stored["featuresDict"]["features"]["label"]["classLabel"] = {"numClasses": None}
    file.write_text(json.dumps(stored))
    assert "does not say how many classes" in the_error(f"{NAME}:1.2.0", path)


def test_missing_labels(prepare):
    path = prepare(first_label=-1)
    message = the_error(NAME, path, use=lambda source: everything(source, "heldout"))
    assert "labels" in message


def test_without_tensorflow_datasets(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert "pip install 'jax-ddpm[tfds]'" in the_error(NAME, tmp_path)
