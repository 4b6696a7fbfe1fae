"""Arrays of four channels without an opaque pixel are warned of, and no others."""

import warnings

import numpy as np
import pytest
import torch
from mean_colour import MeanColour, decode_all

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
    for call in (MeanColour().fit, MeanColour().transform):
        with pytest.warns(UserWarning, match=r"X\[1\].*X\[\.\.\., :3\]") as record:
            call(form(stack))
        assert len(record) == 1


@pytest.mark.parametrize("image_shape", [(6, 5, 4), (4, 6, 5)])
def test_flattened_images_warn(image_shape):
    stack = bands()
    if image_shape[0] == 4:
        stack = np.ascontiguousarray(stack.transpose(0, 3, 1, 2))
    rows = stack.reshape(3, -1)
    mean = MeanColour(image_shape=image_shape)
    with pytest.warns(UserWarning, match=r"X\[0\] has four channels") as record:
        mean.fit(rows)
    assert len(record) == 1


def test_images_with_an_opaque_pixel_and_three_channels_do_not_warn():
    stack = bands()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MeanColour().fit(stack[..., :3]).fit(stack[..., 0])
        MeanColour(image_shape=(5, 4)).fit(stack[:, 0].reshape(3, 20))
        stack[:, 2, 3, 3], stack[:, 0, 0, 3] = 255, 0
        images = MeanColour().validate(stack)
    # An opaque pixel keeps its colour, and a transparent one is white.
    pixels = np.stack(decode_all(images))
    np.testing.assert_array_equal(pixels[:, 2, 3], stack[:, 2, 3, :3])
    assert (pixels[:, 0, 0] == 255).all()
