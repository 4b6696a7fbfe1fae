"""Preprocessing equals the transforms of torchvision."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize_size", [28, 35, 20])
def test_two_step_modes_equal_torchvision(
    size: tuple[int, int], resize_size: int
) -> None:
    image = random_image(*size)
    squashed = tvf.center_crop(tvf.resize(image, [resize_size] * 2), [28])
    got = Preprocessing(resize_size, 28, resize="squash+crop")(image)
    np.testing.assert_array_equal(got, squashed)

    part = ImageOps.contain(image, (resize_size,) * 2, Image.Resampling.BILINEAR)
    before = [max(0, 28 - n) // 2 for n in part.size]
    after = [(max(0, 28 - n) + 1) // 2 for n in part.size]
    padded = tvf.pad(part, [*before, *after], fill=(124, 116, 104))
    got = Preprocessing(resize_size, 28, resize="pad+crop")(image)
    np.testing.assert_array_equal(got, tvf.center_crop(padded, [28]))


@pytest.mark.parametrize("resize", ["crop", "squash", "pad+crop"])
def test_one_channel_is_that_of_pillow(resize: str) -> None:
    image = random_image(50, 31)
    grey = Preprocessing(36, 28, "bicubic", (0.3,), (0.2,), resize)
    assert grey.n_channels == 1
    same = dataclasses.replace(grey, mean=grey.mean * 3, std=grey.std * 3)
    resized = same(image.convert("L").convert("RGB"))
    pixels = grey(image)
    np.testing.assert_array_equal(pixels, resized)

    got = Normalization(grey)(torch.from_numpy(pixels[None]))

    assert got.shape == (1, 1, 28, 28)
    expected = (pixels[None, None, :, :, 0] / 255 - 0.3) / 0.2
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_colored_pixels_are_normalized_to_their_luminance() -> None:
    image = random_image(64, 64)  # such as random augmentation returns
    preprocessing = Preprocessing(64, 64, mean=(0.0,), std=(1.0,))
    got = Normalization(preprocessing)(torch.from_numpy(np.array(image)[None]))
    np.testing.assert_array_equal((got[0, 0] * 255).round(), image.convert("L"))


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
    for mode in (*RESIZE_MODES, "squash+crop", "pad+crop"):
        Preprocessing(8, 8, resize=mode)(image)[:] = 0
        np.testing.assert_array_equal(np.array(image), before)


@pytest.mark.parametrize(
    ("resize", "size"),
    [
        *(("crop", 384), ("squash", 336), ("pad", 336)),
        *(("squash+crop", 384), ("pad+crop", 384)),
    ],
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


TIMM_CFG = {
    "input_size": (3, 40, 40),
    "mean": (0.1, 0.5, 1.0),
    "std": (0.5, 0.25, 0.3),
    "interpolation": "bilinear",
}


@pytest.mark.parametrize("size", [*SIZES, (153, 576)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border", None])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875, 1.15, None])
def test_equals_transform_of_timm(
    size: tuple[int, int], crop_mode: str | None, crop_pct: float | None
) -> None:
    data = pytest.importorskip("timm.data")
    cfg = {**TIMM_CFG, "crop_mode": crop_mode, "crop_pct": crop_pct}
    image = random_image(*size)
    for interpolation in ("bilinear", "bicubic"):
        cfg["interpolation"] = interpolation
        preprocessing = Preprocessing.from_timm(cfg)
        pixels = preprocessing(image)
        uint8 = data.create_transform(**cfg, normalize=False)(image)  # (3, h, w)
        np.testing.assert_array_equal(pixels, uint8.permute(1, 2, 0))
        got = Normalization(preprocessing)(torch.from_numpy(pixels[None]))[0]
        expected = data.create_transform(**cfg)(image)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        if size == (100, 75):
            # timm's datasets convert images to grey before the transform.
            grey = {**cfg, "input_size": (1, 40, 40), "mean": (0.7,), "std": (0.4,)}
            expected = data.create_transform(**grey)(image.convert("L"))
            preprocessing = Preprocessing.from_timm(grey)
            pixels = torch.from_numpy(preprocessing(image)[None])
            got = Normalization(preprocessing)(pixels)[0]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_border_of_timm_rounds_the_shorter_side_as_timm() -> None:
    # 224 * 153 / 576 is 59.5, which timm rounds to 59 and "pad" to 60.
    cfg = {"input_size": (3, 224, 224), "crop_pct": 1.0, "crop_mode": "border"}
    preprocessing = Preprocessing.from_timm(cfg)
    got = preprocessing(Image.new("RGB", (153, 576), (255, 0, 0)))
    assert (got[0, :, 0] == 255).sum() == round(153 / (576 / 224)) == 59


def test_from_timm_uses_the_defaults_of_timm() -> None:
    cfg = {"url": "https://x", "input_size": [3, 224, 224], "test_input_size": [3] * 3}
    assert Preprocessing.from_timm(cfg) == Preprocessing(256, 224, "bicubic")
    cfg |= {"crop_mode": "squash", "crop_pct": 1.0, "mean": [0.5] * 3, "std": [1] * 3}
    expected = Preprocessing(224, 224, "bicubic", (0.5,) * 3, (1.0,) * 3, "squash")
    assert Preprocessing.from_timm(cfg) == expected
    expected = dataclasses.replace(expected, resize_size=248, resize="squash+crop")
    assert Preprocessing.from_timm({**cfg, "crop_pct": 0.9}) == expected


def test_from_timm_takes_the_objects_of_timm() -> None:
    timm = pytest.importorskip("timm")
    cfg = timm.get_pretrained_cfg("dm_nfnet_f0.dm_in1k")
    expected = (213, 192, "squash+crop")
    resolved = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
    for each in (cfg, cfg.to_dict(), resolved):
        got = Preprocessing.from_timm(each)
        assert (got.resize_size, got.crop_size, got.resize) == expected


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        ("resnet18", TypeError, "cfg must be a pretrained_cfg of timm"),
        ({"architecture": "x"}, ValueError, "input_size in cfg must be .* Got None"),
        ({"input_size": (3, 1024, 768)}, ValueError, "side, side.*1024, 768"),
        ({**TIMM_CFG, "input_size": (4, 8, 8)}, ValueError, "1 or 3 channels"),
        ({**TIMM_CFG, "input_size": (1, 8, 8)}, ValueError, "for each channel of"),
        ({**TIMM_CFG, "crop_mode": "top"}, ValueError, "crop_mode in cfg must be one"),
        ({**TIMM_CFG, "interpolation": "random"}, ValueError, "interpolation must be"),
    ],
)
def test_invalid_configuration_of_timm_raises(
    cfg: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Preprocessing.from_timm(cfg)


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
        ({"resize": "stretch"}, r"resize must be one of \['crop', 'squash'"),
        ({"interpolation": "cubic"}, "interpolation must be one of .*bicubic"),
        ({"mean": (0.5,)}, "one finite number for each of red, green and blue"),
        ({"mean": (0.5,) * 2, "std": (1.0,) * 2}, "or both have one for grey images"),
        ({"std": (1.0, 1.0, 0.0)}, "std must be positive"),
    ],
)
def test_invalid_parameters_raise(change: dict[str, object], message: str) -> None:
    arguments = {"resize_size": 32, "crop_size": 32, **change}
    with pytest.raises(ValueError, match=message):
        Preprocessing(**arguments)  # type: ignore[arg-type]
