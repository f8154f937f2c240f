"""Images as uint8 in 0…255: grids and files, which note what they are."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jax_ddpm.errors import UserError
from jax_ddpm.runtime.files import replacing

_NOTE = "jax_ddpm"  # the keyword of a PNG's text, and the first word of a GIF's comment


def grid(
    images: UInt8[np.ndarray, "n h w c"],
    columns: int,
    heads: Sequence[str] = (),
    *,
    min_size: int = 64,
) -> UInt8[np.ndarray, "height width c"]:
    """Images row by row with a white gap between them, under the ``heads`` of their columns.

    Images smaller than ``min_size`` are enlarged by the largest whole factor that fits into it, so
    that an 8×8 digit can be read. Missing images in the last row stay white.
    """
    _, height, width, channels = images.shape
    factor = max(1, min_size // max(height, width))
    gap = max(2, max(height, width) * factor // 16)
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    rows = -(-len(images) // columns)
    cell = np.array([height, width]) * factor + gap
    canvas = np.full((*(cell * (rows, columns) + gap), channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = cell * divmod(i, columns) + gap
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    if not heads:
        return canvas
    line = _line(heads, cell[1].item(), gap, canvas.shape[1])
    return np.concatenate([line[..., None].repeat(channels, axis=-1), canvas])


def _line(
    heads: Sequence[str], cell: int, gap: int, width: int
) -> UInt8[np.ndarray, "height width"]:
    """Words over cells of ``cell`` pixels, a gap among them, in Pillow's own font; cut to fit."""
    from PIL import Image, ImageDraw, ImageFont

    size = max(10, cell // 10)
    font, line = ImageFont.load_default(size), Image.new("L", (width, size + gap), 255)
    draw = ImageDraw.Draw(line)
    for i, head in enumerate(heads):
        while len(head) > 1 and font.getlength(head) > cell - gap:
            head = f"{head[:-2]}…"
        draw.text((gap + i * cell + (cell - gap) / 2, line.height / 2), head, 0, font, anchor="mm")
    return np.asarray(line)


def save_grid(
    path: pathlib.Path,
    images: UInt8[np.ndarray, "n h w c"],
    columns: int,
    heads: Sequence[str] = (),
    *,
    note: Any = None,
) -> None:
    """Writes images, gray (one channel) or colour (three), as one PNG grid."""
    save_png(path, grid(images, columns, heads), note=note)


def save_gif(
    path: pathlib.Path,
    moments: UInt8[np.ndarray, "k n h w c"],
    columns: int,
    heads: Sequence[str] = (),
    *,
    note: Any = None,
) -> None:
    """Writes grids of images as the frames of a film, its end held for two seconds.

    The frames before take four seconds at most, or 20 ms each, the least that viewers show.
    """
    from PIL import Image

    grids = [grid(images, columns, heads, min_size=32) for images in moments]
    frames = [Image.fromarray(g.squeeze(-1) if g.shape[-1] == 1 else g) for g in grids]
    milliseconds = [max(20, 4000 // len(frames))] * (len(frames) - 1) + [2000]
    options: dict[str, Any] = {"duration": milliseconds, "loop": 0}
    if note is not None:
        options["comment"] = f"{_NOTE} {noted(note)[_NOTE]}".encode()
    with replacing(path) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], **options)


def save_png(path: pathlib.Path, image: UInt8[np.ndarray, "h w c"], *, note: Any = None) -> None:
    """Writes one image, with a ``note``, JSON, in its text."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for keyword, text in noted(note).items() if note is not None else ():
        info.add_text(keyword, text)
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    with replacing(path) as file:
        picture.save(file, "PNG", pnginfo=info)


def noted(note: Any) -> dict[str, str]:
    """A note as the text of a PNG, by its keyword."""
    return {_NOTE: json.dumps(note)}


def note_of(path: pathlib.Path) -> Any:
    """The note that a PNG or GIF was written with; None where there is none."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "GIF")) as image:
            comment = image.info.get("comment", b"").decode()
            return json.loads(image.info.get(_NOTE) or comment.removeprefix(_NOTE))
    except Exception:  # Pillow can raise anything on damaged bytes
        return None


def load_png(path: pathlib.Path) -> UInt8[np.ndarray, "h w c"]:
    """Reads what ``save_png`` wrote.

    Raises:
      UserError: naming the file, where it is missing or no longer as it was written.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()  # the checksums, which reading passes over
        with Image.open(path, formats=("PNG",)) as image:
            pixels = np.asarray(image)
    except Exception as error:  # Pillow can raise anything on damaged bytes
        raise UserError(f"{path}: no whole PNG; remove it and repeat") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]
