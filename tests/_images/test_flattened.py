"""Rows of numbers are flattened images, in the layout that `image_shape` says."""

import numpy as np
import pytest
import torch

from sktl._images.flattened import check_image_shape, infer_flattened_shape, unflatten


@pytest.mark.parametrize(
    ("image_shape", "layout"),
    [
        ((6, 5), "hw"),
        ((6, 5, 1), "hwc"),
        ((6, 5, 3), "hwc"),
        ((6, 5, 4), "hwc"),
        ((1, 6, 5), "chw"),
        ((3, 6, 5), "chw"),
        ((4, 6, 5), "chw"),
        ((3, 6, 4), "hwc"),  # the last number decides
        ((1, 6, 3), "hwc"),
        ((3, 3, 3), "hwc"),
        ([3, np.int64(6), 5], "chw"),
    ],
)
def test_layout(image_shape, layout):
    check_image_shape(image_shape)
    rows = np.arange(2 * np.prod(image_shape)).reshape(2, -1)
    shape = infer_flattened_shape(rows.shape[1], image_shape)
    images = torch.from_numpy(rows).unflatten(1, [int(side) for side in image_shape])
    expected = images.permute(0, 2, 3, 1) if layout == "chw" else images
    np.testing.assert_array_equal(unflatten(rows, shape), expected)
    np.testing.assert_array_equal(unflatten(rows[1], shape), expected[1])
    assert np.shares_memory(unflatten(rows, shape), rows)


@pytest.mark.parametrize("n_features", [1, 4, 16, 64, 784, 1024, 3])
def test_rows_without_a_choice_do_not_warn(n_features):
    side = int(np.sqrt(n_features))
    expected = (1, 1, 3) if n_features == 3 else (side, side)
    assert infer_flattened_shape(n_features, "auto") == expected


@pytest.mark.parametrize("side", [2, 8, 32, 224])
def test_square_color_images_warn(side):
    message = rf"channels last.*image_shape=\(3, {side}, {side}\) if all red.* CIFAR-10"
    with pytest.warns(UserWarning, match=message):
        assert infer_flattened_shape(3 * side**2, "auto") == (side, side, 3)


@pytest.mark.parametrize("image_shape", [(5, 6, 7), (2, 6, 5), (3.0, 6, 5)])
def test_image_shape_without_a_number_of_channels(image_shape):
    with pytest.raises(ValueError, match=r"or \(channels, height, width\) in pix"):
        check_image_shape(image_shape)
