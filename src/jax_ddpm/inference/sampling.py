"""Samples into files: a grid, a film, or any number into a folder or ``.npz``, resumable."""

import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from jax_ddpm import images
from jax_ddpm.conditions.condition import NO_REQUEST
from jax_ddpm.errors import UserError
from jax_ddpm.inference.trained import Trained
from jax_ddpm.runtime.distributed import from_first, is_first
from jax_ddpm.runtime.files import read_json, replacing
from jax_ddpm.runtime.stopping import Poll, never

# The number of each wanted batch's first sample → that number and the batch's images.
Draw = Callable[[Iterable[int]], Iterator[tuple[int, UInt8[np.ndarray, "b h w c"]]]]

_FILES = (".png", ".gif", ".npz")


def write_samples(
    trained: Trained,
    out: pathlib.Path,
    num_samples: int,
    *,
    seed: int = 0,
    request: Mapping[str, Any] = NO_REQUEST,
    batch_size: int | None = None,
    moments: int = 1,
    poll: Poll = never,
) -> None:
    """Samples 0, …, num_samples-1 into ``out``: a grid ``.png``, an ``.npz``, or else a folder.

    ``moments`` > 1 shows in a grid how each image is made: x after a step above the x_0 that
    the step was made with. A ``.gif`` is a film of the grid of x_t at ``moments`` moments, 40 by
    default.

    Raises:
      UserError: where ``out`` cannot be written as asked for.
    """
    if out.suffix in _FILES and out.is_dir():
        raise UserError(f"--out={out} is a folder; give the name of a file")
    if out.suffix not in _FILES and (out.is_file() or out.suffix[1:].isalpha()):
        raise UserError(f"--out={out}: give a .png, a .gif, an .npz, or a folder")
    evaluations, film = trained.model.sampler().num_evaluations, out.suffix == ".gif"
    if moments > 1 and (moments > evaluations or out.suffix not in (".png", ".gif")):
        raise UserError(
            f"--progressive={moments}: needs a .png or .gif and at most {evaluations} moments"
        )
    if film and moments == 1:
        moments = min(40, evaluations)
    size = min(batch_size or trained.config.sampling.batch_size, num_samples)
    generator = trained.generator(size, moments)
    everything = np.arange(num_samples, dtype=np.int32)
    labels = generator.asked(everything, request).get("label")
    if film or out.suffix == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass  # refused now, not when all is drawn

    layout, decode = generator.layout(num_samples, request), trained.model.codec.decode
    if film or moments > 1:
        moments_of = generator.snapshots(trained.params, seed, num_samples, request, poll)
        x, x0 = (np.stack([decode(moment) for moment in each]) for each in moments_of)
        if film:
            images.save_gif(out, x, *layout)
            return
        pairs = np.stack([x, x0]).transpose(2, 0, 1, 3, 4, 5)  # image, x_t or x_0, moment
        images.save_grid(out, pairs.reshape(-1, *x.shape[2:]), columns=moments)
        return
    if out.suffix == ".png":
        x = generator(trained.params, seed, num_samples, request, poll)
        images.save_grid(out, decode(x), *layout)
        return

    def draw(starts):
        for start, batch in generator.draw(trained.params, seed, starts, request, poll):
            yield start, decode(batch.x[-1])

    noted = trained.model.sampling_conditions.noted(request)
    record = trained.record | {"seed": seed, "class": None} | noted
    if out.suffix == ".npz":
        write_npz(out, draw, generator.batch_size, num_samples, record, labels)
    else:
        write_folder(out, draw, generator.batch_size, num_samples, record)


def write_folder(
    out: pathlib.Path, draw: Draw, batch_size: int, num_samples: int, record: dict[str, Any]
) -> None:
    """Samples 0, …, num_samples-1 as ``000000.png`` …: exactly these files.

    ``<out>.json``, beside the folder, keeps ``record``: everything that decides the samples. Images
    that exist are kept, so a killed call is simply repeated; a batch with an image missing is drawn
    whole, so that every image is the same to the last bit.

    Raises:
      UserError: where the folder holds anything else, or samples of another record.
    """
    from tqdm import tqdm

    def find_missing() -> list[int]:
        _claim(out, num_samples, record)
        return [i for i in range(num_samples) if not _image(out, i).exists()]

    missing = set(from_first(find_missing))
    starts = sorted({i - i % batch_size for i in missing})
    quiet = None if is_first() else True
    for start, batch in tqdm(draw(starts), total=len(starts), unit="batch", disable=quiet):
        for i, image in enumerate(batch, start):
            if i in missing and is_first():
                images.save_png(_image(out, i), image)


def write_npz(
    out: pathlib.Path,
    draw: Draw,
    batch_size: int,
    num_samples: int,
    record: dict[str, Any],
    labels: Int[np.ndarray, " n"] | None,
) -> None:
    """As ``write_folder``, but into arrays ``images`` uint8 ``[n, h, w, c]`` and ``labels``.

    The images stay in the folder ``<out>.images`` until the last one is drawn.
    """
    parts = out.with_name(out.name + ".images")
    of_file = record | {"num_samples": num_samples}
    there = from_first(lambda: out.exists() and bool(_require_same(out, of_file)))
    if not there:
        write_folder(parts, draw, batch_size, num_samples, record)
    if not is_first():
        return
    if not there:
        arrays = {
            "images": np.stack([images.load_png(_image(parts, i)) for i in range(num_samples)])
        }
        if labels is not None:
            arrays["labels"] = labels
        with replacing(out) as partial:
            with partial.open("wb") as packed:
                np.savez(packed, **arrays)  # type: ignore[arg-type]
            _write_record(out, of_file)
    shutil.rmtree(parts, ignore_errors=True)
    _record(parts).unlink(missing_ok=True)


def _claim(out: pathlib.Path, num_samples: int, record: dict[str, Any]) -> None:
    """Makes the folder ours, or finds that it is."""
    out.mkdir(parents=True, exist_ok=True)
    found = [path.name for path in out.iterdir()]
    if found and not _record(out).exists():
        raise UserError(f"--out={out} is not empty; give a new folder")
    if found:  # beside an empty folder, a record belongs to samples that someone has removed
        held = _require_same(out, record)["num_samples"]
        if held > num_samples:
            raise UserError(f"--out={out} is for {held} samples; ask for {held} or more")
    ours = {_image(out, i).name for i in range(num_samples)}
    for name in found:
        if name.removesuffix(".partial") not in ours:
            raise UserError(f"--out={out} also holds {name!r}; move it, or give a new folder")
    for leftover in out.glob("*.partial"):
        leftover.unlink()
    _write_record(out, record | {"num_samples": num_samples})


def _require_same(out: pathlib.Path, record: dict[str, Any]) -> dict[str, Any]:
    try:
        held = dict(read_json(_record(out)))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--out={out} exists already; remove it, or give another name") from error
    for field, value in record.items():
        if held.get(field) != value:
            raise UserError(
                f"--out={out} holds samples with {field} {held.get(field)!r}, not {value!r}; "
                "give another name"
            )
    return held


def _image(out: pathlib.Path, index: int) -> pathlib.Path:
    return out / f"{index:06}.png"


def _record(out: pathlib.Path) -> pathlib.Path:
    out = out.absolute()  # "." has no name
    return out.with_name(out.name + ".json")


def _write_record(out: pathlib.Path, record: dict[str, Any]) -> None:
    with replacing(_record(out)) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
