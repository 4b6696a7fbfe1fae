"""Files of every bit depth agree with independent readers of the same files."""

import io
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tifffile
from image_files import (
    LAYOUTS,
    SHAPE,
    build_netpbm,
    build_png,
    build_tiff,
    decode_pixels,
    integers,
    random_values,
    write_tiff,
)
from PIL import Image


def read_tiff(content: bytes) -> np.ndarray:
    """Return 8-bit values, which are composited on white by hand, from tifffile."""
    page = tifffile.TiffFile(io.BytesIO(content)).pages[0]
    values = page.asarray()
    if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        values = np.moveaxis(values, 0, -1)
    if values.dtype == np.int8:  # read as unsigned, as by ImageMagick
        values = values.view(np.uint8)
    if values.dtype.kind == "f":
        black, white = 0, 1
    else:
        black, white = np.iinfo(values.dtype).min, np.iinfo(values.dtype).max
    scaled = (values.astype(float) - black) / (white - black) * 255
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        scaled = 255 - scaled
    if scaled.ndim == 2:
        return np.repeat(scaled[..., np.newaxis], 3, axis=-1)
    if scaled.shape[-1] == 4:
        alpha = scaled[..., 3:] / 255
        return scaled[..., :3] * alpha + 255 * (1 - alpha)
    return scaled


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "f4"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_grey_tiff_agrees_with_tifffile(photometric, dtype, byteorder, layout) -> None:
    content = write_tiff(
        random_values(dtype), byteorder, photometric=photometric, **LAYOUTS[layout]
    )
    expected = read_tiff(content)
    np.testing.assert_allclose(decode_pixels(content), expected, rtol=0, atol=0.501)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
@pytest.mark.parametrize("n_channels", [3, 4])
def test_color_tiff_agrees_with_tifffile(
    n_channels, planarconfig, dtype, byteorder, layout
) -> None:
    options = {"photometric": "rgb", "planarconfig": planarconfig, **LAYOUTS[layout]}
    if n_channels == 4:
        options["extrasamples"] = ["unassalpha"]
    content = write_tiff(random_values(dtype, n_channels), byteorder, **options)
    expected = read_tiff(content)
    # Pillow truncates colors and alpha to 8 bits.
    np.testing.assert_allclose(decode_pixels(content), expected, rtol=0, atol=3)


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_white_is_zero_with_alpha(photometric: str, byteorder: str) -> None:
    grey, alpha = random_values("u1"), random_values("u1")
    content = write_tiff(
        np.stack([grey, alpha], axis=-1),
        byteorder,
        photometric=photometric,
        planarconfig="contig",
        extrasamples=["unassalpha"],
    )
    if photometric == "miniswhite":
        grey = 255 - grey
    expected = grey * (alpha / 255) + 255 - alpha
    assert abs(decode_pixels(content)[..., 0] - expected).max() <= 1


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("dtype", ["u2", "i2", "i4", "u4", "f4"])
def test_pixel_range_applies_to_deep_tiff(dtype: str, photometric: str) -> None:
    values = integers(3000).astype(dtype)
    content = write_tiff(values, "<", photometric=photometric)
    expected = np.rint((values.astype(float) - 100) / 2000 * 255).clip(0, 255)
    if photometric == "miniswhite":
        expected = 255 - expected
    for image in (content, Image.open(io.BytesIO(content)) if dtype == "u2" else None):
        if image is not None:
            result = decode_pixels(image, (100, 2100))
            np.testing.assert_array_equal(result[..., 0], expected)


def test_unsigned_integers_of_32_bits_are_not_negative() -> None:
    values = np.uint32([[0, 2**31, 2**32 - 1]])
    result = decode_pixels(write_tiff(values, "<"), (0, 2**32 - 1))
    assert result[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("form", ["path", "PIL", "loaded PIL"])
@pytest.mark.parametrize("dtype", ["u2", "i2", "f4"])
def test_white_is_zero_in_other_forms(dtype: str, form: str, tmp_path: Path) -> None:
    values = random_values(dtype)
    if dtype == "i2":  # white-is-zero is not opened by Pillow
        content = write_tiff(values, ">", photometric="minisblack", compression="zlib")
        form = "PIL" if form == "loaded PIL" else form
    else:
        content = write_tiff(values, "<", photometric="miniswhite")
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    image = path if form == "path" else Image.open(path)
    if form == "loaded PIL":
        image.load()
    np.testing.assert_array_equal(decode_pixels(image), decode_pixels(content))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("fill_order", [1, 2])
@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("n_bits", [1, 2, 4, 8])
def test_tiff_of_few_bits(n_bits, photometric, byteorder, fill_order, compress) -> None:
    white = 2**n_bits - 1
    values = integers(white + 1)
    content = build_tiff(
        values,
        n_bits,
        photometric,
        byteorder=byteorder,
        fill_order=fill_order,
        compress=compress,
    )
    expected = (values if photometric == 1 else white - values) * (255 // white)
    np.testing.assert_array_equal(decode_pixels(content)[..., 0], expected)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("photometric", [0, 1])
def test_tiff_of_12_bits(photometric: int, compress: bool) -> None:
    values = integers(4096)
    content = build_tiff(values, 12, photometric, compress=compress)
    expected = np.rint((values if photometric else 4095 - values) / 4095 * 255)
    for image in (content, Image.open(io.BytesIO(content)) if photometric else content):
        assert abs(decode_pixels(image)[..., 0] - expected).max() <= (photometric == 0)
    result = decode_pixels(content, (0, 2047))[..., 0]
    expected = np.rint(values / 2047 * 255).clip(0, 255)
    np.testing.assert_array_equal(result, expected if photometric else 255 - expected)


def test_missing_interpretation_of_16_bits_is_black_is_zero() -> None:
    values = integers(65536)
    # The packed bits are those of big-endian integers.
    content = build_tiff(values.astype("u2").byteswap(), 16, None)
    result = decode_pixels(content)[..., 0]
    np.testing.assert_allclose(result, values / 257, rtol=0, atol=0.501)
    with pytest.raises(ValueError, match="1 x 16 bits"):
        decode_pixels(build_tiff(values, 16, None, byteorder=">"))


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_bigtiff(photometric: str) -> None:
    content = write_tiff(
        random_values("u2"), "<", bigtiff=True, photometric=photometric
    )
    expected = read_tiff(content)
    np.testing.assert_allclose(decode_pixels(content), expected, rtol=0, atol=0.501)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_big_endian_bigtiff_is_described() -> None:
    content = write_tiff(random_values("u2"), ">", bigtiff=True)
    with pytest.raises(ValueError, match=r"1 x 16 bits .*big-endian BigTIFF"):
        decode_pixels(content)


def generated_files() -> dict[str, bytes]:
    """Return files of every depth, interpretation and layout with a fixed range."""
    files = {}
    for photometric, dtype, byteorder, layout in itertools.product(
        ("minisblack", "miniswhite"), ("u1", "u2"), "<>", LAYOUTS
    ):
        files[f"{photometric} {dtype} {byteorder} {layout}"] = write_tiff(
            random_values(dtype), byteorder, photometric=photometric, **LAYOUTS[layout]
        )
    for dtype, planarconfig, byteorder, layout in itertools.product(
        ("u1", "u2"), ("contig", "separate"), "<>", LAYOUTS
    ):
        files[f"rgb {dtype} {planarconfig} {byteorder} {layout}"] = write_tiff(
            random_values(dtype, 3),
            byteorder,
            photometric="rgb",
            planarconfig=planarconfig,
            **LAYOUTS[layout],
        )
    for n_bits, photometric, fill_order in itertools.product(
        (1, 2, 4, 8, 12), (0, 1), (1, 2)
    ):
        if n_bits < 12 or fill_order == 1:
            values = integers(2**n_bits)
            files[f"{n_bits} bits {photometric} {fill_order}"] = build_tiff(
                values, n_bits, photometric, fill_order=fill_order
            )
    for n_channels, plain, maximum in itertools.product(
        (1, 3), (False, True), (15, 255, 1023, 65535)
    ):
        values = integers(maximum + 1, n_channels)
        files[f"netpbm {n_channels} {plain} {maximum}"] = build_netpbm(
            values, maximum, plain=plain
        )
    for n_channels in (1, 3):
        values = integers(65536, n_channels)
        files[f"png {n_channels}"] = build_png(values, depth=16)
    return files


FILES = generated_files()
# ImageMagick 6 inverts 1, 8 and 16 bits only; libvips and Pillow also 2 and 4.
NOT_INVERTED = [f"{n} bits 0 {order}" for n in (2, 4, 12) for order in (1, 2)]


READ_BY_LIBVIPS = [
    name
    for name in FILES
    if not re.match("12 bits|netpbm|rgb .* separate .*tiles", name)
]


def read_with_imagemagick(content: bytes) -> np.ndarray:
    command = [shutil.which("magick") or "convert", "-", "-depth", "8", "rgb:-"]
    run = subprocess.run(command, input=content, capture_output=True, check=True)
    return np.frombuffer(run.stdout, np.uint8).reshape(*SHAPE, 3)


def read_with_vips(content: bytes) -> np.ndarray:
    vips = pytest.importorskip("pyvips")
    values = vips.Image.new_from_buffer(content, "").numpy()
    values = values.reshape(*SHAPE, -1)[..., :3] / np.iinfo(values.dtype).max * 255
    return np.broadcast_to(values, (*SHAPE, 3))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("convert"), reason="needs ImageMagick")
@pytest.mark.parametrize("name", [name for name in FILES if name not in NOT_INVERTED])
def test_file_agrees_with_imagemagick(name: str) -> None:
    expected = read_with_imagemagick(FILES[name]).astype(float)
    np.testing.assert_allclose(decode_pixels(FILES[name]), expected, rtol=0, atol=1)


@pytest.mark.parametrize("name", READ_BY_LIBVIPS)
def test_file_agrees_with_libvips(name: str) -> None:
    expected = read_with_vips(FILES[name])
    np.testing.assert_allclose(decode_pixels(FILES[name]), expected, rtol=0, atol=1)
