"""Tests of decoded images: cached if they are small, shared by several datasets."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from trainer_helpers import CountingSequence

from sktl import Preprocessing
from sktl._images.augmentation import augmentation_for
from sktl._training import decoded_images
from sktl._training.datasets import BatchLoader, ImageDataset
from sktl._training.decoded_images import DecodedImages

AT_16 = Preprocessing(16, 16)


@pytest.fixture
def counting(images):
    return CountingSequence(images)


def decode(images, augmentation):
    return DecodedImages(images, augmentation_for(augmentation, AT_16), 16)


def read_all(decoded):
    return [decoded.augment(decoded[row]).copy() for row in range(40)]


@pytest.mark.parametrize("augmentation", [None, "flip"])
def test_constant_pixels_are_decoded_once(counting, images, augmentation):
    decoded = decode(counting, augmentation)
    for _ in range(3):
        for row, pixels in enumerate(read_all(decoded)):
            expected = AT_16(Image.fromarray(images[row]))
            assert any(
                np.array_equal(pixels, each) for each in (expected, expected[:, ::-1])
            )
    assert counting.counts == Counter(range(40))


@pytest.mark.parametrize("augmentation", ["standard", "trivial", lambda each: each])
def test_whole_images_are_not_cached(counting, augmentation):
    decoded = decode(counting, augmentation)
    for _ in range(3):
        assert np.shape(read_all(decoded)) == (40, 16, 16, 3)
    assert set(counting.counts.values()) == {3}


@pytest.mark.parametrize(("spare", "n_decodes"), [(0, 1), (-1, 2)])
def test_no_pixels_are_cached_above_the_limit(counting, monkeypatch, spare, n_decodes):
    limit = 40 * 16 * 16 * 3 + spare
    monkeypatch.setattr(decoded_images, "_MAX_CACHED_BYTES", limit)
    decoded = decode(counting, None)
    np.testing.assert_array_equal(read_all(decoded), read_all(decoded))
    assert set(counting.counts.values()) == {n_decodes}


def test_two_datasets_share_the_pixels(counting, images):
    decoded = decode(counting, None)
    for rows in (np.arange(30), np.arange(20, 40)):
        dataset = ImageDataset(decoded, rows, rows, np.ones(len(rows)), n_jobs=2)
        for pixels, (y, _) in BatchLoader(dataset, 8, shuffle=True):
            expected = [AT_16(Image.fromarray(images[row])) for row in y]
            np.testing.assert_array_equal(pixels, expected)
    assert counting.counts == Counter(range(40))


@pytest.mark.parametrize("augmentation", ["flip", "standard"])
def test_random_augmentation_differs_between_calls(images, augmentation):
    decoded = decode(CountingSequence(images), augmentation)
    first, second = read_all(decoded), read_all(decoded)
    equal = [np.array_equal(*pair) for pair in zip(first, second, strict=True)]
    assert not all(equal)
