"""Samples into files: a grid, a film, or any number into a folder or ``.npz``, resumable."""

import contextlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from jax_ddpm import images
from jax_ddpm.conditions.condition import NO_REQUEST
from jax_ddpm.errors import UserError
from jax_ddpm.inference.outputs import require_place, require_same
from jax_ddpm.inference.trained import Trained
from jax_ddpm.runtime.distributed import from_first, is_first
from jax_ddpm.runtime.files import locked, replacing, sweep
from jax_ddpm.runtime.stopping import Poll, never

# The number of each wanted batch's first sample → that number and the batch's images.
Draw = Callable[[Iterable[int]], Iterator[tuple[int, UInt8[np.ndarray, "b h w c"]]]]

_FILES = (".png", ".gif", ".npz")
_OF_EVERY_RECORD = {"parameters", "seed", "num_samples"}


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

    A picture keeps all that decides it as its note.

    Raises:
      UserError: where ``out`` cannot be written as asked for, or is not of the same request.
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
    noted = trained.model.sampling_conditions.noted(request)
    record = trained.record | {"seed": seed, "class": None} | noted
    note = record | {"num_samples": num_samples, "moments": moments}
    if film or out.suffix == ".png":
        require_place(out, note)

    layout, decode = generator.layout(num_samples, request), trained.model.codec.decode
    if film or moments > 1:
        moments_of = generator.snapshots(trained.params, seed, num_samples, request, poll)
        x, x0 = (np.stack([decode(moment) for moment in each]) for each in moments_of)
        if film:
            images.save_gif(out, x, *layout, note=note)
            return
        pairs = np.stack([x, x0]).transpose(2, 0, 1, 3, 4, 5)  # image, x_t or x_0, moment
        images.save_grid(out, pairs.reshape(-1, *x.shape[2:]), columns=moments, note=note)
        return
    if out.suffix == ".png":
        x = generator(trained.params, seed, num_samples, request, poll)
        images.save_grid(out, decode(x), *layout, note=note)
        return

    def draw(starts):
        for start, batch in generator.draw(trained.params, seed, starts, request, poll):
            yield start, decode(batch.x[-1])

    shape = trained.spec.image_shape
    if out.suffix == ".npz":
        write_npz(out, draw, generator.batch_size, num_samples, record, labels, shape)
    else:
        write_folder(out, draw, generator.batch_size, num_samples, record, shape)


def write_folder(
    out: pathlib.Path,
    draw: Draw,
    batch_size: int,
    num_samples: int,
    record: dict[str, Any],
    shape: tuple[int, int, int],
) -> None:
    """Samples 0, …, num_samples-1 as ``000000.png`` …: exactly these files, of this shape.

    ``<out>.json``, beside the folder, keeps ``record``: everything that decides the samples. Images
    that are whole are kept, so a killed call is simply repeated; a batch with an image missing is
    drawn whole, so that every image is the same to the last bit.

    Raises:
      UserError: where the folder holds anything else, or samples of another record, or another
        process writes there.
    """
    from tqdm import tqdm

    from_first(lambda: _record_of(out))
    with locked(out, f"--out={out}", "draws samples"):
        missing = set(from_first(lambda: _missing(out, num_samples, record, shape)))
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
    shape: tuple[int, int, int],
) -> None:
    """As ``write_folder``, but into arrays ``images`` uint8 ``[n, h, w, c]`` and ``labels``.

    The images stay in the folder ``<out>.images`` until the last one is drawn.
    """
    parts = out.with_name(out.name + ".images")
    of_file = record | {"num_samples": num_samples}

    def complete() -> bool:
        held = _record_of(out)
        if not out.exists():
            return False
        return require_same(out, held, of_file) and _is_whole(out, num_samples, shape)

    there = from_first(complete)
    if not there:
        write_folder(parts, draw, batch_size, num_samples, record, shape)
    if not is_first():
        return
    if not there:
        found = (images.load_png(_image(parts, i)) for i in range(num_samples))
        arrays = {"images": np.stack([*found])}
        if labels is not None:
            arrays["labels"] = labels
        with replacing(out) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            _write_record(out, of_file)
    if _record_of(parts) == of_file:
        for i in range(num_samples):
            _image(parts, i).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is gone, or a user has put something there
            parts.rmdir()
        _record(parts).unlink()


def _missing(
    out: pathlib.Path, num_samples: int, record: dict[str, Any], shape: tuple[int, int, int]
) -> list[int]:
    """The samples to be drawn, once the folder is ours or has been found to be."""
    found, held = sweep(out), _record_of(out)
    if found and held is None:
        raise UserError(f"--out={out} is not empty; give a new folder")
    ours = [_image(out, i).name for i in range(num_samples)]
    if found and held:  # beside an empty folder, it belongs to samples that someone has removed
        number = held.pop("num_samples")
        require_same(out, held, record)
        if number > num_samples:
            raise UserError(f"--out={out} is for {number} samples; ask for {number} or more")
    for name in sorted({*found} - {*ours}):
        raise UserError(f"--out={out} also holds {name!r}; move it, or give a new folder")
    _write_record(out, record | {"num_samples": num_samples})
    damaged = [name for name in found if not _is_image(out / name, shape)]
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        listed = ", ".join(damaged[:3]) + more
        warnings.warn(f"--out={out}: damaged, and drawn again: {listed}", stacklevel=2)
    return [i for i, name in enumerate(ours) if name not in found or name in damaged]


def _is_image(path: pathlib.Path, shape: tuple[int, int, int]) -> bool:
    try:
        return images.load_png(path).shape == shape
    except UserError:
        return False


def _is_whole(out: pathlib.Path, num_samples: int, shape: tuple[int, int, int]) -> bool:
    """Whether an ``.npz`` can be read, with a warning where not."""
    try:
        with out.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if stored["images"].shape == (num_samples, *shape):
                return True
    except Exception:  # zipfile can raise anything on damaged bytes
        pass
    warnings.warn(f"--out={out} is damaged; its samples are drawn again", stacklevel=2)
    return False


def _image(out: pathlib.Path, index: int) -> pathlib.Path:
    return out / f"{index:06}.png"


def _record(out: pathlib.Path) -> pathlib.Path:
    out = out.absolute()  # "." has no name
    return out.with_name(out.name + ".json")


def _record_of(out: pathlib.Path) -> dict[str, Any] | None:
    """What the file beside ``out`` says; None where there is none.

    Raises:
      UserError: where it is no record of samples.
    """
    path = _record(out)
    if not os.path.lexists(path):
        return None
    try:
        held = json.loads(path.read_bytes())
        if held.keys() >= _OF_EVERY_RECORD:
            return held
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    raise UserError(
        f"--out={out} takes {path} for its record, which is something else; move that, or give "
        "another name"
    )


def _write_record(out: pathlib.Path, record: dict[str, Any]) -> None:
    with replacing(_record(out)) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
