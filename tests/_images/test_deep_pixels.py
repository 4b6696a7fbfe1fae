"""All bits of files of more than 8 bits per channel are read."""

import io
import struct

import numpy as np
import pytest
from image_files import (
    LAYOUTS,
    SHAPE,
    build_netpbm,
    build_png,
    decode_pixels,
    integers,
    on_white,
    write_tiff,
)
from PIL import Image

from sktl._images.pixel_values import WarnOnce


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("n_channels", [3, 4])
@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
def test_pixel_range_applies_to_deep_colors_of_tiff(
    planarconfig, n_channels, byteorder, layout
) -> None:
    options = {"photometric": "rgb", "planarconfig": planarconfig, **LAYOUTS[layout]}
    if n_channels == 4:
        options["extrasamples"] = ["unassalpha"]
    values = integers(4096, n_channels).astype("u2")
    content = write_tiff(values, byteorder, **options)
    if planarconfig == "separate" and "compression" in options:
        with pytest.raises(ValueError, match="stored separately"):
            decode_pixels(content, (0, 4095))
        with pytest.warns(UserWarning, match=r"is 3840, .*\(0, 4095\)"):
            decode_pixels(content, warn=WarnOnce())
        return
    expected = on_white(values / 4095)
    tolerance = 0.501 if n_channels == 3 else 2
    result = decode_pixels(content, (0, 4095))
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("byteorder", "<>")
def test_premultiplied_alpha_of_16_bits(byteorder: str) -> None:
    alpha = 1 + integers(4095, 1)
    colors = integers(4096, 3) * alpha // 4095
    content = write_tiff(
        np.dstack([colors, alpha]).astype("u2"),
        byteorder,
        photometric="rgb",
        extrasamples=["assocalpha"],
    )
    expected = (colors + 4095 - alpha) / 4095 * 255
    result = decode_pixels(content, (0, 4095))
    np.testing.assert_allclose(result, expected, rtol=0, atol=2)


@pytest.mark.parametrize("n_channels", [1, 2, 3, 4])
def test_pixel_range_applies_to_deep_png(n_channels: int) -> None:
    values = integers(4096, n_channels)
    result = decode_pixels(build_png(values, depth=16), (1000, 4095))
    expected = on_white(((values - 1000) / 3095).clip(0, 1))
    tolerance = 0.501 if n_channels % 2 else 2
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("depth", [2, 4, 16])
@pytest.mark.parametrize("n_channels", [1, 3])
def test_transparent_value_of_png(n_channels: int, depth: int) -> None:
    if n_channels == 3 and depth < 16:
        pytest.skip("colors have 8 or 16 bits")
    values = integers(2**depth, n_channels)
    values[5:7, 5:9] = values[0, 0]
    # Only the low byte differs.
    if depth == 16:
        values[7, 7] = values[0, 0] ^ 1
    transparent = struct.pack(f">{n_channels}H", *values[0, 0])
    content = build_png(values, (b"tRNS", transparent), depth=depth)
    is_transparent = (values == values[0, 0]).all(axis=-1, keepdims=True)
    expected = np.where(is_transparent, 255, on_white(values / (2**depth - 1)))
    np.testing.assert_allclose(decode_pixels(content), expected, rtol=0, atol=0.501)


@pytest.mark.parametrize("maximum", [1, 15, 200, 255, 256, 1023, 4095, 40_000, 65535])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("n_channels", [1, 3])
def test_maximum_of_netpbm(n_channels: int, plain: bool, maximum: int) -> None:
    values = integers(maximum + 1, n_channels)
    content = build_netpbm(values, maximum, plain=plain, comment="# 7 8")
    expected = np.broadcast_to(values / maximum * 255, (*SHAPE, 3))
    for image in (content, Image.open(io.BytesIO(content))):
        np.testing.assert_allclose(decode_pixels(image), expected, rtol=0, atol=0.51)
    result = decode_pixels(content, (0, 200))
    if maximum > 255:  # 8 bits have a fixed range
        expected = np.broadcast_to(values / 200 * 255, (*SHAPE, 3)).clip(0, 255)
    np.testing.assert_allclose(result, expected, rtol=0, atol=0.51)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"P5 9 9 4095\n" + bytes(100), "truncated"),
        (b"P6 9 9 4095\n" + bytes(300), "truncated"),
        (b"P2 2 1 999\n5 ", "truncated"),
        (b"P2 2 1 999\n5 1000", "exceed the maximum of 999"),
        (b"P2 2 1 999\n5 x", "not a digit"),
        (b"P3 1 1 999\n5 -1 1", "not a digit"),
    ],
)
def test_damaged_netpbm_raises(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"Cannot read image X\[3\] .*{message}"):
        decode_pixels(content)
