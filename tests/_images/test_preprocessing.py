"""Preprocessing equals the transforms of torchvision."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from reference import whole_in_square
from torchvision import models
from torchvision.transforms import functional as tvf
from torchvision.transforms._presets import ImageClassification

from sktl._images.preprocessing import RESIZE_MODES, Normalization, Preprocessing

RESIZE = tvf.resize


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


SIZES = [(1, 1), (7, 5), (64, 64), (100, 75), (333, 40), (40, 333), (31, 1), (2, 60)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_whole_images_equal_pillow(
    size: tuple[int, int], interpolation: str, resize: str
) -> None:
    mean = (0.2, 0.5, 1.01)  # the last one is clipped
    preprocessing = Preprocessing(50, 28, interpolation, mean, resize=resize)
    image = random_image(*size)
    expected = np.asarray(whole_in_square(image, preprocessing))
    np.testing.assert_array_equal(preprocessing(image), expected)
    if resize == "squash":
        mode = tvf.InterpolationMode(interpolation)
        np.testing.assert_array_equal(tvf.resize(image, [28, 28], mode), expected)


def test_padding_is_zero_after_normalization() -> None:
    preprocessing = Preprocessing(64, 56, resize="pad")
    pixels = torch.from_numpy(preprocessing(random_image(90, 30))[None])
    padding = Normalization(preprocessing)(pixels)[0, :, [0, 17, 18, 36, 37, 55]]
    rounding = 0.5 / 255 / 0.225
    assert padding[:, [0, 1, 4, 5]].abs().max() <= rounding
    assert (padding[:, [2, 3]].abs().amax(2) > rounding).all()


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("size", [(3, 1000), (1000, 3), (1, 60_000), (60_000, 1)])
def test_whole_image_of_extreme_aspect_ratio(
    resize: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = random_image(*size, low=64, high=192)
    sizes = []
    monkeypatch.setattr(
        "torchvision.transforms.functional.resize",
        lambda *arguments: sizes.append(RESIZE(*arguments).size) or RESIZE(*arguments),
    )
    got = Preprocessing(24, 20, "bicubic", resize=resize)(image)
    thin = 20 if resize == "squash" else 1
    shape = (20, thin) if size[0] < size[1] else (thin, 20)
    expected = np.asarray(RESIZE(image, list(shape), tvf.InterpolationMode.BICUBIC))
    rows, columns = ((20 - n) // 2 for n in shape)
    inner = got[rows : rows + shape[0], columns : columns + shape[1]]
    assert np.abs(inner - expected.astype(int)).max() <= 1
    # The longer side is reduced first: otherwise Pillow needs it at 20 times the width.
    assert sizes[0][size[1] > size[0]] == 20


def test_pixels_are_writable_and_not_shared() -> None:
    image = random_image(8, 8)
    before = np.array(image)
    for mode in RESIZE_MODES:
        Preprocessing(8, 8, resize=mode)(image)[:] = 0
        np.testing.assert_array_equal(np.array(image), before)


@pytest.mark.parametrize(
    ("resize", "size"), [("crop", 384), ("squash", 336), ("pad", 336)]
)
def test_min_decode_size_is_that_of_the_resized_image(resize: str, size: int) -> None:
    preprocessing = Preprocessing(256, 224, resize=resize)
    assert preprocessing.min_decode_size(1.5) == size
    assert preprocessing.min_decode_size(None) is None


def test_repr_of_the_default_mode_is_that_of_older_cache_keys() -> None:
    fields = "resize_size=256, crop_size=224, interpolation='bicubic', "
    fields += "mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)"
    default = Preprocessing(256, 224, "bicubic")
    assert repr(default) == f"Preprocessing({fields})"
    assert repr(default.with_image_size(8)) != repr(default)
    padded = Preprocessing(256, 224, "bicubic", resize="pad")
    assert repr(padded) == f"Preprocessing({fields}, resize='pad')"
    assert eval(repr(padded)) == padded != default == eval(repr(default))


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
        ({"resize": "stretch"}, r"resize must be one of \['crop', 'squash', 'pad'\]"),
        ({"interpolation": "cubic"}, "interpolation must be one of .*bicubic"),
        ({"mean": (0.5,)}, "one finite number for each of red, green and blue"),
        ({"std": (1.0, 1.0, 0.0)}, "std must be positive"),
    ],
)
def test_invalid_parameters_raise(change: dict[str, object], message: str) -> None:
    arguments = {"resize_size": 32, "crop_size": 32, **change}
    with pytest.raises(ValueError, match=message):
        Preprocessing(**arguments)  # type: ignore[arg-type]
