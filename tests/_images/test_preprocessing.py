"""Preprocessing equals the transforms of torchvision."""

import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision import models
from torchvision.transforms import functional as tvf
from torchvision.transforms._presets import ImageClassification

from sktl._images.preprocessing import Preprocessing


def random_image(width: int, height: int, low: int = 0, high: int = 256) -> Image.Image:
    pixels = np.random.default_rng(0).integers(low, high, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (7, 5), (64, 64), (100, 75), (333, 40), (40, 333), (31, 1), (1, 31)],
)
@pytest.mark.parametrize(
    "preset",
    [
        ImageClassification(crop_size=56, resize_size=64),
        ImageClassification(crop_size=65, resize_size=41),
        models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.transforms(),
    ],
    ids=["resnet", "padded", "bicubic"],
)
def test_pixels_equal_torchvision(
    width: int, height: int, preset: ImageClassification
) -> None:
    image = random_image(width, height)
    preset.mean, preset.std = [0.0] * 3, [1.0] * 3
    # (3, h, w) from 0 to 1 -> (h, w, 3) from 0 to 255
    expected = (preset(image).permute(1, 2, 0).numpy() * 255).round()

    got = Preprocessing.from_torchvision(preset)(image)

    assert got.dtype == np.uint8
    assert got.shape == (preset.crop_size[0], preset.crop_size[0], 3)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("size", [(3, 1000), (1000, 3), (1, 33), (5, 161), (7, 2000)])
@pytest.mark.parametrize("crop_size", [32, 41, 80])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_elongated_images_are_resized_in_part(
    size: tuple[int, int], crop_size: int, interpolation: str
) -> None:
    # Without pixels near black and white: there, Pillow clips the overshoot of bicubic
    # interpolation between its passes over rows and columns, whose order depends on the
    # sizes.
    image = random_image(*size, low=64, high=192)
    preprocessing = Preprocessing(40, crop_size, interpolation)
    mode = preprocessing.interpolation
    whole = tvf.resize(image, [40], tvf.InterpolationMode(mode))
    expected = np.asarray(tvf.center_crop(whole, [crop_size]), dtype=int)

    got = preprocessing(image)

    assert np.abs(got - expected).max() <= 1
    assert max(preprocessing._resize_center(image).size) <= max(crop_size, 40)


def test_extremely_elongated_image() -> None:
    # Resized as a whole, it would have 256 x 15 360 000 pixels: 12 GB.
    image = Image.new("RGB", (1, 60000), (10, 20, 30))
    got = Preprocessing(256, 224)(image)
    assert (got == (10, 20, 30)).all()


def test_pixels_are_writable_and_not_shared() -> None:
    image = random_image(8, 8)
    before = np.array(image)
    Preprocessing(8, 8)(image)[:] = 0
    np.testing.assert_array_equal(np.array(image), before)


def test_from_torchvision() -> None:
    weights = models.EfficientNet_B0_Weights.IMAGENET1K_V1
    got = Preprocessing.from_torchvision(weights.transforms())
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert got == Preprocessing(256, 224, "bicubic", mean, std)
    assert got.with_image_size(96) == Preprocessing(96, 96, "bicubic", mean, std)


def test_equality_and_immutability() -> None:
    one = Preprocessing(32, 32, mean=[0, 0, 0], std=[1, 1, 1])  # type: ignore[arg-type]
    other = Preprocessing(32, 32, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert one == other == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(other)
    assert repr(one) == repr(other)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.crop_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_size": 0}, "resize_size must be at least 1"),
        ({"crop_size": -1}, "crop_size must be at least 1"),
        ({"crop_size": 10_001}, "crop_size must be at least 1 and at most 10000"),
        ({"resize_size": float("inf")}, "resize_size must be at least 1 and at most"),
        ({"mean": (0.5, 0.5, float("nan"))}, "one finite number"),
        ({"interpolation": "cubic"}, "interpolation must be one of .*bicubic"),
        ({"mean": (0.5,)}, "one finite number for each of red, green and blue"),
        ({"std": (1.0, 1.0, 0.0)}, "std must be positive"),
    ],
)
def test_invalid_parameters_raise(change: dict[str, object], message: str) -> None:
    arguments = {"resize_size": 32, "crop_size": 32, **change}
    with pytest.raises(ValueError, match=message):
        Preprocessing(**arguments)  # type: ignore[arg-type]
