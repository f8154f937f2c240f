"""Images from files, edited by a model and written into files."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from jax_ddpm import factory, images
from jax_ddpm.api.arguments import ARGUMENTS
from jax_ddpm.codecs.pixels import PICTURES
from jax_ddpm.conditions.label import with_label
from jax_ddpm.diffusion.editing import inpainting, last_steps, perturbed, projected, resampled
from jax_ddpm.diffusion.process import per_example_normal
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.errors import UserError
from jax_ddpm.inference import edits
from jax_ddpm.inference.edits import EDITS, Request, edit_images, write_edits
from jax_ddpm.inference.trained import Trained
from jax_ddpm.keys import Stream, stream_key
from jax_ddpm.runtime.devices import make_mesh

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

KEPT = np.array([[True] * 4, [True] * 4, [False] * 4, [True, False, False, True]])


@pytest.fixture(scope="module")
def make():
    """``make(shape, num_classes, section__field=value)``: a model that has not learned a thing."""

    def make(shape=(4, 4, 3), num_classes=0, **fields) -> Trained:
        fields = {"model__class_conditional": num_classes > 0} | fields
        network = tiny.network(shape[-1], num_classes)
        params = jax.device_get(network.init(jax.random.key(0)))
        spec = tiny.spec(shape, num_levels=256, num_classes=num_classes)
        return Trained(tiny.config(**fields), spec, 4, "ema", params)

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
def files(tmp_path_factory):
    """Four colour images, the same in gray and at half the size, and a mask."""
    folder = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(0).integers(40, 216, (4, 4, 4, 3), dtype=np.uint8)
    np.savez(folder / "colour.npz", images=pixels)
    np.savez(folder / "gray.npz", images=pixels[..., :1])
    np.savez(folder / "small.npz", images=pixels[:, :2, :2])
    np.savez(folder / "three.npz", images=pixels[:3])
    images.save_png(folder / "mask.png", np.where(KEPT, 0, 255).astype(np.uint8)[..., None])
    images.save_png(folder / "large.png", np.zeros((5, 6, 1), np.uint8))
    images.save_png(folder / "black.png", np.zeros((4, 4, 1), np.uint8))
    Image.new("L", (4, 4), 255).save(folder / "white.jpg")
    images.save_png(folder / "one.png", pixels[1])
    images.save_png(folder / "ones.png", np.where(KEPT, 0, 1).astype(np.uint8)[..., None])
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def request_for(files, edit, images="colour.npz", mask="mask.png", **fields):
    mask = files / mask if edit == "inpaint" and mask else None
    return Request(edit, files / images, mask=mask, **{"num_samples": 3} | fields)


def edited(model, tmp_path, request, **how):
    """The arrays that are written."""
    out = tmp_path / "out.npz"
    out.unlink(missing_ok=True)
    write_edits(model, out, request, **how)
    with np.load(out) as arrays:
        return {name: arrays[name] for name in arrays if name != "record"}


def pixels(files, name="colour.npz"):
    with np.load(files / name) as arrays:
        return arrays["images"]


def test_every_edit_is_named_in_help():
    assert all(name in ARGUMENTS["edit"].meaning for name in EDITS)


class TestWhatIsMade:
    @pytest.mark.parametrize("resamplings", [1, 2])
    def test_inpainting_keeps_what_is_black_in_the_mask(self, model, files, tmp_path, resamplings):
        request = request_for(files, "inpaint", jump_length=3, resamplings=resamplings)
        found = edited(model, tmp_path, request)
        given = pixels(files)
        assert found["images"].shape == (4, 3, 4, 4, 3)
        np.testing.assert_array_equal(
            found["images"][:, :, KEPT], np.repeat(given[:, None, KEPT], 3, axis=1)
        )
        assert np.mean(found["images"][:, :, ~KEPT] == given[:, None, ~KEPT]) < 0.1
        np.testing.assert_array_equal(found["given"][:, KEPT], given[:, KEPT])
        assert np.all(found["given"][:, ~KEPT] == 128), "gray"

    def test_a_mask_may_hold_0_and_1_and_one_image_be_edited(self, model, files, tmp_path):
        found = edited(model, tmp_path, request_for(files, "inpaint", "one.png", "ones.png"))
        usual = edited(model, tmp_path, request_for(files, "inpaint"))
        np.testing.assert_array_equal(found["given"], usual["given"][1:2])
        np.testing.assert_array_equal(found["images"][:, :, KEPT], usual["images"][1:2, :, KEPT])

    def test_gray_models_take_grays_in_colour(self, make, files, tmp_path):
        gray = make((4, 4, 1))
        shown = pixels(files, "gray.npz")
        np.savez(tmp_path / "same.npz", images=shown.repeat(3, axis=-1))
        found = edited(gray, tmp_path, Request("sdedit", tmp_path / "same.npz", num_samples=1))
        np.testing.assert_array_equal(found["given"], shown)

    @pytest.mark.parametrize(
        ("edit", "axes"), [("colourise", 4), ("superres", (2, 4))], ids=["colourise", "superres"]
    )
    def test_the_mean_that_was_known_is_kept(self, model, files, tmp_path, edit, axes):
        """It holds where nothing is cut off at black or white, to the rounding of each pixel."""
        found = edited(model, tmp_path, request_for(files, edit, num_samples=20))

        def means(x):
            blocks = x if edit == "colourise" else x.reshape(*x.shape[:-3], 2, 2, 2, 2, 3)
            axis = -1 if edit == "colourise" else (-4, -2)
            return blocks.astype(float).mean(axis), ((blocks > 0) & (blocks < 255)).all(axis)

        expected, _ = means(pixels(files)[:, None])
        of_samples, whole = means(found["images"])
        error = np.abs(of_samples - expected)[whole]
        assert error.size > 50
        assert error.max() <= 0.5 + 1e-3
        np.testing.assert_allclose(means(found["given"][:, None])[0], expected, atol=0.5)
        assert np.std(found["images"].astype(float), axis=1).max() > 10, "and the rest is free"

    @pytest.mark.parametrize(
        ("edit", "name"), [("superres", "small.npz"), ("colourise", "gray.npz")]
    )
    def test_takes_what_is_known_alone(self, model, files, tmp_path, edit, name):
        """Small images to enlarge, and gray ones to colour, are the known part of themselves."""
        found = edited(model, tmp_path, request_for(files, edit, name))
        shown = pixels(files, name)
        if edit == "superres":
            shown = shown.repeat(2, axis=1).repeat(2, axis=2)
        np.testing.assert_array_equal(found["given"], np.broadcast_to(shown, (4, 4, 4, 3)))

    @pytest.mark.parametrize("edit", ["inpaint", "sdedit"])
    def test_is_what_the_sampler_makes_with_the_keys_of_image_and_variant(
        self, model, files, tmp_path, edit
    ):
        request = request_for(files, edit, strength=0.5, jump_length=2, resamplings=2)
        found = edited(model, tmp_path, request, seed=5)
        grid, image, variant = model.model.grid(), 2, 1
        known = PICTURES.encode({"image": pixels(files)[image : image + 1]})
        prior, steps = (
            jax.random.fold_in(jax.random.fold_in(stream_key(jax.random.key(5), s), image), variant)
            for s in (Stream.SAMPLE_PRIOR, Stream.SAMPLE_STEPS)
        )
        if edit == "inpaint":
            sampler = projected(model.model.sampler(), grid, inpainting(KEPT), known)
            sampler = resampled(sampler, grid, 2, 2)
            x = per_example_normal(prior[None], known)
        else:
            grid = last_steps(grid, 4)
            sampler, x = model.model.sampler(grid), perturbed(grid, known, prior[None])
        x, _ = sample(sampler, model.model.guided_denoiser(model.params), x, steps[None], {})
        expected = PICTURES.decode(np.asarray(x))[0].astype(int)
        np.testing.assert_allclose(found["images"][image, variant], expected, atol=1)

    def test_interpolation_leads_from_one_image_of_a_pair_to_the_other(
        self, model, files, tmp_path
    ):
        """It does as far as two steps of an untrained network leave the images alone."""
        request = request_for(files, "interpolate", num_samples=5, strength=0.2)
        found = edited(model, tmp_path, request)["images"].astype(float)
        assert found.shape == (2, 5, 4, 4, 3)
        given = pixels(files).astype(float).reshape(2, 2, 1, 4, 4, 3)
        distance = np.square(found[:, None] - given).sum((3, 4, 5))
        assert np.all(distance[:, 0, 0] < distance[:, 0, -1])
        assert np.all(distance[:, 1, 0] > distance[:, 1, -1])

    def test_encoding_leads_to_noise_and_back(self, make, files, tmp_path):
        """It is exact where the predicted ε is the same everywhere: d(x/α) = ε̂ d(σ/α)."""
        constant = make(sampling__clip=False)
        constant.params["gain"] = np.float32(0)
        found = edited(constant, tmp_path, request_for(files, "encode"))
        process, (low, high) = constant.model.process, constant.model.process.time_range
        alpha, sigma = (f(np.array([low, high])) for f in (process.alpha, process.sigma))
        x0 = np.asarray(PICTURES.encode({"image": pixels(files)}), float)
        expected = alpha[1] * (x0 + 0.1 * np.diff(sigma / alpha))
        np.testing.assert_allclose(found["noise"][:, 0], expected, atol=1e-5)
        assert found["noise"].dtype == np.float32
        np.testing.assert_allclose(
            found["images"][:, 0].astype(int), pixels(files).astype(int), atol=1
        )

    def test_class_is_told(self, make, files, tmp_path):
        conditional = make(num_classes=3)
        first, same, other = (
            edited(conditional, tmp_path, request_for(files, "sdedit", asked={"label": label}))[
                "images"
            ]
            for label in (0, 0, 2)
        )
        np.testing.assert_array_equal(first, same)
        assert np.mean(first != other) > 0.5


@pytest.mark.parametrize("edit", EDITS)
def test_depends_on_seed_image_and_variant_alone(make, model, files, tmp_path, monkeypatch, edit):
    """Batches, devices and the number of variants do not matter; interpolation divides its row."""
    number = 3 if edit == "interpolate" else 2
    expected = edited(model, tmp_path, request_for(files, edit))["images"]
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(edits.devices, "make_mesh", lambda: mesh)
    request = request_for(files, edit, num_samples=number)
    found = edited(make(), tmp_path, request, batch_size=3)["images"]
    columns = expected.shape[1] if edit in ("interpolate", "encode") else number
    np.testing.assert_allclose(found.astype(int), expected[:, :columns], atol=1)
    if edit != "encode":
        other = edited(make(), tmp_path, request, seed=1)["images"]
        assert np.mean(found != other) > 0.2


@pytest.mark.parametrize("edit", EDITS)
def test_picture_has_a_row_for_each_image_or_pair(model, files, tmp_path, edit):
    request = request_for(files, edit)
    arrays = edited(model, tmp_path, request)
    write_edits(model, tmp_path / "new" / "out.png", request)
    together = 2 if edit == "interpolate" else 1
    given = arrays["given"].reshape(-1, together, 4, 4, 3)
    cells = np.concatenate([given[:, :1], arrays["images"], given[:, 1:]], axis=1)
    expected = images.grid(cells.reshape(-1, 4, 4, 3), columns=cells.shape[1])
    np.testing.assert_array_equal(images.load_png(tmp_path / "new" / "out.png"), expected)


class TestRefusals:
    """Refusals are one line, before anything is drawn or written."""

    @staticmethod
    def refuses(model, request, out):
        with pytest.raises(UserError) as caught:
            write_edits(model, out, request, poll=lambda: pytest.fail("drawn"))
        assert not out.is_file()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize(
        ("edit", "fields", "named"),
        [
            ("inpaint", {"images": "nothing"}, "nothing: not a folder"),
            ("inpaint", {"images": "small.npz"}, "of 2×2 pixels; the model makes .* of 4×4"),
            ("inpaint", {"mask": None}, "--mask is missing"),
            ("inpaint", {"mask": "nothing.png"}, "nothing.png: cannot be read"),
            ("inpaint", {"mask": "broken.png"}, "broken.png: cannot be read"),
            ("inpaint", {"mask": "large.png"}, "large.png: 6×5 pixels; the model makes 4×4"),
            ("inpaint", {"mask": "black.png"}, "black.png: it makes nothing of the images anew"),
            ("inpaint", {"mask": "white.jpg"}, "white.jpg: it makes all of the images anew"),
            ("inpaint", {"resamplings": 2, "jump_length": 8}, "jump_length is 8; .* 1 to 7"),
            ("superres", {"factor": 3}, "--factor=3: .* divide 4 and 4"),
            ("superres", {"factor": 1}, "--factor=1: it must be 2 or more"),
            ("sdedit", {"strength": 0.0}, "--strength=0.0"),
            ("interpolate", {"strength": 1.5}, "--strength=1.5"),
            ("interpolate", {"images": "three.npz"}, "3 images; give pairs"),
            ("sdedit", {"asked": {"label": 0}}, "no class; leave --class out"),
        ],
    )
    def test_of_what_does_not_fit(self, model, files, tmp_path, edit, fields, named):
        line = self.refuses(model, request_for(files, edit, **fields), tmp_path / "out.png")
        assert re.search(named, line), line

    def test_of_colour_for_gray_models(self, make, files, tmp_path):
        gray, out = make((4, 4, 1)), tmp_path / "out.png"
        assert "makes gray images" in self.refuses(gray, request_for(files, "colourise"), out)
        line = self.refuses(gray, request_for(files, "sdedit"), out)
        assert "colour.npz: colour images of 4×4 pixels; the model makes gray" in line

    @pytest.mark.parametrize("label", [None, -1, 3])
    def test_of_no_class_or_an_unknown_one(self, make, files, tmp_path, label):
        request = request_for(files, "sdedit", asked=with_label(label))
        assert "0 to 2" in self.refuses(make(num_classes=3), request, tmp_path / "out.png")

    def test_of_resampling_a_multistep_method(self, make, files, tmp_path):
        request = request_for(files, "inpaint", resamplings=2, jump_length=2)
        line = self.refuses(make(sampling__sampler="dpmpp_2m"), request, tmp_path / "out.png")
        assert line.startswith("--edit=inpaint: only a sampler without history")

    @pytest.mark.parametrize("name", ["out.png", "out.npz"])
    def test_of_outputs_of_others(self, model, files, tmp_path, name):
        """Neither a file of the user, nor an input, nor what another request has made."""
        out, request = tmp_path / name, request_for(files, "inpaint")
        shutil.copy(files / ("mask.png" if name == "out.png" else "colour.npz"), out)
        before = out.read_bytes()
        given = {"mask": out} if name == "out.png" else {"images": out}
        for each in (request, dataclasses.replace(request, **given)):
            with pytest.raises(UserError, match=rf"--out={out} exists already; remove it, or"):
                write_edits(model, out, each, poll=lambda: pytest.fail("drawn"))
            assert out.read_bytes() == before
        out.unlink()
        write_edits(model, out, request, seed=3)
        before = out.read_bytes()
        write_edits(model, out, request, seed=3, batch_size=2)
        assert out.read_bytes() == before
        others = {
            "seed 3, not 0": request,
            "num_samples 3, not 2": request_for(files, "inpaint", num_samples=2),
            "images_sha256": request_for(files, "inpaint", "three.npz"),
            "mask_sha256": dataclasses.replace(request, mask=KEPT),
        }
        for named, other in others.items():
            with pytest.raises(UserError, match=f"was made with {named}"):
                write_edits(
                    model,
                    out,
                    other,
                    seed=0 if other is request else 3,
                    poll=lambda: pytest.fail("drawn"),
                )
            assert out.read_bytes() == before

    @pytest.mark.parametrize("name", ["folder", "x.jpg", ".png"])
    def test_of_other_outputs(self, model, files, tmp_path, name):
        assert f"--out={tmp_path / name}" in self.refuses(
            model, request_for(files, "sdedit"), tmp_path / name
        )

    @pytest.mark.parametrize(
        ("images", "named"),
        [
            (np.zeros((2, 4, 4, 3)), "--images: an array of them must be uint8"),
            (np.zeros((4, 4, 3), np.uint8), "--images: an array of them must be uint8"),
            (np.zeros((1, 4, 6, 3), np.uint8), "--images=array: colour images of 6×4 pixels"),
        ],
    )
    def test_of_arrays_that_are_no_images(self, model, tmp_path, images, named):
        assert named in self.refuses(model, Request("sdedit", images), tmp_path / "out.png")

    @pytest.mark.parametrize(
        ("mask", "named"),
        [
            (np.zeros((4, 4)), "--mask: an array must be of True and False"),
            (np.zeros((5, 6), bool), "--mask=array: 6×5 pixels; the model makes 4×4"),
            (np.zeros((4, 4), bool), "--mask=array: it makes nothing of the images anew"),
            (np.ones((4, 4), bool), "--mask=array: it makes all of the images anew"),
        ],
    )
    def test_of_arrays_that_are_no_masks(self, model, files, tmp_path, mask, named):
        request = Request("inpaint", files / "colour.npz", mask=mask)
        assert named in self.refuses(model, request, tmp_path / "out.png")


def test_in_batches_of_nothing_is_refused(model, files):
    request = Request("inpaint", pixels(files), mask=~KEPT)
    with pytest.raises(UserError, match=r"^--sample_batch=-1: it must be at least 1$"):
        edit_images(model, request, batch_size=-1)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["out.png", "out.npz"])
def test_what_is_not_finite_is_not_written(make, files, tmp_path, edit, name):
    """Not even where clipping makes numbers of infinity."""
    model = make(sampling__clip=False)
    model.params = jax.tree.map(lambda x: np.full_like(x, np.nan), model.params)
    kind = "pairs" if edit == "interpolate" else "images"
    with pytest.raises(UserError, match=f"^edits of {kind} are not finite: 0, 1"):
        write_edits(model, tmp_path / name, request_for(files, edit))
    assert not [*tmp_path.iterdir()]


def test_arrays_are_edited_like_the_files_that_hold_them(model, files, tmp_path):
    expected = edited(model, tmp_path, request_for(files, "inpaint"))
    found = edit_images(model, Request("inpaint", pixels(files), num_samples=3, mask=~KEPT))
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])
