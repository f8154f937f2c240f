"""Samples in files: however often a command is killed and repeated, the same files result."""

import contextlib
import json
import os
import pathlib
import random
import signal
import sys
import time
from itertools import count

import jax
import numpy as np
import pytest
import tiny
from command import Run
from PIL import Image, ImageSequence

from jax_ddpm import factory, images
from jax_ddpm.codecs.pixels import PICTURES
from jax_ddpm.conditions.label import with_label
from jax_ddpm.errors import UserError
from jax_ddpm.inference import trained
from jax_ddpm.inference.sampling import write_folder, write_npz, write_samples
from jax_ddpm.inference.trained import Trained
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.runtime.stopping import EXIT_CODE, Stopped
from jax_ddpm.training.loop import train

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

SIZE = 4  # images in a batch
RECORD = {"parameters": "ema", "seed": 0, "class": None}


def drawn(i):
    """The artist's drawing of image i."""
    return np.random.default_rng(i).integers(0, 256, (3, 2, 1), dtype=np.uint8)


class Killed(BaseException):
    """Caught as little as SIGKILL."""


class Artist:
    """A draw() that notes what it is asked for, and dies before batch number ``batches``."""

    def __init__(self, batches=None):
        self.batches, self.starts = batches, []

    def __call__(self, starts):
        for start in starts:
            if len(self.starts) == self.batches:
                raise Killed
            self.starts.append(start)
            yield start, np.stack([drawn(i) for i in range(start, start + SIZE)])


def into_folder(out, number, draw=None, **record):
    write_folder(out, draw or Artist(), SIZE, number, RECORD | record, (3, 2, 1))


def into_npz(out, number, draw=None, **record):
    labels = np.arange(number, dtype=np.int32) % 3
    write_npz(out, draw or Artist(), SIZE, number, RECORD | record, labels, (3, 2, 1))


WRITERS = {"folder": into_folder, "file.npz": into_npz}


def everything(folder):
    """Path → bytes of all that lies below."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def pictures(out):
    return {path.name: images.load_png(path) for path in out.iterdir()}


def assert_drawn(out, number):
    """The folder holds exactly this."""
    found = pictures(out)
    assert sorted(found) == [f"{i:06}.png" for i in range(number)]
    for i, image in enumerate(found[name] for name in sorted(found)):
        np.testing.assert_array_equal(image, drawn(i))


class TestFolder:
    @pytest.mark.parametrize("number", [1, 4, 7, 8])
    def test_holds_just_these_images(self, tmp_path, number):
        into_folder(tmp_path / "new" / "folder", number)
        assert_drawn(tmp_path / "new" / "folder", number)
        assert sorted(everything(tmp_path / "new")) == sorted(
            ["folder", "folder.json", *(f"folder/{i:06}.png" for i in range(number))]
        )

    @pytest.mark.parametrize("batches", range(4))
    def test_repeated_draws_only_what_is_missing(self, tmp_path, batches):
        out, artist = tmp_path / "folder", Artist()
        with pytest.raises(Killed):
            into_folder(out, 14, Artist(batches))
        assert_drawn(out, SIZE * batches)
        into_folder(out, 14, artist)
        assert artist.starts == [0, 4, 8, 12][batches:]
        assert_drawn(out, 14)

    def test_complete_draws_nothing(self, tmp_path):
        into_folder(tmp_path / "folder", 6)
        before = everything(tmp_path)
        into_folder(tmp_path / "folder", 6, Artist(0))
        assert everything(tmp_path) == before

    @pytest.mark.parametrize("seed", range(8))
    def test_any_files_may_get_lost(self, tmp_path, seed):
        """Files that exist are left alone; a batch is drawn if one of its images is missing."""
        out, rng, artist = tmp_path / "folder", random.Random(seed), Artist()
        into_folder(out, 14)
        lost = rng.sample(range(14), rng.randrange(1, 14))
        for i in lost:
            path = out / f"{i:06}.png"
            if rng.random() < 0.5:
                path.with_name(f".{path.name}.jax_ddpm-partial").write_bytes(path.read_bytes()[:20])
            path.unlink()
        kept = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
        into_folder(out, 14, artist)
        assert artist.starts == sorted({i - i % SIZE for i in lost})
        assert_drawn(out, 14)
        assert {path: path.stat().st_mtime_ns for path in kept} == kept

    @pytest.mark.parametrize(
        ("few", "many", "starts"), [(4, 9, [4, 8]), (6, 9, [4, 8]), (7, 8, [4])]
    )
    def test_grows(self, tmp_path, few, many, starts):
        out, artist = tmp_path / "folder", Artist()
        into_folder(out, few)
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
        into_folder(out, many, artist)
        assert artist.starts == starts
        assert_drawn(out, many)
        assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before

    @pytest.mark.parametrize("batches", range(1, 3))
    def test_fewer_than_asked_for_before_are_refused(self, tmp_path, batches):
        """They are refused even while those are not all drawn."""
        with contextlib.suppress(Killed):
            into_folder(tmp_path / "folder", 7, Artist(batches))
        with pytest.raises(UserError, match="folder is for 7 samples; ask for 7 or more"):
            into_folder(tmp_path / "folder", 6, Artist(0))

    @pytest.mark.parametrize("name", ["notes.txt", "7.png", "0000007.png", "000007.png", "packed"])
    def test_anything_else_in_it_is_refused(self, tmp_path, name):
        out = tmp_path / "folder"
        into_folder(out, 6)
        (out / name).write_text("mine")
        before = everything(tmp_path)
        with pytest.raises(UserError, match=f"folder also holds '{name}'"):
            into_folder(out, 6, Artist(0))
        assert everything(tmp_path) == before

    @pytest.mark.parametrize("name", ["000000.png", "notes.txt"])
    def test_a_folder_of_another_kind_is_refused(self, tmp_path, name):
        out = tmp_path / "folder"
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(UserError, match="folder is not empty"):
            into_folder(out, 6, Artist(0))
        assert everything(tmp_path) == {"folder": None, f"folder/{name}": b"mine"}

    @pytest.mark.parametrize("damage", ["cut off", "empty", "changed", "another shape"])
    def test_damaged_images_are_named_and_drawn_again(self, tmp_path, damage):
        out, artist = tmp_path / "folder", Artist()
        into_folder(out, 10)
        before = everything(tmp_path)
        path = out / "000005.png"
        content = bytearray(path.read_bytes())
        if damage == "another shape":
            images.save_png(path, np.zeros((2, 3, 1), np.uint8))
        elif damage == "changed":
            content[-20] ^= 1
            path.write_bytes(content)
        else:
            path.write_bytes(content[:60] if damage == "cut off" else b"")
        with pytest.warns(UserWarning, match=r"folder: damaged, and drawn again: 000005\.png$"):
            into_folder(out, 10, artist)
        assert artist.starts == [4]
        assert everything(tmp_path) == before

    def test_another_process_that_writes_there_is_waited_for(self, tmp_path):
        """By the user: neither does the other's work."""

        def draw(starts):
            with pytest.raises(UserError, match=rf"^--out={tmp_path}.*draws samples there"):
                into_folder(tmp_path / "folder", 6, Artist(0))
            yield from Artist()(starts)

        into_folder(tmp_path / "folder", 6, draw)
        assert_drawn(tmp_path / "folder", 6)

    def test_an_empty_folder_is_taken(self, tmp_path):
        into_folder(tmp_path, 3)
        assert_drawn(tmp_path, 3)


class TestNpz:
    @pytest.mark.parametrize("number", [1, 4, 7])
    def test_holds_images_and_labels(self, tmp_path, number):
        into_npz(tmp_path / "new" / "file.npz", number)
        assert sorted(everything(tmp_path / "new")) == ["file.npz", "file.npz.json"]
        with np.load(tmp_path / "new" / "file.npz") as arrays:
            assert sorted(arrays) == ["images", "labels"]
            assert (arrays["images"].dtype, arrays["labels"].dtype) == (np.uint8, np.int32)
            np.testing.assert_array_equal(arrays["images"], [drawn(i) for i in range(number)])
            np.testing.assert_array_equal(arrays["labels"], [0, 1, 2, 0, 1, 2, 0][:number])

    def test_without_classes_has_no_labels(self, tmp_path):
        write_npz(tmp_path / "file.npz", Artist(), SIZE, 6, RECORD, None, (3, 2, 1))
        with np.load(tmp_path / "file.npz") as arrays:
            assert [*arrays] == ["images"]

    @pytest.mark.parametrize("batches", range(4))
    def test_repeated_draws_only_what_is_missing(self, tmp_path, batches):
        artist = Artist()
        with pytest.raises(Killed):
            into_npz(tmp_path / "disturbed" / "file.npz", 14, Artist(batches))
        assert not (tmp_path / "disturbed" / "file.npz").exists()
        into_npz(tmp_path / "disturbed" / "file.npz", 14, artist)
        assert artist.starts == [0, 4, 8, 12][batches:]
        into_npz(tmp_path / "file.npz", 14)
        assert everything(tmp_path / "disturbed").items() <= everything(tmp_path).items()

    def test_complete_draws_nothing(self, tmp_path):
        into_npz(tmp_path / "file.npz", 6)
        before = everything(tmp_path)
        into_npz(tmp_path / "file.npz", 6, Artist(0))
        assert everything(tmp_path) == before

    @pytest.mark.parametrize("number", [5, 7])
    def test_another_number_is_refused(self, tmp_path, number):
        into_npz(tmp_path / "file.npz", 6)
        before = everything(tmp_path)
        with pytest.raises(UserError, match=f"file.npz was made with num_samples 6, not {number}"):
            into_npz(tmp_path / "file.npz", number, Artist(0))
        assert everything(tmp_path) == before

    @pytest.mark.parametrize("length", [0, 30, 500, None])
    def test_a_damaged_one_is_named_and_made_again(self, tmp_path, length):
        """Cut off, as by a power cut, or with a bit changed in an image."""
        into_npz(tmp_path / "file.npz", 6)
        before = everything(tmp_path)
        content = bytearray((tmp_path / "file.npz").read_bytes())
        content[content.index(drawn(3).tobytes())] ^= 1
        (tmp_path / "file.npz").write_bytes(content[:length])
        with pytest.warns(UserWarning, match=r"file\.npz is damaged; its samples are drawn again"):
            into_npz(tmp_path / "file.npz", 6)
        assert everything(tmp_path) == before

    @pytest.mark.parametrize("there", [False, True])
    def test_a_folder_of_others_beside_it_is_left_alone(self, tmp_path, there):
        if there:
            into_npz(tmp_path / "file.npz", 6)
        (tmp_path / "file.npz.images").mkdir()
        (tmp_path / "file.npz.images" / "000000.png").write_text("mine")
        before = everything(tmp_path)
        with contextlib.suppress(UserError):
            into_npz(tmp_path / "file.npz", 6)
        assert everything(tmp_path) == before

    def test_a_file_of_another_kind_is_refused(self, tmp_path):
        (tmp_path / "file.npz").write_text("mine")
        with pytest.raises(UserError, match="exists already"):
            into_npz(tmp_path / "file.npz", 6, Artist(0))
        assert everything(tmp_path) == {"file.npz": b"mine"}


@pytest.mark.parametrize("name", WRITERS)
class TestRecord:
    @pytest.mark.parametrize("batches", [1, None])
    @pytest.mark.parametrize(
        ("field", "value"), [("parameters", "params"), ("seed", 1), ("class", 0)]
    )
    def test_samples_of_another_record_are_refused(self, tmp_path, name, batches, field, value):
        """Whether or not the first call came to its end."""
        with contextlib.suppress(Killed):
            WRITERS[name](tmp_path / name, 6, Artist(batches))
        before = everything(tmp_path)
        with pytest.raises(
            UserError, match=rf"{name}.* with {field} {RECORD[field]!r}, not {value!r};"
        ) as caught:
            WRITERS[name](tmp_path / name, 6, Artist(0), **{field: value})
        assert "\n" not in str(caught.value)
        assert everything(tmp_path) == before

    def test_is_dropped_with_what_it_describes(self, tmp_path, name):
        """A user who deletes the samples but not the record beside them may start anew."""
        WRITERS[name](tmp_path / "away" / name, 6)
        (tmp_path / "away" / f"{name}.json").rename(tmp_path / f"{name}.json")
        WRITERS[name](tmp_path / name, 5, seed=1)
        held = json.loads((tmp_path / f"{name}.json").read_text())
        assert held == RECORD | {"seed": 1, "num_samples": 5}

    @pytest.mark.parametrize("content", [b"", b"{}", b'{"seed": 0}', b"mine"])
    def test_a_file_in_its_place_is_left_alone(self, tmp_path, name, content):
        (tmp_path / f"{name}.json").write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.json for its record, which is something"):
            WRITERS[name](tmp_path / name, 6, Artist(0))
        assert everything(tmp_path) == {f"{name}.json": content}

    def test_settings_that_only_it_has_differ_too(self, tmp_path, name):
        """The new record may leave out what is usual."""
        WRITERS[name](tmp_path / name, 6, eta=0.5)
        with pytest.raises(UserError, match=f"{name} was made with eta 0.5, not None;"):
            WRITERS[name](tmp_path / name, 6, Artist(0))

    @pytest.mark.parametrize("text", ["", "{", "[]", "7", "\udcff", "{}"])
    def test_that_is_none_is_refused(self, tmp_path, name, text):
        WRITERS[name](tmp_path / name, 6)
        (tmp_path / f"{name}.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=name) as caught:
            WRITERS[name](tmp_path / name, 6, Artist(0))
        assert "\n" not in str(caught.value)


class Killer:
    """While entered, raises ``Killed`` before the k-th operation on files below a folder, and each
    one after it, so that nothing is cleared up.

    ``torn``: a file that would be opened for writing there is left half written.
    """

    _EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
    _active: "Killer | None" = None

    def __init__(self, folder, k, torn):
        self.folder, self.left, self.torn = str(folder), k, torn

    def __enter__(self):
        Killer._active = self

    def __exit__(self, *_):
        Killer._active = None

    @staticmethod
    def hook(event, arguments):
        if Killer._active is not None and event in Killer._EVENTS:
            Killer._active.count(event, *arguments)

    def count(self, event, path, mode=None, *_):
        # Names relative to an open folder are those that rmtree removes.
        if not isinstance(path, str) or (path[0] == "/" and not path.startswith(self.folder)):
            return
        self.left -= 1
        if self.left >= 0:
            return
        Killer._active = None
        if self.left == -1 and self.torn and event == "open" and mode == "xb":
            pathlib.Path(path).write_bytes(b"half")
        Killer._active = self
        raise Killed


sys.addaudithook(Killer.hook)  # the only one who sees each of them


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("name", WRITERS)
class TestKilledBetweenFileOperations:
    def test_once_at_each(self, tmp_path, name, torn):
        write, folder = WRITERS[name], tmp_path / "disturbed"
        write(tmp_path / "undisturbed" / name, 6)
        expected = everything(tmp_path / "undisturbed")
        for k in count():
            out = folder / str(k) / name
            out.parent.mkdir(parents=True)
            try:
                with Killer(folder, k, torn):
                    write(out, 6)
                break
            except Killed:
                write(out, 6)
                assert everything(out.parent) == expected, f"killed before operation {k}"
        assert k > 20

    @pytest.mark.parametrize("seed", range(10))
    def test_again_and_again(self, tmp_path, name, torn, seed):
        write, rng, folder = WRITERS[name], random.Random(seed), tmp_path / "disturbed"
        write(tmp_path / "undisturbed" / name, 11)
        folder.mkdir()
        for _ in range(100):
            try:
                with Killer(folder, rng.randrange(120), torn):
                    write(folder / name, 11)
                break
            except Killed:
                pass
        assert everything(folder) == everything(tmp_path / "undisturbed")


SPEC = tiny.spec((4, 4, 1))


@pytest.fixture(scope="module")
def make():
    """``make(section__field=value, …)``: a conditional model over three classes."""

    def make(step=4, item="ema", spec=SPEC, shift=0.0, **fields) -> Trained:
        fields = {"model__class_conditional": spec.num_classes > 0} | fields
        config = tiny.config(sampling__batch_size=SIZE, **fields)
        network = tiny.network(spec.image_shape[-1], spec.num_classes)
        params = jax.device_get(network.init(jax.random.key(0)))
        shifted = params | {"bias": params["bias"] + np.float32(shift)}
        return Trained(config, spec, step, item, shifted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            factory,
            "make_network",
            lambda module, x, *_: tiny.network(x.shape[-1], module.num_classes),
        )
        yield make


@pytest.fixture(scope="module")
def model(make):
    return make()


@pytest.fixture(scope="module")
def expected(model):
    """The first eleven samples."""
    batches = model.generator(SIZE)(model.params, seed=0, num_samples=11)
    return PICTURES.decode(batches)


def load(out):
    """The images of a folder or .npz."""
    if out.is_dir():
        found = pictures(out)
        assert sorted(found) == [f"{i:06}.png" for i in range(len(found))]
        return np.stack([found[name] for name in sorted(found)])
    with np.load(out) as arrays:
        return arrays["images"]


class TestKinds:
    @pytest.mark.parametrize("number", [4, 7, 11])
    @pytest.mark.parametrize("name", ["folder", "file.npz"])
    def test_hold_the_samples_to_the_last_bit(self, model, expected, tmp_path, name, number):
        write_samples(model, tmp_path / name, number)
        np.testing.assert_array_equal(load(tmp_path / name), expected[:number])

    def test_a_grid_has_a_class_in_each_column(self, model, expected, tmp_path):
        write_samples(model, tmp_path / "new" / "grid.png", 11)
        assert [*everything(tmp_path)] == ["new", "new/grid.png"]
        picture = images.load_png(tmp_path / "new" / "grid.png")
        np.testing.assert_array_equal(picture, images.grid(expected, 3, ("0", "1", "2")))

    @pytest.mark.parametrize("label", [None, 2])
    def test_npz_says_which_class_each_image_is_of(self, model, tmp_path, label):
        write_samples(model, tmp_path / "file.npz", 7, request=with_label(label))
        with np.load(tmp_path / "file.npz") as arrays:
            assert arrays["images"].shape == (7, 4, 4, 1)
            classes = [0, 1, 2, 0, 1, 2, 0] if label is None else [2] * 7
            np.testing.assert_array_equal(arrays["labels"], classes)
            assert arrays["labels"].dtype == np.int32

    def test_npz_of_an_unconditional_model_in_colour(self, make, tmp_path):
        model = make(spec=tiny.spec((4, 4, 3), num_classes=0))
        write_samples(model, tmp_path / "file.npz", 5)
        with np.load(tmp_path / "file.npz") as arrays:
            assert [*arrays] == ["images"]
            np.testing.assert_array_equal(arrays["images"], model.sample(5, batch_size=SIZE))
            assert arrays["images"].shape == (5, 4, 4, 3)

    def test_one_class_and_all_agree_where_they_meet(self, model, expected, tmp_path):
        write_samples(model, tmp_path / "folder", 11, request={"label": 1})
        np.testing.assert_array_equal(load(tmp_path / "folder")[1::3], expected[1::3])

    def test_a_class_has_one_record_by_name_and_by_number(self, make, tmp_path):
        """So its samples may go on under the other."""
        spec = tiny.spec((4, 4, 1), class_names=("cat", "dog", "owl"))
        model, out = make(spec=spec), tmp_path / "folder"
        write_samples(model, out, 4, request={"label": "dog"})
        write_samples(model, out, 7, request={"label": 1})
        assert json.loads((tmp_path / "folder.json").read_text())["class"] == 1
        np.testing.assert_array_equal(load(out), model.sample(7, label="1", batch_size=SIZE))

    def test_seeds_differ(self, model, expected, tmp_path):
        write_samples(model, tmp_path / "folder", 11, seed=1)
        differ = load(tmp_path / "folder") != expected
        assert differ.any(axis=(1, 2, 3)).all()

    def test_moments_show_each_image_from_noise_to_itself(self, model, expected, tmp_path):
        """Two rows for each image: x_t over the x_0 predicted from it."""
        write_samples(model, tmp_path / "grid.png", 5, moments=4)
        x, x0 = model.generator(SIZE, 4).snapshots(model.params, 0, 5)
        rows = [row for pair in zip(*np.moveaxis([x, x0], 2, 1), strict=True) for row in pair]
        shown = PICTURES.decode(np.concatenate(rows))
        picture = images.load_png(tmp_path / "grid.png")
        np.testing.assert_array_equal(picture, images.grid(shown, columns=4))
        np.testing.assert_allclose(shown[3::8].astype(int), expected[:5], atol=1)


class TestFilm:
    """A .gif shows x_t at as many moments as asked for, by default at up to 40."""

    @staticmethod
    def frames(path):
        with Image.open(path) as film:
            return [np.asarray(frame.copy().convert("L")) for frame in ImageSequence.Iterator(film)]

    def test_leads_from_noise_to_the_samples(self, model, expected, tmp_path):
        write_samples(model, tmp_path / "new" / "film.gif", 5)
        frames = self.frames(tmp_path / "new" / "film.gif")
        x, _ = model.generator(SIZE, 8).snapshots(model.params, 0, 5)
        heads = ("0", "1", "2")
        shown = [images.grid(PICTURES.decode(x_t), 3, heads, min_size=32)[..., 0] for x_t in x]
        np.testing.assert_array_equal(frames, shown)
        end = images.grid(expected[:5], 3, heads, min_size=32)[..., 0]
        np.testing.assert_allclose(frames[-1].astype(int), end, atol=1)
        assert [*everything(tmp_path)] == ["new", "new/film.gif"]

    @pytest.mark.parametrize(("num_timesteps", "moments", "shown"), [(60, 1, 40), (60, 3, 3)])
    def test_has_as_many_frames_as_asked_for(self, make, tmp_path, num_timesteps, moments, shown):
        model = make(process__num_timesteps=num_timesteps)
        write_samples(model, tmp_path / "film.gif", 2, moments=moments)
        assert len(self.frames(tmp_path / "film.gif")) == shown

    def test_of_fewer_evaluations_shows_each_of_them(self, make, tmp_path):
        model = make(sampling__sampler="heun", sampling__num_steps=2)
        write_samples(model, tmp_path / "film.gif", 2)
        assert len(self.frames(tmp_path / "film.gif")) == 3


@pytest.mark.parametrize(
    ("batch_size", "num_devices"), [(1, 1), (3, 1), (4, 1), (64, 1), (1, 4), (6, 4)]
)
def test_which_images_depends_neither_on_batch_size_nor_on_devices(
    make, expected, tmp_path, monkeypatch, batch_size, num_devices
):
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    monkeypatch.setattr(trained, "make_mesh", lambda: mesh)
    write_samples(make(), tmp_path / "folder", 7, batch_size=batch_size)
    found = load(tmp_path / "folder")
    np.testing.assert_allclose(found.astype(int), expected[:7], atol=1)


class TestStopping:
    """``poll`` may say so before any batch."""

    class Poll:
        def __init__(self, number):
            self.left = number

        def __call__(self):
            if not self.left:
                raise Stopped("SIGTERM")
            self.left -= 1

    @pytest.mark.parametrize("polls", range(6))
    @pytest.mark.parametrize("name", ["folder", "file.npz"])
    def test_keeps_what_was_finished(self, model, expected, tmp_path, name, polls):
        """One more batch may be under way, so at most that one is drawn again."""
        out, number = tmp_path / name, 11
        num_batches = -(-number // SIZE)
        try:
            write_samples(model, out, number, poll=self.Poll(polls))
            assert polls >= num_batches
        except Stopped:
            assert polls < num_batches
            folder = tmp_path / ("folder" if name == "folder" else "file.npz.images")
            finished = len(pictures(folder)) if polls else 0
            assert finished in (SIZE * polls, max(0, SIZE * (polls - 1)))
            if finished:
                np.testing.assert_array_equal(load(folder), expected[:finished])
            write_samples(model, out, number, poll=self.Poll(num_batches))
        np.testing.assert_array_equal(load(out), expected)

    @pytest.mark.parametrize("polls", range(3))
    @pytest.mark.parametrize("moments", [1, 4])
    def test_leaves_no_grid(self, model, tmp_path, moments, polls):
        with pytest.raises(Stopped):
            write_samples(model, tmp_path / "grid.png", 11, moments=moments, poll=self.Poll(polls))
        assert everything(tmp_path) == {}

    def test_complete_is_not_asked(self, model, tmp_path):
        for name in ("folder", "file.npz"):
            write_samples(model, tmp_path / name, 6)
            write_samples(model, tmp_path / name, 6, poll=self.Poll(0))


class TestRefusals:
    """Refusals are one line, before anything is drawn or written."""

    @staticmethod
    def refuses(model, out, **request):
        before = everything(out.parent)

        def poll():
            pytest.fail("drawn")

        with pytest.raises(UserError) as caught:
            write_samples(model, out, **{"num_samples": 7, "poll": poll} | request)
        assert everything(out.parent) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("name", ["folder", "file.npz"])
    @pytest.mark.parametrize(
        ("other", "request_", "named"),
        [
            ({}, {"seed": 1}, "seed 0, not 1"),
            ({}, {"request": {"label": 1}}, "class None, not 1"),
            ({"step": 8}, {}, "checkpoint_step 4, not 8"),
            ({"item": "params"}, {}, "parameters 'ema', not 'params'"),
            ({"shift": 0.01}, {}, "sha256"),
            ({"sampling__clip": False}, {}, "clip True, not False"),
            ({"parameterisation__variance": "fixedsmall"}, {}, "fixedsmall"),
            ({"process__num_timesteps": 9}, {}, "9"),
            ({"parameterisation__target": "v"}, {}, "'v'"),
        ],
    )
    def test_of_other_samples_into_the_same_place(
        self, make, model, tmp_path, name, other, request_, named
    ):
        out = tmp_path / name
        write_samples(model, out, 7)
        assert named in self.refuses(make(**other) if other else model, out, **request_)

    @pytest.mark.parametrize("name", ["folder", "file.npz", "grid.png"])
    @pytest.mark.parametrize("label", [-1, 3])
    def test_of_unknown_classes(self, model, tmp_path, name, label):
        assert "0 to 2" in self.refuses(model, tmp_path / name, request={"label": label})

    @pytest.mark.parametrize("moments", [1, 4])
    def test_of_folders_named_like_files(self, model, tmp_path, moments):
        (tmp_path / "x.png").mkdir()
        assert "x.png is a folder" in self.refuses(model, tmp_path / "x.png", moments=moments)
        (tmp_path / "x.npz").mkdir()
        assert "x.npz is a folder" in self.refuses(model, tmp_path / "x.npz")
        (tmp_path / "x.gif").mkdir()
        assert "x.gif is a folder" in self.refuses(model, tmp_path / "x.gif", moments=moments)

    @pytest.mark.parametrize("name", ["file", "file.jpg"])
    def test_of_files_that_are_no_folder(self, model, tmp_path, name):
        (tmp_path / name).write_text("mine")
        assert "give a .png, a .gif, an .npz, or a folder" in self.refuses(model, tmp_path / name)

    @pytest.mark.parametrize("name", ["x.png", "x.gif"])
    def test_of_pictures_of_others(self, make, model, tmp_path, name):
        """Only the same request writes over a picture, to the last bit."""
        out = tmp_path / name
        out.write_text("mine")
        assert "exists already; remove it" in self.refuses(model, out)
        out.unlink()
        out.symlink_to(tmp_path / "nothing")
        assert "exists already; remove it" in self.refuses(model, out)
        out.unlink()
        write_samples(model, out, 7)
        before = everything(tmp_path)
        write_samples(model, out, 7, batch_size=2 * SIZE)
        assert everything(tmp_path) == before
        assert "num_samples 7, not 6;" in self.refuses(model, out, num_samples=6)
        assert "seed 0, not 1;" in self.refuses(model, out, seed=1)
        assert "moments" in self.refuses(model, out, moments=3)
        assert "checkpoint_step 4, not 8;" in self.refuses(make(step=8), out)

    def test_of_unknown_suffixes(self, model, tmp_path):
        assert "x.jpg" in self.refuses(model, tmp_path / "x.jpg")

    @pytest.mark.parametrize("name", ["new", "x.png", "/proc"])
    @pytest.mark.parametrize("kind", ["x.png", "x.npz", "folder"])
    def test_of_places_that_cannot_be_written(self, model, tmp_path, name, kind):
        (tmp_path / "x.png").write_text("mine")
        (tmp_path / "new").symlink_to("/proc/nothing")
        with pytest.raises((UserError, OSError)):  # for which main, too, has one line
            write_samples(model, tmp_path / name / kind, 7, poll=lambda: pytest.fail("drawn"))

    def test_of_the_working_folder_while_it_holds_files(self, model, tmp_path, monkeypatch):
        (tmp_path / "mine").write_text("mine")
        monkeypatch.chdir(tmp_path)
        assert "not empty" in self.refuses(model, pathlib.Path("."))

    @pytest.mark.parametrize("name", ["folder", "x.npz", "x.png", "x.gif"])
    def test_of_a_diverged_model(self, make, tmp_path, name):
        """NaN would be black."""
        with pytest.raises(UserError, match=r"^samples of seed 0 are not finite: 0, 1, 2, 3;"):
            write_samples(make(shift=np.nan), tmp_path / name, 7)
        assert not [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".npz", ".gif")]

    @pytest.mark.parametrize(
        ("name", "moments"),
        [("folder", 2), ("x.npz", 2), ("x.png", 9), ("x.png", 100), ("x.gif", 9)],
    )
    def test_of_moments_that_cannot_be_shown(self, model, tmp_path, name, moments):
        line = self.refuses(model, tmp_path / name, moments=moments)
        assert f"--progressive={moments}" in line
        assert "8 moments" in line


def replace_network():
    """Puts a network of a few parameters in place in the child, which compiles fast."""
    factory.make_network = lambda module, x, *_: tiny.network(x.shape[-1], module.num_classes)


def replace_network_and_linger():
    """Does the same, and takes a hundredth of a second for each image, to be killed in."""
    replace_network()
    save_png = images.save_png
    images.save_png = lambda path, image: (save_png(path, image), time.sleep(0.01))


class TestKilledProcess:
    NUMBER = 200

    @pytest.fixture(scope="class")
    @staticmethod
    def workdir(make, tmp_path_factory):
        """Trained where the network is replaced."""
        workdir = tmp_path_factory.mktemp("killed") / "run"
        fields = {"training__num_steps": 1, "training__heldout_examples": 10}
        fields |= {"model__class_conditional": True, "sampling__batch_size": 7}
        train(tiny.config(**fields), workdir)
        return workdir

    def sample(self, workdir, out, attempt, prepare=replace_network):
        flags = ["--mode=sample", f"--workdir={workdir}", f"--out={out}", "--seed=3"]
        output = workdir.parent / "output" / out.name / attempt
        return Run(output, *flags, f"--num_samples={self.NUMBER}", prepare=prepare)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["folder", "file.npz"])
    def test_ends_like_one_that_was_left_alone(self, workdir, tmp_path, name):
        """Killed by SIGKILL, or asked by SIGTERM, again and again."""
        alone = tmp_path / "alone" / name
        undisturbed = self.sample(workdir, alone, "alone")
        out, rng = tmp_path / "killed" / name, random.Random(name)
        folder = out if name == "folder" else out.with_name(f"{name}.images")

        def saved():
            try:
                return sum(name.endswith(".png") for name in os.listdir(folder))
            except FileNotFoundError:  # not there yet, or just packed
                return 0

        for attempt in range(50):
            kind = rng.choice([signal.SIGKILL, signal.SIGTERM])
            run = self.sample(workdir, out, str(attempt), replace_network_and_linger)
            run.wait_for("")  # which is there once the process writes anywhere
            until = saved() + rng.randrange(80)
            while run.process.is_alive() and saved() < until:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
            if run.process.is_alive():
                os.kill(run.process.pid, kind)
            result = run.result()
            if result.returncode == 0:
                break
            early = saved() == 0  # before anyone listens to signals
            allowed = {-kind} if kind == signal.SIGKILL or early else {EXIT_CODE, -kind}
            assert result.returncode in allowed, result.stderr
        assert attempt >= 3
        assert undisturbed.result().returncode == 0
        assert everything(out.parent) == everything(alone.parent)
        assert len(load(out)) == self.NUMBER
