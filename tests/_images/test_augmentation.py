"""Named augmentations equal torchvision's, drawn from torch's generator."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from sktl import Preprocessing
from sktl._images.augmentation import AUGMENTATIONS, augmentation_for
from sktl._images.preprocessing import RESIZE_MODES

AT_16 = Preprocessing(18, 16, interpolation="bicubic")
ALL_AUGMENTATIONS = [
    *sorted(AUGMENTATIONS),
    lambda image: transforms.RandomRotation(30)(image),
]


@pytest.fixture
def image(images):
    return Image.fromarray(images[7])


def augment(augmentation, image, seed=0):
    augmentation = augmentation_for(augmentation, AT_16)
    transformed = augmentation.deterministic(image)
    torch.manual_seed(seed)
    return augmentation.random(transformed)


@pytest.mark.parametrize("augmentation", [None, *ALL_AUGMENTATIONS])
@pytest.mark.parametrize("size", [(32, 24), (16, 16), (5, 90), (1, 1)])
def test_output_size(image, augmentation, size):
    for seed in range(5):
        pixels = augment(augmentation, image.resize(size), seed)
        assert pixels.shape == (16, 16, 3)
        assert pixels.dtype == np.uint8


def test_none_is_preprocessing_only(image):
    np.testing.assert_array_equal(augment(None, image), AT_16(image))


def test_flip_mirrors_half_of_the_images(image):
    original, mirrored = AT_16(image), AT_16(ImageOps.mirror(image))
    np.testing.assert_array_equal(mirrored, original[:, ::-1])
    n_mirrored = 0
    for seed in range(100):
        pixels = augment("flip", image, seed)
        is_mirrored = np.array_equal(pixels, mirrored)
        assert is_mirrored or np.array_equal(pixels, original)
        n_mirrored += is_mirrored
    assert 30 <= n_mirrored <= 70


def test_crop_of_an_image_above_the_limit_of_pillow(image, monkeypatch):
    for seed in range(5):
        expected = augment("standard", image, seed)
        with monkeypatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
            np.testing.assert_array_equal(augment("standard", image, seed), expected)


@pytest.mark.parametrize("name", ["standard", "trivial"])
@pytest.mark.parametrize("seed", range(10))
def test_named_augmentations_equal_torchvision(image, name, seed):
    color_transform = {
        "standard": transforms.ColorJitter(0.2, 0.2, 0.2),
        "trivial": transforms.TrivialAugmentWide(),
    }[name]
    torch.manual_seed(seed)
    expected = transforms.RandomResizedCrop(
        16, (0.35, 1.0), interpolation=InterpolationMode.BICUBIC
    )(image)
    expected = color_transform(transforms.RandomHorizontalFlip()(expected))
    np.testing.assert_array_equal(augment(name, image, seed), np.array(expected))


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("name", ["standard", "trivial"])
def test_crops_are_taken_from_the_whole_image(image, name, resize):
    image = image.resize((200, 20))
    torch.manual_seed(3)
    square = Preprocessing(32, 32, "bicubic", resize=resize)(image)
    expected = transforms.RandomResizedCrop(
        16, (0.35, 1.0), interpolation=InterpolationMode.BICUBIC
    )(Image.fromarray(square))
    expected = transforms.RandomHorizontalFlip()(expected)
    augmentation = augmentation_for(name, replace(AT_16, resize=resize))
    if name == "standard":
        expected = transforms.ColorJitter(0.2, 0.2, 0.2)(expected)
    else:
        expected = transforms.TrivialAugmentWide()(expected)
    torch.manual_seed(3)
    got = augmentation.random(augmentation.deterministic(image))
    np.testing.assert_array_equal(got, np.asarray(expected))


@pytest.mark.parametrize("augmentation", ALL_AUGMENTATIONS)
@pytest.mark.parametrize("resize", RESIZE_MODES)
def test_ends_of_long_images_are_shown_unless_cropped(augmentation, resize):
    plain = np.full((40, 200, 3), 100, np.uint8)
    marked = plain.copy()
    marked[:, [*range(40), *range(160, 200)]] = 0, 200, 0
    augmentation = augmentation_for(augmentation, replace(AT_16, resize=resize))
    n_shown = 0
    for seed in range(20):
        pixels = []
        for image in (plain, marked):
            transformed = augmentation.deterministic(Image.fromarray(image))
            torch.manual_seed(seed)
            pixels.append(augmentation.random(transformed))
        n_shown += not np.array_equal(*pixels)
    # TrivialAugment may shift an image of this size beyond its border.
    assert n_shown == 0 if resize == "crop" else n_shown >= 15


@pytest.mark.parametrize("augmentation", ALL_AUGMENTATIONS)
def test_augmentation_depends_on_the_seed(image, augmentation):
    first = [augment(augmentation, image, seed).tobytes() for seed in range(20)]
    again = [augment(augmentation, image, seed).tobytes() for seed in range(20)]
    assert first == again
    assert len(set(first)) > 1


@pytest.mark.parametrize("augmentation", [None, *ALL_AUGMENTATIONS])
def test_deterministic_transform_draws_no_random_numbers(image, augmentation):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    augmentation_for(augmentation, AT_16).deterministic(image)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augmentation", [None, *ALL_AUGMENTATIONS])
def test_random_transform_does_not_modify_its_input(image, augmentation):
    augmentation = augmentation_for(augmentation, AT_16)
    transformed = augmentation.deterministic(image)
    before = np.array(transformed)
    for _ in range(10):
        augmentation.random(transformed)
    np.testing.assert_array_equal(np.array(transformed), before)


@pytest.mark.parametrize("augmentation", [None, *ALL_AUGMENTATIONS])
def test_deterministic_transform_returns_pixels_or_the_image(image, augmentation):
    augmentation = augmentation_for(augmentation, AT_16)
    transformed = augmentation.deterministic(image)
    if augmentation.deterministic_returns_pixels:
        np.testing.assert_array_equal(transformed, AT_16(image))
    else:
        np.testing.assert_array_equal(np.array(transformed), np.array(image))


def test_callable_gets_the_whole_image(image):
    calls = []

    def function(each):
        calls.append((each.mode, each.size))
        return ImageOps.flip(each)

    np.testing.assert_array_equal(augment(function, image), AT_16(ImageOps.flip(image)))
    assert calls == [("RGB", (32, 24))]


@pytest.mark.parametrize("mode", ["L", "1", "P", "YCbCr", "CMYK", "HSV", "RGB"])
def test_callable_may_change_mode_and_size(image, mode):
    pixels = augment(lambda each: each.convert(mode).resize((9, 40)), image)
    expected = AT_16(image.convert(mode).resize((9, 40)).convert("RGB"))
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("other", "name"),
    [(None, "NoneType"), (np.zeros((4, 4, 3), "u1"), "ndarray"), ("a.png", "str")],
)
def test_callable_that_returns_no_image_raises(image, other, name):
    def function(each):
        return other

    with pytest.raises(TypeError, match=rf"PIL image. Got {name} from .*function"):
        augment(function, image)


def test_callable_cannot_modify_images_of_the_user(images):
    from sktl import PretrainedFeatures
    from sktl._images.validation import validate_images

    def function(each):
        ImageDraw.Draw(each).rectangle((0, 0, 32, 24), "red")
        return each

    X = [Image.fromarray(images[0]), images[1].copy()]
    validated = validate_images(X, estimator=PretrainedFeatures(), reset=True)
    for index in range(2):
        assert (augment(function, validated[index]) == [255, 0, 0]).all()
        np.testing.assert_array_equal(np.array(X[index]), images[index])


@pytest.mark.parametrize("mode", ["F", "I", "I;16", "RGBA", "LA"])
def test_callable_that_returns_an_unsupported_mode_raises(image, mode):
    with pytest.raises(ValueError, match=f"Got mode '{mode}'"):
        augment(lambda each: Image.new(mode, each.size), image)
