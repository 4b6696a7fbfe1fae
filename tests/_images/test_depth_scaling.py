"""Values of files are scaled to 8 bits; those far below the range are reported."""

import re
from pathlib import Path

import numpy as np
import pytest
from image_files import (
    SHAPE,
    build_netpbm,
    build_png,
    build_tiff,
    decode_pixels,
    integers,
    on_white,
    random_values,
    write_tiff,
)
from mean_color import MeanColor, decode_all
from PIL import Image

from sktl._images.pixel_values import WarnOnce

SCALINGS = {
    "unscaled": lambda values, n: values,
    "rounded": lambda values, n: np.rint(values / (2**n - 1) * 65535),
    "zeros": lambda values, n: values << 16 - n,
    "repeated": lambda values, n: values << 16 - n | values >> max(2 * n - 16, 0),
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("n_bits", [8, 10, 12, 15])
@pytest.mark.parametrize("n_channels", [1, 2, 3, 4])
@pytest.mark.parametrize("is_dark", [False, True])
def test_significant_bits_of_png(n_channels, n_bits, scaling, is_dark) -> None:
    limit = 2**n_bits >> 3 * is_dark
    values = integers(limit, n_channels)
    stored = SCALINGS[scaling](values, n_bits).astype(np.uint16)
    content = build_png(stored, (b"sBIT", bytes([n_bits] * n_channels)), depth=16)
    expected = on_white(values / (2**n_bits - 1))
    result = decode_pixels(content, warn=WarnOnce())
    tolerance = 1 if n_channels % 2 else 2
    tolerance += 1 if scaling == "zeros" and n_bits < 10 else 0
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


def save_dark_files(folder: Path) -> dict[str, Path]:
    dark = integers(4096, 3)
    files = {
        "grey.png": build_png(dark[..., :1], depth=16),
        "rgb.png": build_png(dark, depth=16),
        "rgba.png": build_png(
            np.dstack([dark, np.full(SHAPE, 65535)]).astype(int), depth=16
        ),
        "grey.tif": write_tiff(dark[..., 0].astype("u2"), "<"),
        "signed.tif": write_tiff(dark[..., 0].astype("i2"), ">"),
        "rgb.tif": write_tiff(dark.astype("u2"), ">", photometric="rgb"),
        "grey.pgm": build_netpbm(dark[..., :1], 65535, plain=False),
        "rgb.ppm": build_netpbm(dark, 65535, plain=False),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in files}


DARK_FILES = (
    "grey.png rgb.png rgba.png grey.tif signed.tif rgb.tif grey.pgm rgb.ppm".split()
)


@pytest.mark.parametrize("name", DARK_FILES)
def test_small_values_of_files_warn_once(name: str, tmp_path: Path) -> None:
    path = str(save_dark_files(tmp_path)[name])
    Image.new("L", (4, 4)).save(black := tmp_path / "black.png")
    images = MeanColor().validate([black, path, path])
    message = rf"of X\[1\] \('.*{re.escape(name)}'\) is \d+, .*pixel_range=\(black"
    with pytest.warns(UserWarning, match=message) as caught:
        decode_all(images)
    decode_all(images.subset([2]))  # warnings are errors
    images.decode_and_hash(1)
    assert len(caught) == 1
    assert "(0, 4095)" in str(caught[0].message)
    images = MeanColor(pixel_range=(0, 4095)).validate([path])
    assert np.asarray(images[0]).max() > 200


def test_each_kind_of_warning_is_issued(tmp_path: Path) -> None:
    hidden = np.zeros((4, 4, 4), np.uint8)
    hidden[0, 0, 0] = 9
    Image.fromarray(hidden).save(tmp_path / "hidden.png")
    dark = str(save_dark_files(tmp_path)["rgba.png"])
    images = MeanColor().validate([str(tmp_path / "hidden.png"), dark, dark])
    with pytest.warns(UserWarning, match=r"X\[[01]\]") as caught:
        decode_all(images)
    messages = [str(each.message) for each in caught]
    assert ["transparent everywhere" in each for each in messages] == [True, False]
    assert "pixel_range=(black" in messages[1]


def test_other_files_do_not_warn() -> None:
    dark = integers(4096, 1)
    images = [
        build_tiff(dark[..., 0] >> 4, 12, 1),
        build_png(dark, (b"sBIT", b"\x0c"), depth=16),
        build_png(dark << 4, depth=16),
        build_png(np.zeros((4, 4, 1), int), depth=16),
        build_netpbm(dark >> 4, 4095, plain=False),
        write_tiff(random_values("u2"), "<"),
        write_tiff((dark[..., 0] >> 8).astype("u1"), "<"),
        write_tiff(random_values("f4") / 100, "<"),
    ]
    decode_all(MeanColor().validate(images))  # warnings are errors
