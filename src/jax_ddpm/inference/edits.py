"""Images edited with a trained model: files in, a grid or an ``.npz`` out."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jax_ddpm import images
from jax_ddpm.data.decode import UnreadableError, decode_mask
from jax_ddpm.data.given import given_images
from jax_ddpm.diffusion import encoding
from jax_ddpm.diffusion.denoiser import Conditioning, Denoiser
from jax_ddpm.diffusion.editing import (
    Projection,
    colourisation,
    inpainting,
    last_steps,
    perturbed,
    projected,
    resampled,
    super_resolution,
)
from jax_ddpm.diffusion.interpolation import interpolate
from jax_ddpm.diffusion.samplers.ddim import ddim
from jax_ddpm.diffusion.samplers.scan import Sampler, sample
from jax_ddpm.errors import UserError
from jax_ddpm.factory import Model
from jax_ddpm.generate import require_finite
from jax_ddpm.inference.outputs import require_place
from jax_ddpm.inference.trained import Trained
from jax_ddpm.keys import Stream, example_keys, seed_key, stream_key
from jax_ddpm.options import did_you_mean
from jax_ddpm.runs.checkpoint import digest
from jax_ddpm.runtime import devices
from jax_ddpm.runtime.files import replacing
from jax_ddpm.runtime.pipeline import run_ahead
from jax_ddpm.runtime.stopping import Poll, never


@dataclasses.dataclass(frozen=True)
class Request:
    """One edit, with its images and settings.

    Attributes:
      edit: a name in ``EDITS``.
      images: an image, a folder of them, an ``.npz`` or an array, of the model's size; for
        "superres" that, or ``factor`` times smaller.
      num_samples: variants of each image; for "interpolate" images between two, these included.
      mask: for "inpaint": an image, white where images are made anew, black or transparent where
        kept (``data.decode.decode_mask``); or an array, True where they are made anew.
      factor: for "superres".
      strength: for "sdedit" and "interpolate": the fraction of the sampler's steps that are taken,
        from images with the noise level of the first of them.
      jump_length, resamplings: for the edits that know a part of the image, see
        ``diffusion.editing.resampled``.
      asked: what the model is told, by the names of its conditions, such as ``label``.
    """

    edit: str
    images: pathlib.Path | np.ndarray
    num_samples: int = 4
    mask: pathlib.Path | np.ndarray | None = None
    factor: int = 2
    strength: float = 0.5
    jump_length: int = 10
    resamplings: int = 1
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)


class Edit(NamedTuple):
    """One way of editing.

    Attributes:
      draw: ``(denoiser, given [b, together, h, w, c], prior_keys, step_keys) → outputs``, among
        them ``images`` ``[b, each, h, w, c]``, in about [-1, 1]; there is one key per row of given.
      seen: the images as the model sees them.
      together: how many images one draw takes.
      each: how many images one draw makes.
      repeats: how many draws the same images get, each with its own keys.
    """

    draw: Callable[[Denoiser, Array, Any, Any], dict[str, Array]]
    seen: Projection = lambda x: x
    together: int = 1
    each: int = 1
    repeats: int = 1


def write_edits(
    trained: Trained,
    out: pathlib.Path,
    request: Request,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    poll: Poll = never,
) -> None:
    """Writes the edited images into ``out``, a ``.png``, or an ``.npz`` as from ``edit_images``.

    The picture has a row for each image or pair: the image as the model saw it, the images made of
    it, and the pair's other image. Both keep all that decides them: the picture as its note, the
    ``.npz`` as its array ``record``.

    Raises:
      UserError: where files or settings do not fit each other or the model, or ``out`` is not of
        the same request.
    """
    if out.suffix not in (".png", ".npz") or out.is_dir():
        raise UserError(f"--out={out}: give the name of a .png or an .npz")
    edit, given = _prepare(trained.model, request)
    record = _record(trained, request, given) | {"seed": seed}
    require_place(out, record)
    arrays = _edit(trained, edit, given, seed, batch_size, poll)
    if out.suffix == ".npz":
        with replacing(out) as file:
            np.savez(file, record=np.array(json.dumps(record)), **arrays)  # type: ignore[arg-type]
        return
    seen = arrays["given"]
    ends = seen.reshape(-1, edit.together, *seen.shape[1:])
    shown = np.concatenate([ends[:, :1], arrays["images"], ends[:, 1:]], axis=1)
    picture = images.grid(shown.reshape(-1, *seen.shape[1:]), columns=shown.shape[1])
    images.save_png(out, picture, note=record)


def _record(trained: Trained, request: Request, given: Float[Array, "n *shape"]) -> dict[str, Any]:
    """All that decides the edited images besides the seed, as JSON."""
    settings = {field.name: getattr(request, field.name) for field in dataclasses.fields(Request)}
    del settings["images"], settings["asked"]
    mask = settings.pop("mask")
    kept = None if mask is None else digest(_read_kept(trained.model, mask))
    noted = trained.model.sampling_conditions.noted(request.asked)
    content = {"images_sha256": digest(given), "mask_sha256": kept}
    return trained.record | settings | content | noted


def edit_images(
    trained: Trained,
    request: Request,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    poll: Poll = never,
) -> dict[str, np.ndarray]:
    """The edited images: ``given`` ``[n, h, w, c]``, as the model saw them, and ``images``
    ``[rows, columns, h, w, c]``, both uint8; "encode" adds the float32 ``noise``.

    A row belongs to an image, or to a pair. Variant j of image i depends only on (seed, i, j).

    Raises:
      UserError: where files or settings do not fit each other or the model.
    """
    return _edit(trained, *_prepare(trained.model, request), seed, batch_size, poll)


def _prepare(model: Model, request: Request) -> tuple[Edit, Float[Array, "n *shape"]]:
    """The edit and its images; everything that can be refused is refused here."""
    if request.edit not in EDITS:
        near = did_you_mean(str(request.edit), EDITS)
        raise UserError(f"--edit={request.edit}: it must be one of {', '.join(EDITS)}{near}")
    model.sampling_conditions.require_all(request.asked)
    _conditioning(model, request, 1)
    try:
        edit = EDITS[request.edit](model, request)
    except ValueError as error:
        raise UserError(f"--edit={request.edit}: {error}") from error
    given = _read_images(model, request)
    if len(given) % edit.together:
        raise UserError(
            f"--images={_told(request.images)}: {len(given)} images; give pairs of them"
        )
    return edit, given


def _edit(
    trained: Trained,
    edit: Edit,
    given: Float[Array, "n *shape"],
    seed: int,
    batch_size: int | None,
    poll: Poll,
) -> dict[str, np.ndarray]:
    rows = np.asarray(given).reshape(-1, edit.together, *given.shape[1:])
    size = batch_size or trained.config.sampling.batch_size
    outputs = _draw(trained, edit, rows, seed, size, poll)
    require_finite(outputs, f"edits of {'pairs' if edit.together == 2 else 'images'}")
    decode, drawn = trained.model.codec.decode, outputs["images"]
    found = decode(drawn.reshape(-1, *given.shape[1:]))
    return outputs | {
        "given": decode(np.asarray(edit.seen(given))),
        "images": found.reshape(*drawn.shape[:2], *found.shape[1:]),
    }


def _draw(
    trained: Trained,
    edit: Edit,
    rows: Float[np.ndarray, "rows together *shape"],
    seed: int,
    size: int,
    poll: Poll,
) -> dict[str, np.ndarray]:
    """The outputs of each row, ``[rows, repeats·each, *shape]``, in batches of ``size`` images."""
    mesh = devices.make_mesh()
    whole, split = devices.whole(mesh), devices.split(mesh)
    number = len(rows) * edit.repeats
    size = devices.round_up(min(max(min(1, size), size // edit.each), number), mesh)

    def run(denoiser, key, given, row, variant):
        def keys(stream):
            return jax.vmap(jax.random.fold_in)(example_keys(stream_key(key, stream), row), variant)

        return edit.draw(denoiser, given, keys(Stream.SAMPLE_PRIOR), keys(Stream.SAMPLE_STEPS))

    compiled = devices.compile_over(run, (whole, whole, split, split, split), split)
    denoiser = devices.place(trained.model.guided_denoiser(trained.params), whole)

    def launch(start: int) -> dict[str, Array]:
        index = np.minimum(np.arange(start, start + size, dtype=np.int32), number - 1)
        row, variant = np.divmod(index, np.int32(edit.repeats))
        return compiled(denoiser, seed_key(seed), rows[row], row, variant)

    batches = [batch for _, batch in run_ahead(launch, range(0, number, size), poll)]
    outputs = jax.tree.map(lambda *parts: np.concatenate(parts)[:number], *batches)
    return {name: x.reshape(len(rows), -1, *x.shape[2:]) for name, x in outputs.items()}


def _sampled(
    model: Model, request: Request, sampler: Sampler, denoiser: Denoiser, x: Array, keys: Any
) -> dict[str, Array]:
    given, self_condition = _conditioning(model, request, len(x)), model.self_condition
    x, _ = sample(sampler, denoiser, x, keys, given, self_condition=self_condition)
    return {"images": x[:, None]}


def _of_known_part(model: Model, request: Request, project: Projection) -> Edit:
    if not model.codec.bounded:
        raise UserError(
            f"--edit={request.edit}: this model diffuses no pixels, of which a part could be known"
        )
    grid = model.grid()
    sampler = model.sampler(grid)

    def conditioned(known: Array) -> Sampler:
        inside = projected(sampler, grid, project, known)
        if request.resamplings == 1:
            return inside
        return resampled(inside, grid, request.jump_length, request.resamplings)

    conditioned(jnp.zeros((1, *model.codec.shape)))  # refused now rather than when it runs

    def draw(denoiser, given, prior_keys, step_keys):
        known = given[:, 0]
        x = sampler.start(prior_keys, known.shape[1:])
        return _sampled(model, request, conditioned(known), denoiser, x, step_keys)

    return Edit(draw, seen=project, repeats=request.num_samples)


def _inpaint(model: Model, request: Request) -> Edit:
    if request.mask is None:
        raise UserError("--mask is missing; an image, white where images are made anew")
    return _of_known_part(model, request, inpainting(_read_kept(model, request.mask)))


def _colourise(model: Model, request: Request) -> Edit:
    if model.spec.image_shape[-1] != 3:
        raise UserError("--edit=colourise: this model makes gray images")
    return _of_known_part(model, request, colourisation)


def _superres(model: Model, request: Request) -> Edit:
    height, width, _ = model.spec.image_shape
    factor = request.factor
    if factor < 2 or height % factor or width % factor:
        raise UserError(
            f"--factor={factor}: it must be 2 or more and divide {width} and {height}, the pixels "
            "of the model's images"
        )
    return _of_known_part(model, request, super_resolution(factor))


def _sdedit(model: Model, request: Request) -> Edit:
    grid = last_steps(model.grid(), _num_last_steps(model, request.strength))
    sampler = model.sampler(grid)

    def draw(denoiser, given, prior_keys, step_keys):
        x = perturbed(grid, given[:, 0], prior_keys)
        return _sampled(model, request, sampler, denoiser, x, step_keys)

    return Edit(draw, repeats=request.num_samples)


def _interpolate(model: Model, request: Request) -> Edit:
    grid = last_steps(model.grid(), _num_last_steps(model, request.strength))
    sampler = model.sampler(grid)
    weights = jnp.linspace(0, 1, request.num_samples)

    def draw(denoiser, given, prior_keys, step_keys):
        def row(pair, key):
            conditioning = _conditioning(model, request, len(weights))
            return interpolate(sampler, denoiser, grid.process, pair, weights, key, conditioning)

        return {"images": jax.vmap(row)(given, prior_keys)}

    return Edit(draw, together=2, each=request.num_samples)


def _encode(model: Model, request: Request) -> Edit:
    """To noise and back by DDIM, through the times of the sampler.

    Heun's method comes closer where λ is evenly spaced, but goes astray on other times.
    """
    process, times = model.sampling_process, model.grid().now.time[::-1]

    def draw(denoiser, given, prior_keys, step_keys):
        conditioning = _conditioning(model, request, len(given))
        noise = encoding.encode(ddim, process, times, denoiser, given[:, 0], conditioning)
        back = encoding.decode(ddim, process, times, denoiser, noise, conditioning)
        return {"noise": noise[:, None], "images": back[:, None]}

    return Edit(draw)


EDITS: dict[str, Callable[[Model, Request], Edit]] = {
    "inpaint": _inpaint,
    "colourise": _colourise,
    "superres": _superres,
    "sdedit": _sdedit,
    "interpolate": _interpolate,
    "encode": _encode,
}


def _num_last_steps(model: Model, strength: float) -> int:
    if not 0 < strength <= 1:
        raise UserError(f"--strength={strength}: it must be above 0 and at most 1")
    return max(1, round(strength * model.grid().num_steps))


def _conditioning(model: Model, request: Request, number: int) -> Conditioning:
    """That of ``number`` images, all the same."""
    return model.sampling_conditions.asked(request.asked, np.zeros(number, np.int32))


def _read_images(model: Model, request: Request) -> Float[Array, "n *shape"]:
    """Images as they are diffused; superres takes small ones too.

    A colour model takes gray ones, and a gray model those in colour that show only grays.
    """
    height, width, channels = model.spec.image_shape
    found = request.images
    if isinstance(found, pathlib.Path):
        found = given_images(found)
    elif found.dtype != np.uint8 or found.ndim != 4 or not found.size:
        raise UserError("--images: an array of them must be uint8 [n, height, width, 1 or 3]")
    factor = request.factor
    if request.edit == "superres" and found.shape[1:3] == (height // factor, width // factor):
        found = found.repeat(factor, axis=1).repeat(factor, axis=2)
    if found.shape[-1] == 1:
        found = found.repeat(channels, axis=-1)
    elif channels == 1 and np.all(found == found[..., :1]):
        found = found[..., :1]
    if found.shape[1:] != model.spec.image_shape:
        raise UserError(
            f"--images={_told(request.images)}: {_size(found.shape[1:])}; the model makes "
            f"{_size(model.spec.image_shape)}"
        )
    return model.codec.with_levels(256).encode({"image": found})


def _read_kept(model: Model, mask: pathlib.Path | np.ndarray) -> Bool[np.ndarray, "h w"]:
    """True where the mask is not white; it must be so somewhere, and not everywhere."""
    if isinstance(mask, pathlib.Path):
        try:
            anew = decode_mask(mask.read_bytes())
        except (UnreadableError, OSError) as error:
            raise UserError(f"--mask={mask}: cannot be read ({error}); give an image") from error
    elif mask.dtype != bool or mask.ndim != 2:
        raise UserError("--mask: an array must be of True and False, [height, width]")
    else:
        anew = mask
    height, width, _ = model.spec.image_shape
    if anew.shape != (height, width):
        raise UserError(
            f"--mask={_told(mask)}: {anew.shape[1]}×{anew.shape[0]} pixels; the model makes "
            f"{width}×{height}"
        )
    if anew.all() or not anew.any():
        raise UserError(
            f"--mask={_told(mask)}: it makes {'all' if anew.all() else 'nothing'} of the images "
            "anew; it must be white where they are made anew and black where kept"
        )
    return ~anew


def _told(given: pathlib.Path | np.ndarray) -> str:
    return str(given) if isinstance(given, pathlib.Path) else "array"


def _size(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{'gray' if channels == 1 else 'colour'} images of {width}×{height} pixels"
