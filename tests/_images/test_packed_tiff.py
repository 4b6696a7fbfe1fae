"""Grey TIFF files that Pillow does not support agree with the values written."""

import numpy as np
import pytest
from image_files import (
    SHAPE,
    build_tiff,
    decode_pixels,
    integers,
    random_values,
    write_tiff,
)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("n_bits", [3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15])
def test_integers_of_any_bits(n_bits, photometric, byteorder, compress) -> None:
    white = 2**n_bits - 1
    values = integers(white + 1)
    options = {"byteorder": byteorder, "compress": compress}
    content = build_tiff(values, n_bits, photometric, **options)
    expected = (values if photometric else white - values) / white * 255
    result = decode_pixels(content)[..., 0]
    np.testing.assert_allclose(result, expected, rtol=0, atol=0.501)


@pytest.mark.parametrize("fill_order", [1, 2])
@pytest.mark.parametrize("orientation", [1, 6])
def test_orientation_and_fill_order(orientation: int, fill_order: int) -> None:
    values = integers(1024)
    content = build_tiff(values, 10, 1, fill_order=fill_order, orientation=orientation)
    upright = values if orientation == 1 else np.rot90(values, -1)
    result = decode_pixels(content)[..., 0]
    np.testing.assert_allclose(result, upright / 1023 * 255, rtol=0, atol=0.501)


@pytest.mark.parametrize("layout", [{}, {"tile": (16, 32)}, {"compression": "zlib"}])
@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("dtype", ["f2", "f8", "u4", "i4"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_wide_values(photometric, dtype, byteorder, layout) -> None:
    values = integers(1000).astype(dtype)
    content = write_tiff(values, byteorder, photometric=photometric, **layout)
    expected = values.astype(float) / 1000 * 255
    expected = expected if photometric == "minisblack" else 255 - expected
    result = decode_pixels(content, (0, 1000))[..., 0]
    np.testing.assert_allclose(result, expected, rtol=0, atol=0.51)


@pytest.mark.parametrize("dtype", ["f2", "f8"])
def test_range_of_floats(dtype: str) -> None:
    values = random_values("f8").astype(dtype)
    result = decode_pixels(write_tiff(values, ">"))[..., 0]
    np.testing.assert_allclose(result, values * 255.0, rtol=0, atol=0.51)
    with pytest.raises(ValueError, match=r"X\[3\] .* contains floats from"):
        decode_pixels(write_tiff(values * np.dtype(dtype).type(9), ">"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        decode_pixels(write_tiff(np.full(SHAPE, np.inf, dtype), ">"))


def test_unsupported_layout_is_described() -> None:
    content = write_tiff(random_values("f8", 3), "<", photometric="rgb")
    with pytest.raises(ValueError, match=r"X\[3\] .*3 x 64 bits .*floats.*RGB, little"):
        decode_pixels(content)
    content = write_tiff(
        random_values("f8"),
        "<",
        photometric="miniswhite",
        compression="zlib",
        predictor=True,
    )
    with pytest.raises(ValueError, match=r"1 x 64 bits .*floats.*white-is-zero"):
        decode_pixels(content)
