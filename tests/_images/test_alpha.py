"""Arrays of four channels without an opaque pixel are warned of, and no others."""

import warnings

import numpy as np
import pytest
import torch
from mean_color import MeanColor, decode_all, encode_png
from PIL import Image

from sktl._images.alpha import is_nowhere_opaque

RNG = np.random.default_rng(0)


def bands(dtype="u1", largest=11):
    """Return three images of red, green, blue and a fourth channel."""
    stack = RNG.integers(0, 101, (3, 6, 5, 4)).astype(dtype)
    stack[..., 3] = stack[..., 3] * (largest / 100)
    return stack


@pytest.mark.parametrize(
    ("dtype", "pixel_range", "opaque", "translucent"),
    [
        ("u1", "auto", 255, 254),
        ("u2", "auto", 65_500, 65_000),  # rounded to 255 and 253
        ("u2", (0, 4095), 4095, 4000),
        ("u2", (0, 4095), 65_535, 4000),
        ("i2", "auto", 32_767, 32_000),
        ("f4", "auto", 0.999, 0.99),
        ("f8", (-1, 1), 1, 0.9),
        ("?", "auto", True, False),
    ],
)
def test_is_nowhere_opaque(dtype, pixel_range, opaque, translucent):
    pixels = np.zeros((6, 5, 4), dtype)
    pixels[..., :3] = opaque
    assert is_nowhere_opaque(pixels, pixel_range)
    pixels[..., 3] = translucent
    assert is_nowhere_opaque(pixels, pixel_range)
    for row, column in ((3, 0), (0, 4), (5, 2)):
        some = pixels.copy()
        some[row, column, 3] = opaque
        assert not is_nowhere_opaque(some, pixel_range)


@pytest.mark.parametrize("shape", [(6, 5), (6, 4), (6, 5, 1), (6, 4, 3)])
def test_other_numbers_of_channels(shape):
    assert not is_nowhere_opaque(np.zeros(shape, np.uint8), "auto")


@pytest.mark.parametrize(
    "form",
    [
        lambda stack: stack,
        torch.from_numpy,
        list,
        lambda stack: list(torch.from_numpy(stack)),
        lambda stack: [np.zeros((4, 4), np.uint8), *stack[1:]],
    ],
)
@pytest.mark.parametrize("largest", [0, 11])
def test_a_fourth_channel_that_is_no_transparency_warns_once(form, largest):
    stack = bands(largest=largest)
    stack[0, 0, 0, 3] = 255  # only the other images have no opaque pixel
    for call in (MeanColor().fit, MeanColor().transform):
        with pytest.warns(UserWarning, match=r"X\[1\].*X\[\.\.\., :3\]") as record:
            call(form(stack))
        assert len(record) == 1


@pytest.mark.parametrize("image_shape", [(6, 5, 4), (4, 6, 5)])
def test_flattened_images_warn(image_shape):
    stack = bands()
    if image_shape[0] == 4:
        stack = np.ascontiguousarray(stack.transpose(0, 3, 1, 2))
    rows = stack.reshape(3, -1)
    mean = MeanColor(image_shape=image_shape)
    with pytest.warns(UserWarning, match=r"X\[0\] has four channels") as record:
        mean.fit(rows)
    assert len(record) == 1


def test_images_with_an_opaque_pixel_and_three_channels_do_not_warn():
    stack = bands()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MeanColor().fit(stack[..., :3]).fit(stack[..., 0])
        MeanColor(image_shape=(5, 4)).fit(stack[:, 0].reshape(3, 20))
        stack[:, 2, 3, 3], stack[:, 0, 0, 3] = 255, 0
        images = MeanColor().validate(stack)
    # An opaque pixel keeps its color, and a transparent one is white.
    pixels = np.stack(decode_all(images))
    np.testing.assert_array_equal(pixels[:, 2, 3], stack[:, 2, 3, :3])
    assert (pixels[:, 0, 0] == 255).all()


@pytest.mark.parametrize("form", ["path", "bytes", "PIL"])
@pytest.mark.parametrize("alpha", [0, 1])
def test_files_that_are_transparent_everywhere_warn_once(form, alpha, tmp_path):
    pixels = bands(largest=0)
    pixels[:, 0, 0, 3] = alpha
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, each in zip(paths, pixels, strict=True):
        path.write_bytes(encode_png(each))
    X = {
        "path": paths,
        "bytes": [path.read_bytes() for path in paths],
        "PIL": [Image.fromarray(each) for each in pixels],
    }[form]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        decoded = decode_all(MeanColor().validate(X))
    assert (np.stack(decoded)[:, 1:] == 255).all()
    messages = [str(warning.message) for warning in record]
    assert len(messages) == (alpha == 0)
    assert all("X[0]" in m and "transparent everywhere" in m for m in messages)


def test_blank_transparent_image_does_not_warn():
    blank = Image.new("RGBA", (6, 5), (9, 9, 9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (decode_all(MeanColor().validate([blank]))[0] == 255).all()
