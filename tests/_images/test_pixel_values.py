"""Pixels are scaled to uint8 by the values of black and white."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mean_color import (
    GREY,
    RNG,
    STACK,
    MeanColor,
    check_images,
    decode_all,
    repeat_grey,
)

from sktl._images.pixel_values import to_uint8

DTYPES = st.sampled_from(
    [np.uint8, np.int8, np.uint16, np.int16, np.int64, np.float16, np.float32]
)


@given(
    DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, (2, 3), elements=None)), st.data()
)
def test_to_uint8_equals_the_formula(values: np.ndarray, data: st.DataObject) -> None:
    values = np.nan_to_num(values)
    black = data.draw(st.integers(-300, 300))
    white = black + data.draw(st.integers(1, 70_000))
    expected = [
        [
            round((min(max(float(v), black), white) - black) / (white - black) * 255)
            for v in row
        ]
        for row in values
    ]
    np.testing.assert_array_equal(to_uint8(values, (black, white)), expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.int8([-128, 0, 127]), [0, 128, 255]),
        (np.uint16([0, 257, 65535]), [0, 1, 255]),
        (np.float32([0, 0.5, 1, 7]), [0, 128, 255, 255]),
        (np.array([False, True]), [0, 255]),
    ],
)
def test_auto_range_is_that_of_the_dtype(values: np.ndarray, expected: list) -> None:
    assert to_uint8(values, "auto").tolist() == expected


def test_uint8_is_not_copied() -> None:
    assert to_uint8(STACK, "auto") is STACK


def test_scaling_makes_no_large_copies() -> None:
    values = np.zeros((1000, 1000), np.uint16)
    tracemalloc.start()
    try:
        to_uint8(values, "auto")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.1 * values.size * (8 + 1)  # a float64, and the result


@pytest.mark.parametrize(
    ("dtype", "pixel_range", "black", "white"),
    [
        (np.uint8, (10, 200), 10, 200),
        (np.uint16, "auto", 0, 65535),
        (np.int8, "auto", -128, 127),
        (np.int16, "auto", -32768, 32767),
        (np.int64, (0, 255), 0, 255),
        (np.float64, "auto", 0, 1),
        (np.float16, (-1, 1), -1, 1),
        (np.float32, [0, 16], 0, 16),
    ],
)
def test_pixel_range(
    dtype: type, pixel_range: object, black: float, white: float
) -> None:
    X = (black + RNG.random((2, 5, 5)) * (white - black)).astype(dtype)
    scaled = (X.astype(np.float64) - black) / (white - black) * 255
    expected = repeat_grey(np.round(scaled).clip(0, 255))
    check_images(X, expected, pixel_range=pixel_range)
    check_images(list(X), expected, pixel_range=pixel_range)
    check_images(X.reshape(2, 25), expected, pixel_range=pixel_range)


@pytest.mark.parametrize("pixel_range", ["auto", (0, 255)])
def test_booleans_are_black_and_white(pixel_range: object) -> None:
    X = GREY > 127
    expected = repeat_grey(X * np.uint8(255))
    for form in (X, X[..., np.newaxis], list(X), torch.from_numpy(X)):
        check_images(form, expected, pixel_range=pixel_range)
    check_images(
        X.reshape(3, 30), expected, pixel_range=pixel_range, image_shape=(6, 5)
    )


@pytest.mark.parametrize(
    ("X", "pixel_range", "message"),
    [
        (
            np.float32([[[0, 2]], [[-1, 3]]]),
            "auto",
            "^X has values from -1 to 3;.*0, 1",
        ),
        (np.uint8([[[0, 99]]]), (10, 20), r"^X has values from 0 to 99;.*\(10, 20\)"),
        (
            [np.zeros((1, 1)), np.full((1, 2), 7.0)] * 3,
            "auto",
            r"^X\[1\] has values from 7",
        ),
        (np.zeros((2, 4, 5), np.int64), "auto", "^X has dtype int64.*full range"),
        ([np.zeros((1, 1), np.uint32)] * 3, "auto", r"^X\[0\] has dtype uint32.*full"),
    ],
)
def test_values_outside_pixel_range_warn_once(X, pixel_range, message) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        images = MeanColor(pixel_range=pixel_range).validate(X)
    decode_all(images)  # raises if it warns again
    assert len(caught) == 1
    assert "Set pixel_range=" in str(caught[0].message)


DARK = RNG.integers(1, 4096, (3, 6, 5), dtype=np.uint16)
BRIGHT = RNG.integers(0, 65536, (3, 6, 5), dtype=np.uint16)
OPAQUE = np.full((3, 6, 5, 1), 65535, np.uint16)
BLACK_8 = np.zeros((3, 6, 5), np.uint8)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (DARK, r"largest value of X\[0\] is \d+, .*65535, .*\(0, 4095\)"),
        (list(DARK), r"largest value of X\[0\] is .*\(0, 4095\)"),
        (
            torch.from_numpy(DARK.astype(np.int16)),
            r"absolute value of X\[0\] is ",
        ),
        (DARK.astype(np.int16) - 1000, r"largest absolute value of X\[0\] is "),
        (np.concatenate([BRIGHT, DARK]), r"X\[3\] is "),
        ([*BRIGHT, *DARK], r"X\[3\] is "),
        (DARK.reshape(3, 30), r"X\[0\] is "),
        (np.concatenate([DARK[..., np.newaxis]] * 3 + [OPAQUE], axis=3), r"X\[0\] is "),
        (GREY >> 4, r"X\[0\] is 15, .* 255, .*\(0, 15\)"),
        ([BLACK_8[0], *(GREY >> 7)], r"X\[1\] is 1, "),
    ],
)
def test_values_far_below_the_range_warn_once(X, message) -> None:
    image_shape = (6, 5) if len(X[0].shape) == 1 else "auto"
    with pytest.warns(UserWarning, match=message) as caught:
        images = MeanColor(image_shape=image_shape).validate(X)
    decode_all(images)  # raises if it warns again
    assert len(caught) == 1
    MeanColor(image_shape=image_shape, pixel_range=(-(2**15), 2**16)).validate(X)


@pytest.mark.parametrize(
    "X",
    [
        BRIGHT,
        np.full((1, 2, 2), 8192, np.uint16),  # an eighth
        np.zeros((2, 6, 5), np.uint16),
        np.concatenate([GREY >> 4, GREY]),  # single dark images of 8 bits are common
        [*(GREY >> 4), *GREY],
        np.full((2, 2, 2), 32, np.uint8),
        np.full((1, 2, 2), 1, np.uint8),
        BLACK_8,
        DARK > 7,
        np.float32(GREY) / 10_000,
    ],
)
def test_other_values_do_not_warn(X) -> None:
    MeanColor().validate(X)  # warnings are errors


def test_values_outside_pixel_range_are_clipped() -> None:
    with pytest.warns(UserWarning, match="are clipped"):
        images = MeanColor().validate(np.float64([[[-5, 0, 0.2, 1, 99]]]))
    assert np.asarray(images[0])[0, :, 0].tolist() == [0, 0, 51, 255, 255]


@pytest.mark.parametrize(
    "pixel_range",
    [(1, 0), (3, 3), (0,), (0, np.inf), (np.nan, 1), ("0", "1"), None, "a"],
)
def test_invalid_pixel_range_raises(pixel_range: object) -> None:
    with pytest.raises(ValueError, match="pixel_range must be 'auto' or a pair"):
        MeanColor(pixel_range=pixel_range).fit(STACK)
