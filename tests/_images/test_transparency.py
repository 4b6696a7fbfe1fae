"""Transparent pixels of GIF and BMP files are those that browsers show."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from sktl._images.decode import decode

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 250, (3, 4), dtype=np.uint8)
COLORS = RNG.integers(0, 250, (256, 3), dtype=np.uint8)
RGB = RNG.integers(0, 250, (3, 4, 3), dtype=np.uint8)
WHITE = np.full((7, 9, 3), 255)


def gif(**options: object) -> bytes:
    """Return a GIF of 9 x 7 pixels with frames of 4 x 3 pixels at (2, 1)."""
    image = Image.fromarray(GREY)
    image.putpalette(COLORS.tobytes())
    image.save(buffer := io.BytesIO(), "GIF", optimize=False, **options)
    content = bytearray(buffer.getvalue())
    content[6:10] = struct.pack("<HH", 9, 7)
    whole_frame = b"," + struct.pack("<HHHH", 0, 0, 4, 3)
    assert content.count(whole_frame) >= 1
    return bytes(content).replace(whole_frame, b"," + struct.pack("<HHHH", 2, 1, 4, 3))


def pixels_of(image: object) -> np.ndarray:
    return np.asarray(decode(image, index=0, pixel_range="auto")).astype(int)


@pytest.mark.parametrize("transparency", [None, int(GREY[1, 1])])
@pytest.mark.parametrize("form", ["bytes", "PIL", "loaded PIL"])
def test_gif_canvas_around_the_first_frame_is_white(transparency, form):
    options = {} if transparency is None else {"transparency": transparency}
    image: object = gif(**options)
    if form != "bytes":
        image = Image.open(io.BytesIO(image))
    if form == "loaded PIL":
        image.load()
    expected = WHITE.copy()
    visible = (
        np.ones(GREY.shape, bool) if transparency is None else (GREY != transparency)
    )
    expected[1:4, 2:6][visible] = COLORS[GREY][visible]
    np.testing.assert_array_equal(pixels_of(image), expected)


def test_grey_gif_without_palette():
    Image.fromarray(GREY).save(buffer := io.BytesIO(), "GIF", optimize=False)
    content = bytearray(buffer.getvalue())
    content[6:10] = struct.pack("<HH", 9, 7)
    expected = WHITE.copy()
    expected[:3, :4] = GREY[..., np.newaxis]
    np.testing.assert_array_equal(pixels_of(bytes(content)), expected)


def test_gif_whose_frame_covers_the_canvas_is_unchanged():
    Image.fromarray(GREY).save(buffer := io.BytesIO(), "GIF")
    expected = np.repeat(GREY[..., np.newaxis], 3, axis=-1)
    np.testing.assert_array_equal(pixels_of(buffer.getvalue()), expected)


# BMP


def bmp(alpha: np.ndarray, masks: tuple[int, int, int, int], size: int = 108) -> bytes:
    """Return a BMP of 32 bits per pixel with a header of version 4, 3 or 2."""
    rows = (
        sum(
            (channel.astype("<u4") << (mask & -mask).bit_length() - 1)
            for channel, mask in zip(
                (*RGB.transpose(2, 0, 1), alpha), masks, strict=True
            )
            if mask
        )[::-1]
        .astype("<u4")
        .tobytes()
    )
    info = struct.pack("<iiHHIIiiII", 4, 3, 1, 32, 3, len(rows), 0, 0, 0, 0)
    header = struct.pack("<I", size) + info + struct.pack("<4I", *masks)
    header = header[:size].ljust(size, b"\0")
    offset = 14 + size
    start = struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset)
    return start + header + rows


MASKS = {
    "BGRA": (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
    "RGBA": (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
    "ABGR": (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
}


@pytest.mark.parametrize("size", [56, 108, 124])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", ["bytes", "PIL"])
def test_bmp_alpha_that_is_zero_everywhere_is_not_used(masks, size, form):
    image: object = bmp(np.zeros((3, 4), np.uint8), MASKS[masks], size)
    image = Image.open(io.BytesIO(image)) if form == "PIL" else image
    np.testing.assert_array_equal(pixels_of(image), RGB)


@pytest.mark.parametrize("masks", MASKS)
def test_bmp_alpha_is_used(masks):
    alpha = np.zeros((3, 4), np.uint8)
    alpha[0, 0], alpha[1] = 255, 128
    weight = alpha[..., np.newaxis] / 255
    expected = RGB * weight + 255 * (1 - weight)
    got = pixels_of(bmp(alpha, MASKS[masks]))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1)


def test_png_that_is_transparent_everywhere_is_white():
    image = Image.fromarray(np.dstack([RGB, np.zeros((3, 4), np.uint8)]))
    image.save(buffer := io.BytesIO(), "PNG")
    assert (pixels_of(buffer.getvalue()) == 255).all()
