"""From an image file to uint8 pixels: upright, opaque, and resized to a square."""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps

# Of Pillow's formats, those of pictures that Pillow reads by itself: no other is tried, whatever a
# file is called. (It hands EPS to another program.)
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
MAX_PIXELS = 2**27  # of one image; a file of some kilobytes can claim to be far larger
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow's own limit is set on purpose too

_ORIENTATION, _TRANSPOSED = 0x0112, range(5, 9)  # EXIF
_WHITE = 65535  # in 16 bits
_GRAY = ("1", "L", "I;16")  # Pillow's modes


class UnreadableError(Exception):
    """Why an image cannot be decoded."""


def decode(
    content: bytes, image_size: int, channels: int
) -> UInt8[np.ndarray, "height width channels"]:
    """The pixels of a file's content, in any of ``FORMATS``.

    The EXIF orientation is applied and transparency is laid on white. Then the largest centred
    square is resized to ``image_size`` by an antialiased Lanczos filter; 0 keeps images as they
    are. Colour becomes luma if ``channels`` is 1, and gray becomes colour if it is 3. An animation
    gives its first frame.

    Raises:
      UnreadableError: where the content is damaged or its levels have no known range.
    """
    with _opened(io.BytesIO(content)) as image:
        if image_size:
            # A JPEG decodes to an eighth, a quarter or half its size in a fraction of the time.
            # Twice the wanted size leaves the rest of the way to the better filter.
            image.draft(None, (2 * image_size, 2 * image_size))
        image = ImageOps.exif_transpose(image)
        image = _opaque(image).convert("L" if channels == 1 else "RGB")
        if image_size:
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
        return np.asarray(image).reshape(image.height, image.width, channels)


def decode_mask(content: bytes) -> Bool[np.ndarray, "height width"]:
    """True where a mask is white, whatever the format; raises like ``decode``.

    White is at least half of what the brightest channel of any pixel reaches, so that masks of 0
    and 1, or of red on black, are what they seem to be. Transparency is black.
    """
    with _opened(io.BytesIO(content)) as image:
        image = ImageOps.exif_transpose(image)
        brightest = np.asarray(image).max() if image.mode.startswith("I;16") else _WHITE
        pixels = np.asarray(_eight_bits(image, max(int(brightest), 1)).convert("RGBA"))
        brightness = np.where(pixels[..., 3] < 128, 0, pixels[..., :3].max(axis=-1))
        return brightness >= max(1, brightness.max() / 2)


class FileInfo(NamedTuple):
    """What is known of an image file before it is decoded.

    Attributes:
      height, width: those that ``decode`` will give.
      gray: whether the file has no colour.
      num_bytes: the size of the file.
    """

    height: int
    width: int
    gray: bool
    num_bytes: int


def file_info(path: str, image_size: int) -> FileInfo:
    """Reads the header of a file to be decoded to ``image_size``; raises like ``decode``."""
    with _opened(path) as image:
        gray, num_bytes = image.mode in _GRAY, os.path.getsize(path)
        if image_size:
            return FileInfo(image_size, image_size, gray, num_bytes)
        if image.getexif().get(_ORIENTATION) in _TRANSPOSED:
            image = ImageOps.exif_transpose(image)
        return FileInfo(image.height, image.width, gray, num_bytes)


@contextlib.contextmanager
def _opened(file: str | io.BytesIO) -> Iterator[Image.Image]:
    try:
        if isinstance(file, str) and not os.path.isfile(file):
            raise ValueError("no file")
        with Image.open(file, formats=tuple(FORMATS)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels, above {MAX_PIXELS:,}")
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode}, not of 8 or 16 bits")
            if image.mode == "RGB" and ";16" in str(image.tile) and "transparency" in image.info:
                # The transparent colour is one of 16 bits, of which Pillow reads the upper eight.
                clear = image.info["transparency"]
                image.info["transparency"] = tuple(level >> 8 for level in clear)
            yield image
    except Exception as error:  # Pillow's plugins raise anything on damaged bytes
        raise UnreadableError(" ".join(str(error).split()) or type(error).__name__) from error


def _eight_bits(image: Image.Image, white: int = _WHITE) -> Image.Image:
    if not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image)  # Pillow's own conversion clips at 255
    gray = Image.fromarray(np.round(levels * (255 / white)).astype(np.uint8))
    if "transparency" in image.info:
        opaque = levels != image.info["transparency"]
        gray.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
    return gray


def _opaque(image: Image.Image) -> Image.Image:
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA"))
