import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from jax_ddpm.data.decode import UnreadableError, decode, decode_mask, file_info

RNG = np.random.default_rng(0)


def encoded(pixels, image_format="PNG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def smooth(height, width):
    """Slow waves in every channel, which any good filter keeps."""
    y, x = np.mgrid[:height, :width] / 400
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y), np.sin(4 * x - 6 * y)]
    return np.round(127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_images_are_exact(image_format, channels):
    gray = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
    image = decode(encoded(gray, image_format), 0, channels)
    np.testing.assert_array_equal(image, np.repeat(gray[..., None], channels, axis=-1))


def test_colour_is_exact_and_stays_as_it_is_at_its_own_size():
    pixels = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    for image_size in (0, 6):
        np.testing.assert_array_equal(decode(encoded(pixels), image_size, 3), pixels)


@pytest.mark.parametrize(("height", "width"), [(400, 640), (640, 400)])
def test_the_centred_square_is_kept(height, width):
    """The middle of a wide or tall image is green and all else red, which only the filter's tails
    see at the edges."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 255
    top, left = (height - 400) // 2, (width - 400) // 2
    pixels[top : top + 400, left : left + 400] = (0, 255, 0)
    image = decode(encoded(pixels), 32, 3)
    assert image.shape == (32, 32, 3)
    error = np.abs(image.astype(int) - [0, 255, 0])
    assert error.max() < 20
    assert error[3:-3, 3:-3].max() == 0


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
@pytest.mark.parametrize("image_size", [16, 50, 100, 300])
def test_resizing_samples_what_the_image_shows(image_format, image_size):
    """The mean over each target pixel's area; also by the JPEG decoder's own reduction."""
    pixels = smooth(400, 400)
    image = decode(encoded(pixels, image_format), image_size, 3)
    edges = np.arange(image_size + 1) * 400 / image_size
    integral = np.zeros((401, 401, 3))
    integral[1:, 1:] = pixels.astype(float).cumsum(0).cumsum(1)
    grid = np.arange(401)
    for axis in (0, 1):
        integral = np.apply_along_axis(lambda f: np.interp(edges, grid, f), axis, integral)
    mean = np.diff(np.diff(integral, axis=0), axis=1) * (image_size / 400) ** 2
    assert np.abs(image - mean).mean() < 1.5
    assert np.abs(image - mean)[1:-1, 1:-1].max() < 8


def test_fine_detail_does_not_alias():
    """One-pixel stripes average to gray."""
    pixels = np.tile(np.uint8([0, 255]), (200, 100))
    image = decode(encoded(pixels), 33, 1).astype(float)
    assert np.abs(image - 127.5).max() < 8


def test_small_images_are_enlarged():
    image = decode(encoded(np.full((3, 5), 77, np.uint8)), 16, 3)
    np.testing.assert_array_equal(image, np.full((16, 16, 3), 77))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, orientation):
    """EXIF's eight ways to hold a camera; the oracle rotates and mirrors by its definition."""
    seen = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: np.rot90(seen, 1),
        7: seen[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(seen, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image_format in ("PNG", "TIFF"):
        content = encoded(np.ascontiguousarray(stored), image_format, exif=exif)
        np.testing.assert_array_equal(decode(content, 0, 3), seen)
        (tmp_path / "image").write_bytes(content)
        assert file_info(str(tmp_path / "image"), 0)[:2] == (4, 6)


def transparent(mode):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 200, 200, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    if mode == "P":
        image = Image.new("P", (2, 2), 0)
        image.putpixel((0, 0), 1)
        image.putpalette([0, 0, 0, 200, 200, 200])
        image.info["transparency"] = 0
        return image
    return Image.fromarray(rgba).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    image = decode(encoded(transparent(mode)), 0, 3)
    half = 255 if mode == "P" else 127
    np.testing.assert_array_equal(image, np.repeat([[[200], [half]], [[255], [255]]], 3, axis=-1))


def test_sixteen_bits_are_scaled_not_clipped():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for image_format in ("PNG", "TIFF"):
        image = decode(encoded(levels * 257, image_format), 0, 1)
        np.testing.assert_array_equal(image[..., 0], levels)


def test_colours_of_a_print_are_converted():
    image = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), 4, 3)
    assert np.abs(image.astype(int) - [255, 0, 0]).max() < 5


WHITE = np.array([[True, False, False], [False, True, True]])
LEVELS = np.uint8(WHITE)


def palette_of(*colours):
    image = Image.frombytes("P", LEVELS.shape[::-1], LEVELS.tobytes())
    image.putpalette([level for colour in colours for level in colour])
    return image


def in_channels(*channels, mode):
    return Image.merge(mode, [Image.fromarray(np.uint8(channel)) for channel in channels])


BLACK = np.zeros_like(LEVELS)
CLEAR = 255 * LEVELS
MASKS = {
    "gray": 255 * LEVELS,
    "0_and_1": LEVELS,
    "sixteen_bits": np.uint16(LEVELS) * 65535,
    "sixteen_bits_0_and_1": np.uint16(LEVELS),
    "one_bit": Image.fromarray(WHITE),
    "palette": palette_of((0, 0, 0), (0, 128, 0)),
    "red_on_black": in_channels(255 * LEVELS, BLACK, BLACK, mode="RGB"),
    "blue_on_black": in_channels(BLACK, BLACK, 255 * LEVELS, mode="RGB"),
    "white_on_transparent": in_channels(*[BLACK + 255] * 3, CLEAR, mode="RGBA"),
    "gray_on_transparent": in_channels(BLACK + 99, CLEAR, mode="LA"),
    "edges": np.where(WHITE, 200, 90).astype(np.uint8),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_white_of_a_mask_is_what_is_seen_so(mask):
    np.testing.assert_array_equal(decode_mask(encoded(mask)), WHITE)


def test_a_mask_may_be_lossy():
    white = np.kron(WHITE, np.ones((16, 16), bool))
    content = encoded(np.uint8(white) * 255, "JPEG", quality=30)
    np.testing.assert_array_equal(decode_mask(content), white)


def test_nothing_is_white_in_black():
    assert not decode_mask(encoded(BLACK)).any()
    assert decode_mask(encoded(BLACK + 1)).all()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def sixteen_bit_png(pixels, transparent):
    """A PNG of uint16 ``[h, w, c]`` with one transparent colour, which Pillow does not write."""
    height, width, channels = pixels.shape
    kind = {1: 0, 3: 2}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    clear = struct.pack(f">{channels}H", *transparent)
    chunks = {b"IHDR": header, b"tRNS": clear, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks.items())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_sixteen_bits_is_laid_on_white(channels):
    pixels = np.zeros((2, 2, channels), np.uint16)
    pixels[0, 0], pixels[0, 1], pixels[1, 0] = 0x80FF, 0x4000, 0xFFFF
    image = decode(sixteen_bit_png(pixels, [0x80FF] * channels), 0, channels)
    assert np.ptp(image, axis=-1).max() == 0
    np.testing.assert_array_equal(image[..., 0], [[255, 64], [255, 0]])


PNG = encoded(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))
JPEG = encoded(smooth(64, 64), "JPEG")
UNREADABLE = {
    "empty": b"",
    "text": b"not an image",
    "cut_png": PNG[: len(PNG) // 2],
    "cut_jpeg": JPEG[: len(JPEG) // 2],
    "damaged_png": PNG[:100] + bytes(200) + PNG[300:],
    "no_range": encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
}


@pytest.mark.parametrize("image_format", ["EPS", "PDF", "ICO", "PCX", "TGA"])
def test_other_formats_are_not_opened_whatever_they_are_called(tmp_path, image_format, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", lambda *_: pytest.fail("another program"))
    path = tmp_path / "x.png"
    Image.new("RGB", (16, 16)).save(path, image_format)
    with pytest.raises(UnreadableError, match="cannot identify"):
        file_info(str(path), 0)
    with pytest.raises(UnreadableError, match="cannot identify"):
        decode(path.read_bytes(), 0, 3)


def claiming(side):
    """The beginning of a PNG of so many pixels a side."""
    size = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [11_586, 60_000])
def test_pixels_are_limited_on_purpose(tmp_path, side):
    """2**27 of them are a square of 11,585."""
    (tmp_path / "x.png").write_bytes(claiming(side))
    with pytest.raises(UnreadableError, match="pixels"):
        file_info(str(tmp_path / "x.png"), 8)


def test_large_pictures_are_read_without_a_warning(tmp_path):
    (tmp_path / "x.png").write_bytes(claiming(11_585))
    assert file_info(str(tmp_path / "x.png"), 8)[:2] == (8, 8)


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_decoded_has_one_reason(content):
    with pytest.raises(UnreadableError) as caught:
        decode(content, 16, 3)
    assert str(caught.value)
    assert "\n" not in str(caught.value)
