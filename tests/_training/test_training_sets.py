"""Tests of the training sets and validation sets of one fit."""

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_helpers import CountingSequence, make_parts

from sktl._images.augmented_views import AugmentedViews
from sktl._training.decoded_images import DecodedImages
from sktl._training.training_sets import TrainingData, TrainingSets

pytestmark = pytest.mark.usefixtures("quick_linear_probe")


def prepared(parts, rows):
    """Return the pixels of some rows without augmentation."""
    return [parts.model.preprocessing(parts.data.images[row]) for row in rows]


def pixels_of(dataset):
    return next(dataset.batches(range(len(dataset)), 1))[0]


@pytest.mark.parametrize("augmentation_views", [None, 2])
def test_validation_set_is_not_augmented(images, augmentation_views):
    parts = make_parts(
        images,
        early_stopping=True,
        augmentation="standard",
        augmentation_views=augmentation_views,
    )
    rows = np.flatnonzero(parts.data.held_out)
    train = parts.sets.train(np.flatnonzero(~parts.data.held_out))
    valid = parts.sets.valid(rows)
    assert (len(train), len(valid)) == (30, 10)
    pixels, (y, _) = next(valid.batches(range(10), 1))
    np.testing.assert_array_equal(pixels, prepared(parts, rows))
    np.testing.assert_array_equal(y, parts.data.targets.y[rows])
    assert not torch.equal(pixels_of(train), pixels_of(train))


@pytest.mark.parametrize("name", ["train", "valid"])
@pytest.mark.parametrize("n_frozen", [0, 1])
def test_sets_without_augmentation(images, name, n_frozen):
    weight = np.linspace(0.5, 1.5, 40)
    parts = make_parts(images, sample_weight=weight)
    rows = np.array([30, 2, 17])
    dataset = getattr(parts.sets, name)(rows)
    dataset.set_frozen_depth(n_frozen)
    dataset.cache_activations(1)
    x, (y, got) = next(dataset.batches(range(3), 1))
    if n_frozen:
        np.testing.assert_array_equal(x, parts.activations.rows(1, rows))
    else:
        np.testing.assert_array_equal(x, prepared(parts, rows))
    np.testing.assert_array_equal(y, parts.data.targets.y[rows])
    np.testing.assert_allclose(got, parts.data.targets.sample_weight[rows], rtol=1e-6)


def test_activations_of_a_validation_set_beside_augmented_images(images):
    parts = make_parts(images, augmentation="flip", trainable=1)
    rows = np.array([30, 2, 17])
    valid = parts.sets.valid(rows)
    valid.set_frozen_depth(1)
    valid.cache_activations(1)
    expected = parts.activations.rows(1, rows)
    np.testing.assert_allclose(pixels_of(valid), expected, rtol=1e-4, atol=1e-5)


def test_views_of_some_rows_are_those_of_all(images):
    options = {"augmentation": "standard", "augmentation_views": 1}
    parts = make_parts(images, early_stopping=True, **options)
    rows = np.flatnonzero(~parts.data.held_out)
    expected = pixels_of(parts.sets.train(rows))
    some = np.array([2, 11, 5])
    assert torch.equal(pixels_of(parts.sets.train(rows[some])), expected[some])


def test_images_are_decoded_once_for_all_sets(images):
    parts = make_parts(images)
    counting = CountingSequence(images)
    data = TrainingData(counting, parts.data.targets, parts.data.held_out)
    sets = TrainingSets(parts.estimator, parts.model, data, parts.activations, seed=0)
    for rows in (range(40), range(10), range(5, 40)):
        expected = prepared(parts, rows)
        for dataset in (sets.train(np.array(rows)), sets.valid(np.array(rows))):
            np.testing.assert_array_equal(pixels_of(dataset), expected)
    assert set(counting.counts.values()) == {1}
    assert len(counting.counts) == 40


def test_images_are_not_cached_beside_their_views(images, monkeypatch):
    cached = []

    class Recorded(DecodedImages):
        def __init__(self, images, *arguments):
            cached.append(type(images))
            super().__init__(images, *arguments)

    monkeypatch.setattr("sktl._training.training_sets.DecodedImages", Recorded)
    parts = make_parts(images, augmentation="flip", augmentation_views=2)
    parts.sets.train(np.arange(40))
    assert cached == [AugmentedViews]


def test_augmentation_that_is_a_function(images):
    parts = make_parts(images, augmentation=lambda image: image.rotate(180))
    rows = np.array([30, 2])
    expected = [
        parts.model.preprocessing(Image.fromarray(images[row]).rotate(180))
        for row in rows
    ]
    np.testing.assert_array_equal(pixels_of(parts.sets.train(rows)), expected)
    np.testing.assert_array_equal(
        pixels_of(parts.sets.valid(rows)), prepared(parts, rows)
    )
