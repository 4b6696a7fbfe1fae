"""Variations by name are torchvision's, drawn from torch's generator."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from sktl import Preprocessing
from sktl._augmentation import NAMES, augmentation_for

AT_16 = Preprocessing(18, 16, interpolation="bicubic")
VARIED = [*sorted(NAMES), lambda picture: transforms.RandomRotation(30)(picture)]


@pytest.fixture
def picture(pictures):
    return Image.fromarray(pictures[7])


def varied(augmentation, picture, seed=0):
    augmentation = augmentation_for(augmentation, AT_16)
    prepared = augmentation.prepare(picture)
    torch.manual_seed(seed)
    return augmentation.vary(prepared)


@pytest.mark.parametrize("augmentation", [None, *VARIED])
@pytest.mark.parametrize("size", [(32, 24), (16, 16), (5, 90), (1, 1)])
def test_pixels_of_the_size_asked_for(picture, augmentation, size):
    for seed in range(5):
        pixels = varied(augmentation, picture.resize(size), seed)
        assert pixels.shape == (16, 16, 3)
        assert pixels.dtype == np.uint8


def test_none_is_the_preprocessing(picture):
    np.testing.assert_array_equal(varied(None, picture), AT_16(picture))


def test_flip_exchanges_left_and_right_in_half_of_the_cases(picture):
    straight, mirrored = AT_16(picture), AT_16(ImageOps.mirror(picture))
    np.testing.assert_array_equal(mirrored, straight[:, ::-1])
    n_mirrored = 0
    for seed in range(100):
        pixels = varied("flip", picture, seed)
        is_mirrored = np.array_equal(pixels, mirrored)
        assert is_mirrored or np.array_equal(pixels, straight)
        n_mirrored += is_mirrored
    assert 30 <= n_mirrored <= 70


@pytest.mark.parametrize("name", ["standard", "trivial"])
@pytest.mark.parametrize("seed", range(10))
def test_by_name_is_torchvision_by_hand(picture, name, seed):
    last = {
        "standard": transforms.ColorJitter(0.2, 0.2, 0.2),
        "trivial": transforms.TrivialAugmentWide(),
    }[name]
    torch.manual_seed(seed)
    expected = transforms.RandomResizedCrop(
        16, (0.35, 1.0), interpolation=InterpolationMode.BICUBIC
    )(picture)
    expected = last(transforms.RandomHorizontalFlip()(expected))
    np.testing.assert_array_equal(varied(name, picture, seed), np.array(expected))


@pytest.mark.parametrize("augmentation", VARIED)
def test_the_same_seed_gives_the_same_and_another_one_others(picture, augmentation):
    first = [varied(augmentation, picture, seed).tobytes() for seed in range(20)]
    again = [varied(augmentation, picture, seed).tobytes() for seed in range(20)]
    assert first == again
    assert len(set(first)) > 1


@pytest.mark.parametrize("augmentation", [None, *VARIED])
def test_preparing_draws_nothing(picture, augmentation):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    augmentation_for(augmentation, AT_16).prepare(picture)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augmentation", [None, *VARIED])
def test_what_was_prepared_can_be_varied_again(picture, augmentation):
    augmentation = augmentation_for(augmentation, AT_16)
    prepared = augmentation.prepare(picture)
    before = np.array(prepared)
    for _ in range(10):
        augmentation.vary(prepared)
    np.testing.assert_array_equal(np.array(prepared), before)


@pytest.mark.parametrize("augmentation", [None, *VARIED])
def test_what_is_kept_are_the_pixels(picture, augmentation):
    augmentation = augmentation_for(augmentation, AT_16)
    prepared = augmentation.prepare(picture)
    if augmentation.prepares_pixels:
        np.testing.assert_array_equal(prepared, AT_16(picture))
    else:
        np.testing.assert_array_equal(np.array(prepared), np.array(picture))


def test_a_callable_gets_the_whole_picture(picture):
    seen = []

    def mine(each):
        seen.append((each.mode, each.size))
        return ImageOps.flip(each)

    np.testing.assert_array_equal(varied(mine, picture), AT_16(ImageOps.flip(picture)))
    assert seen == [("RGB", (32, 24))]


@pytest.mark.parametrize("mode", ["L", "1", "P", "YCbCr", "CMYK", "HSV", "RGB"])
def test_a_callable_may_give_another_mode_and_size(picture, mode):
    pixels = varied(lambda each: each.convert(mode).resize((9, 40)), picture)
    expected = AT_16(picture.convert(mode).resize((9, 40)).convert("RGB"))
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("other", "name"),
    [(None, "NoneType"), (np.zeros((4, 4, 3), "u1"), "ndarray"), ("a.png", "str")],
)
def test_a_callable_that_gives_no_picture(picture, other, name):
    def mine(each):
        return other

    with pytest.raises(TypeError, match=rf"PIL image\. Got {name} from .*mine"):
        varied(mine, picture)


def test_a_callable_that_draws_on_the_picture_leaves_the_users_alone(pictures):
    from sktl import PretrainedFeatures
    from sktl._images import as_pictures

    def mine(each):
        ImageDraw.Draw(each).rectangle((0, 0, 32, 24), "red")
        return each

    given = [Image.fromarray(pictures[0]), pictures[1].copy()]
    taken = as_pictures(given, estimator=PretrainedFeatures(), reset=True)
    for row in range(2):
        assert (varied(mine, taken[row]) == [255, 0, 0]).all()
        np.testing.assert_array_equal(np.array(given[row]), pictures[row])


@pytest.mark.parametrize("mode", ["F", "I", "I;16", "RGBA", "LA"])
def test_a_callable_must_not_give_what_would_be_lost(picture, mode):
    with pytest.raises(ValueError, match=f"Got one of mode '{mode}'"):
        varied(lambda each: Image.new(mode, each.size), picture)
