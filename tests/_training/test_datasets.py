"""Tests of datasets and the data loader: order, batches, cached pixels, threads."""

import gc
import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_helpers import CountingSequence

from sktl import Preprocessing, PretrainedFeatures
from sktl._images.augmentation import augmentation_for
from sktl._images.augmented_views import APPLY_VIEW, AugmentedViews
from sktl._images.validation import validate_images
from sktl._training.datasets import (
    ActivationDataset,
    BatchLoader,
    FixedViewDataset,
    ImageDataset,
)
from sktl._training.decoded_images import DecodedImages

AT_16 = Preprocessing(16, 16)


def make_dataset(images, augmentation=None, n_jobs=2, rows=None):
    rows = np.arange(len(images)) if rows is None else np.asarray(rows)
    decoded = DecodedImages(images, augmentation_for(augmentation, AT_16), 16)
    # Targets and weights that identify the row.
    return ImageDataset(decoded, rows, rows % 7, rows / 8, n_jobs=n_jobs)


def pool_threads():
    """Return the names of the decoding threads; others may belong to libraries."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("ThreadPoolExecutor")]


@pytest.fixture
def counting(images):
    return CountingSequence(images)


@pytest.fixture(autouse=True)
def no_thread_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def rows_in(batches):
    return [(8 * weight).int().tolist() for _, (_, weight) in batches]


def concatenate(batches):
    return list(itertools.chain(*batches))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 16, 39, 40, 41, 1000])
def test_each_image_once_in_batches_of_even_size(counting, batch_size, shuffle):
    batches = BatchLoader(make_dataset(counting), batch_size, shuffle)
    rows = rows_in(batches)
    assert sorted(concatenate(rows)) == list(range(40))
    sizes = [len(batch) for batch in rows]
    assert len(sizes) == len(batches) == -(-40 // batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("augmentation", [None, "standard"])
def test_pixels_targets_and_weights_belong_together(counting, images, augmentation):
    dataset = make_dataset(counting, augmentation, rows=[30, 2, 17, 5, 9])
    assert len(dataset) == 5
    differences = []
    for pixels, (y, weight) in BatchLoader(dataset, 2, shuffle=True):
        rows = (8 * weight).long()
        assert pixels.shape == (len(rows), 16, 16, 3)
        assert (pixels.dtype, y.dtype) == (torch.uint8, torch.int64)
        assert weight.dtype == torch.float32
        assert torch.equal(y, rows % 7)
        for each, row in zip(pixels, rows, strict=True):
            expected = AT_16(Image.fromarray(images[row]))
            differences.append(np.abs(each.numpy() - expected.astype(int)).max())
    assert len(differences) == 5
    # Crops of random areas and random colors differ from the whole image.
    assert all((difference > 0) == bool(augmentation) for difference in differences)


@pytest.mark.parametrize("augmentation", ["flip", "standard"])
def test_augmented_pixels_are_those_of_the_image(counting, images, augmentation):
    dataset = make_dataset(counting, augmentation, rows=[30, 2, 17])
    augment = augmentation_for(augmentation, AT_16)
    torch.manual_seed(3)
    pixels, (_, weight) = next(iter(BatchLoader(dataset, 3, shuffle=True)))
    torch.manual_seed(3)
    rows = np.array([30, 2, 17])[torch.randperm(3)]
    np.testing.assert_array_equal(8 * weight, rows)
    for each, row in zip(pixels, rows, strict=True):
        image = augment.deterministic(Image.fromarray(images[row]))
        np.testing.assert_array_equal(each, augment.random(image))


def test_order_is_drawn_from_the_global_generator_of_torch(counting):
    batches = BatchLoader(make_dataset(counting), 16, shuffle=True)
    torch.manual_seed(5)
    epochs = [concatenate(rows_in(batches)) for _ in range(2)]
    torch.manual_seed(5)
    assert epochs == [torch.randperm(40).tolist() for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert concatenate(rows_in(BatchLoader(make_dataset(counting), 16))) == list(
        range(40)
    )


def test_changing_a_batch_does_not_change_the_cache(counting):
    batches = BatchLoader(make_dataset(counting, "flip"), 40)
    torch.manual_seed(1)
    expected = next(iter(batches))[0].clone()
    for pixels, (y, weight) in batches:
        pixels.zero_()
        y.zero_()
        weight.zero_()
    torch.manual_seed(1)
    pixels, (y, weight) = next(iter(batches))
    assert torch.equal(pixels, expected)
    assert y.any()
    assert weight.any()


@pytest.mark.parametrize("augmentation", [None, "flip", "standard", "trivial"])
def test_batches_do_not_depend_on_the_number_of_threads(paths, augmentation):
    images = validate_images(paths, estimator=PretrainedFeatures(), reset=True)
    results = []
    for n_jobs in (None, 1, 2, 5):
        batches = BatchLoader(make_dataset(images, augmentation, n_jobs), 16, True)
        torch.manual_seed(0)
        epochs = [pixels for _ in range(2) for pixels, _ in batches]
        results.append(torch.cat(epochs))
    assert all(torch.equal(results[0], each) for each in results[1:])


def test_decoding_runs_at_most_two_batches_ahead(counting):
    batches = iter(BatchLoader(make_dataset(counting, "standard"), 4))
    next(batches)
    assert sum(counting.counts.values()) <= 4 + 2 * 4 + 1
    batches.close()


@pytest.mark.parametrize("n_jobs", [1, 3])
@pytest.mark.parametrize("augmentation", [None, "standard"])
def test_invalid_image(paths, tmp_path, n_jobs, augmentation):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n")
    X = [*paths[:20], str(bad), *paths[20:]]
    images = validate_images(X, estimator=PretrainedFeatures(), reset=True)
    dataset = make_dataset(images, augmentation, n_jobs, rows=range(3, 41))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"X\[20\] \('.*bad\.png'\)"):
            list(BatchLoader(dataset, 4, shuffle=True))
        assert pool_threads() == []


def test_error_in_the_augmentation_ends_the_threads(counting):
    def failing(image):
        raise RuntimeError("no augmentation")

    with pytest.raises(RuntimeError, match="no augmentation"):
        list(BatchLoader(make_dataset(counting, failing), 4))
    assert pool_threads() == []


def test_incomplete_epoch_ends_the_threads(counting):
    batches = iter(BatchLoader(make_dataset(counting, "standard"), 4))
    next(batches)
    del batches
    gc.collect()
    assert pool_threads() == []
    for n, _ in enumerate(BatchLoader(make_dataset(counting), 4)):
        if n == 2:
            break


def test_incomplete_epoch_keeps_its_cached_pixels(counting):
    batches = BatchLoader(make_dataset(counting, n_jobs=1), 4)
    next(iter(batches))
    assert len(rows_in(batches)) == 10
    assert counting.counts == Counter(range(40))


def test_single_image(counting):
    ((pixels, (y, weight)),) = BatchLoader(make_dataset(counting, rows=[9]), 32, True)
    assert pixels.shape == (1, 16, 16, 3)
    assert (y.tolist(), weight.tolist()) == ([2], [9 / 8])


@pytest.mark.parametrize("augmentation", [None, "flip"])
def test_constant_pixels_are_decoded_once(counting, augmentation):
    batches = BatchLoader(make_dataset(counting, augmentation), 16, shuffle=True)
    for _ in range(3):
        assert len(rows_in(batches)) == 3
    assert counting.counts == Counter(range(40))


@pytest.mark.parametrize("augmentation", ["standard", "trivial", lambda each: each])
def test_whole_images_are_decoded_in_each_epoch(counting, augmentation):
    batches = BatchLoader(make_dataset(counting, augmentation), 16)
    for _ in range(3):
        assert len(rows_in(batches)) == 3
    assert set(counting.counts.values()) == {3}


def test_views_of_some_rows(images):
    sequence = validate_images(images, estimator=PretrainedFeatures(), reset=True)
    views = AugmentedViews(sequence, "standard", AT_16, n_views=3, seed=0)
    rows = np.array([30, 2, 17])
    dataset = FixedViewDataset(
        DecodedImages(views, APPLY_VIEW, 16),
        rows,
        rows % 7,
        rows / 8,
        n_views=3,
        n_jobs=1,
    )
    positions = dataset.positions([2, 0])
    np.testing.assert_array_equal(positions // 3, [17, 30])
    assert dataset.targets(np.array([2, 0]))[0].tolist() == [17 % 7, 30 % 7]


def test_one_random_fixed_view_of_each_image(images):
    sequence = validate_images(images, estimator=PretrainedFeatures(), reset=True)
    views = AugmentedViews(sequence, "standard", AT_16, n_views=3, seed=0)
    rows = np.arange(40)
    dataset = FixedViewDataset(
        DecodedImages(views, APPLY_VIEW, 16),
        rows,
        rows % 7,
        rows / 8,
        n_views=3,
        n_jobs=2,
    )
    assert (len(dataset), dataset.n_views) == (40, 3)
    torch.manual_seed(0)
    positions = dataset.positions(range(40))
    np.testing.assert_array_equal(positions // 3, range(40))
    assert set(positions % 3) == {0, 1, 2}
    torch.manual_seed(0)
    pixels, (y, weight) = next(dataset.batches(range(40), 1))
    expected = [views[position]() for position in positions]
    np.testing.assert_array_equal(pixels, expected)
    assert y.tolist() == [row % 7 for row in range(40)]
    np.testing.assert_array_equal(8 * weight, range(40))


class FakeActivations:
    """Stands for `FrozenActivations`: a row contains its depth and its position."""

    def __init__(self):
        self.computed = []

    def compute(self, n_frozen):
        self.computed.append(n_frozen)

    def rows(self, n_frozen, positions):
        return torch.tensor([[n_frozen, position] for position in positions])


def test_activations_replace_the_pixels_once_something_is_frozen(counting):
    activations = FakeActivations()
    images = make_dataset(counting, rows=[30, 2, 17, 5])
    dataset = ActivationDataset(images, activations)
    dataset.cache_activations(n_epochs=1)
    assert activations.computed == []
    (pixels, _), (_, (_, weight)) = dataset.batches([3, 0, 1], 2)
    assert pixels.dtype == torch.uint8
    assert (8 * weight).tolist() == [2]
    counting.counts.clear()
    dataset.set_frozen_depth(4)
    dataset.cache_activations(n_epochs=1)
    assert activations.computed == [4]
    first, second = dataset.batches([3, 0, 1], 2)
    assert first[0].tolist() == [[4, 5], [4, 30]]
    assert second[0].tolist() == [[4, 2]]
    y, weight = first[1]
    assert (y.tolist(), (8 * weight).tolist()) == ([5, 30 % 7], [5, 30])
    assert not counting.counts  # no image was decoded


@pytest.mark.parametrize(("n_epochs", "computed"), [(2, []), (3, [1])])
def test_views_are_computed_in_advance_unless_most_are_never_used(
    images, n_epochs, computed
):
    sequence = validate_images(images, estimator=PretrainedFeatures(), reset=True)
    views = AugmentedViews(sequence, "flip", AT_16, n_views=3, seed=0)
    decoded = DecodedImages(views, APPLY_VIEW, 16)
    rows = np.arange(40)
    pixels = FixedViewDataset(decoded, rows, rows % 2, np.ones(40), n_views=3, n_jobs=1)
    activations = FakeActivations()
    dataset = ActivationDataset(pixels, activations)
    dataset.set_frozen_depth(1)
    dataset.cache_activations(n_epochs)
    assert activations.computed == computed
