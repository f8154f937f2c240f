"""Images as uint8 in 0…255: grids and files."""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from jax_ddpm.runtime.files import replacing


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
) -> None:
    """Writes images, gray (one channel) or colour (three), as one PNG grid."""
    save_png(path, grid(images, columns, heads))


def save_gif(
    path: pathlib.Path,
    moments: UInt8[np.ndarray, "k n h w c"],
    columns: int,
    heads: Sequence[str] = (),
) -> None:
    """Writes grids of images as the frames of a film, its end held for two seconds.

    The frames before take four seconds at most, or 20 ms each, the least that viewers show.
    """
    from PIL import Image

    grids = [grid(images, columns, heads, min_size=32) for images in moments]
    frames = [Image.fromarray(g.squeeze(-1) if g.shape[-1] == 1 else g) for g in grids]
    milliseconds = [max(20, 4000 // len(frames))] * (len(frames) - 1) + [2000]
    with replacing(path) as partial:
        frames[0].save(
            partial, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0
        )


def save_png(path: pathlib.Path, image: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes one image."""
    from PIL import Image

    with replacing(path) as partial:
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(partial, "PNG")


def load_png(path: pathlib.Path) -> UInt8[np.ndarray, "h w c"]:
    """Reads what ``save_png`` wrote."""
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
