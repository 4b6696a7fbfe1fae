"""Variations by name are torchvision's, drawn from torch's generator."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from sktl import Preprocessing
from sktl._images.augmentation import NAMES, augmentation_for

AT_16 = Preprocessing(18, 16, interpolation="bicubic")
VARIED = [*sorted(NAMES), lambda image: transforms.RandomRotation(30)(image)]


@pytest.fixture
def image(images):
    return Image.fromarray(images[7])


def varied(augmentation, image, seed=0):
    augmentation = augmentation_for(augmentation, AT_16)
    prepared = augmentation.deterministic(image)
    torch.manual_seed(seed)
    return augmentation.random(prepared)


@pytest.mark.parametrize("augmentation", [None, *VARIED])
@pytest.mark.parametrize("size", [(32, 24), (16, 16), (5, 90), (1, 1)])
def test_pixels_of_the_size_asked_for(image, augmentation, size):
    for seed in range(5):
        pixels = varied(augmentation, image.resize(size), seed)
        assert pixels.shape == (16, 16, 3)
        assert pixels.dtype == np.uint8


def test_none_is_the_preprocessing(image):
    np.testing.assert_array_equal(varied(None, image), AT_16(image))


def test_flip_exchanges_left_and_right_in_half_of_the_cases(image):
    straight, mirrored = AT_16(image), AT_16(ImageOps.mirror(image))
    np.testing.assert_array_equal(mirrored, straight[:, ::-1])
    n_mirrored = 0
    for seed in range(100):
        pixels = varied("flip", image, seed)
        is_mirrored = np.array_equal(pixels, mirrored)
        assert is_mirrored or np.array_equal(pixels, straight)
        n_mirrored += is_mirrored
    assert 30 <= n_mirrored <= 70


@pytest.mark.parametrize("name", ["standard", "trivial"])
@pytest.mark.parametrize("seed", range(10))
def test_by_name_is_torchvision_by_hand(image, name, seed):
    last = {
        "standard": transforms.ColorJitter(0.2, 0.2, 0.2),
        "trivial": transforms.TrivialAugmentWide(),
    }[name]
    torch.manual_seed(seed)
    expected = transforms.RandomResizedCrop(
        16, (0.35, 1.0), interpolation=InterpolationMode.BICUBIC
    )(image)
    expected = last(transforms.RandomHorizontalFlip()(expected))
    np.testing.assert_array_equal(varied(name, image, seed), np.array(expected))


@pytest.mark.parametrize("augmentation", VARIED)
def test_the_same_seed_gives_the_same_and_another_one_others(image, augmentation):
    first = [varied(augmentation, image, seed).tobytes() for seed in range(20)]
    again = [varied(augmentation, image, seed).tobytes() for seed in range(20)]
    assert first == again
    assert len(set(first)) > 1


@pytest.mark.parametrize("augmentation", [None, *VARIED])
def test_preparing_draws_nothing(image, augmentation):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    augmentation_for(augmentation, AT_16).prepare(image)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augmentation", [None, *VARIED])
def test_what_was_prepared_can_be_varied_again(image, augmentation):
    augmentation = augmentation_for(augmentation, AT_16)
    prepared = augmentation.deterministic(image)
    before = np.array(prepared)
    for _ in range(10):
        augmentation.random(prepared)
    np.testing.assert_array_equal(np.array(prepared), before)


@pytest.mark.parametrize("augmentation", [None, *VARIED])
def test_what_is_kept_are_the_pixels(image, augmentation):
    augmentation = augmentation_for(augmentation, AT_16)
    prepared = augmentation.deterministic(image)
    if augmentation.deterministic_gives_pixels:
        np.testing.assert_array_equal(prepared, AT_16(image))
    else:
        np.testing.assert_array_equal(np.array(prepared), np.array(image))


def test_a_callable_gets_the_whole_image(image):
    seen = []

    def mine(each):
        seen.append((each.mode, each.size))
        return ImageOps.flip(each)

    np.testing.assert_array_equal(varied(mine, image), AT_16(ImageOps.flip(image)))
    assert seen == [("RGB", (32, 24))]


@pytest.mark.parametrize("mode", ["L", "1", "P", "YCbCr", "CMYK", "HSV", "RGB"])
def test_a_callable_may_give_another_mode_and_size(image, mode):
    pixels = varied(lambda each: each.convert(mode).resize((9, 40)), image)
    expected = AT_16(image.convert(mode).resize((9, 40)).convert("RGB"))
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("other", "name"),
    [(None, "NoneType"), (np.zeros((4, 4, 3), "u1"), "ndarray"), ("a.png", "str")],
)
def test_a_callable_that_gives_no_image(image, other, name):
    def mine(each):
        return other

    with pytest.raises(TypeError, match=rf"PIL image\. Got {name} from .*mine"):
        varied(mine, image)


def test_a_callable_that_draws_on_the_image_leaves_the_users_alone(images):
    from sktl import PretrainedFeatures
    from sktl._images.validation import validate_images

    def mine(each):
        ImageDraw.Draw(each).rectangle((0, 0, 32, 24), "red")
        return each

    given = [Image.fromarray(images[0]), images[1].copy()]
    taken = validate_images(given, estimator=PretrainedFeatures(), reset=True)
    for row in range(2):
        assert (varied(mine, taken[row]) == [255, 0, 0]).all()
        np.testing.assert_array_equal(np.array(given[row]), images[row])


@pytest.mark.parametrize("mode", ["F", "I", "I;16", "RGBA", "LA"])
def test_a_callable_must_not_give_what_would_be_lost(image, mode):
    with pytest.raises(ValueError, match=f"Got one of mode '{mode}'"):
        varied(lambda each: Image.new(mode, each.size), image)
