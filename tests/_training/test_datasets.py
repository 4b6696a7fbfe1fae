"""Every image once per epoch, in batches of even size, decoded ahead and kept."""

import gc
import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from sktl import Preprocessing, PretrainedFeatures
from sktl._images.augmentation import augmentation_for
from sktl._images.sequence import ImageSequence
from sktl._images.validation import validate_images
from sktl._training import datasets
from sktl._training.datasets import BatchLoader, ImageDataset

AT_16 = Preprocessing(16, 16)


class Counting(ImageSequence):
    """Count how often each row is decoded."""

    def __init__(self, rows):
        super().__init__(rows, "auto")
        self.counts = Counter()
        self.lock = threading.Lock()

    def __getitem__(self, row):  # noqa: D105
        with self.lock:
            self.counts[int(row)] += 1
        return super().__getitem__(row)


def dataset_of(images, augmentation=None, n_jobs=2, rows=None):
    rows = np.arange(len(images)) if rows is None else np.asarray(rows)
    return ImageDataset(
        images,
        rows,
        rows % 7,  # labels and weights that tell the row
        rows / 8,
        augmentation=augmentation_for(augmentation, AT_16),
        side=16,
        n_jobs=n_jobs,
    )


def pool_threads():
    """Threads that decode; others may belong to libraries."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("ThreadPoolExecutor")]


@pytest.fixture
def counting(images):
    return Counting(images)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def rows_in(batches):
    return [(8 * weight).int().tolist() for _, (_, weight) in batches]


def in_a_row(batches):
    return list(itertools.chain(*batches))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 16, 39, 40, 41, 1000])
def test_every_image_once_in_batches_of_even_size(counting, batch_size, shuffle):
    batches = BatchLoader(dataset_of(counting), batch_size, shuffle)
    rows = rows_in(batches)
    assert sorted(in_a_row(rows)) == list(range(40))
    sizes = [len(batch) for batch in rows]
    assert len(sizes) == len(batches) == -(-40 // batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("augmentation", [None, "standard"])
def test_pixels_labels_and_weights_belong_together(counting, images, augmentation):
    dataset = dataset_of(counting, augmentation, rows=[30, 2, 17, 5, 9])
    assert len(dataset) == 5
    for pixels, (label, weight) in BatchLoader(dataset, 2, shuffle=True):
        rows = (8 * weight).long()
        assert pixels.shape == (len(rows), 16, 16, 3)
        assert (pixels.dtype, label.dtype) == (torch.uint8, torch.int64)
        assert weight.dtype == torch.float32
        assert torch.equal(label, rows % 7)
        for each, row in zip(pixels, rows, strict=True):
            expected = AT_16(Image.fromarray(images[row]))
            assert augmentation or (each.numpy() == expected).all()


def test_the_order_is_drawn_from_the_generator_of_torch(counting):
    batches = BatchLoader(dataset_of(counting), 16, shuffle=True)
    torch.manual_seed(5)
    epochs = [in_a_row(rows_in(batches)) for _ in range(2)]
    torch.manual_seed(5)
    assert epochs == [torch.randperm(40).tolist() for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert in_a_row(rows_in(BatchLoader(dataset_of(counting), 16))) == list(range(40))


@pytest.mark.parametrize("augmentation", [None, "flip"])
def test_pixels_that_stay_the_same_are_decoded_once(counting, augmentation):
    batches = BatchLoader(dataset_of(counting, augmentation), 16, shuffle=True)
    for _ in range(3):
        assert len(rows_in(batches)) == 3
    assert counting.counts == Counter(range(40))


@pytest.mark.parametrize("augmentation", ["standard", "trivial", lambda each: each])
def test_whole_images_are_not_kept(counting, augmentation):
    batches = BatchLoader(dataset_of(counting, augmentation), 16)
    for _ in range(3):
        assert len(rows_in(batches)) == 3
    assert set(counting.counts.values()) == {3}


@pytest.mark.parametrize(("spare", "n_decodes"), [(0, 1), (-1, 2)])
def test_over_the_budget_nothing_is_kept(counting, monkeypatch, spare, n_decodes):
    monkeypatch.setattr(datasets, "_MOST_KEPT", 40 * 16 * 16 * 3 + spare)
    batches = BatchLoader(dataset_of(counting), 16)
    first, second = list(batches), list(batches)
    assert set(counting.counts.values()) == {n_decodes}
    for (one, _), (other, _) in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_whoever_changes_a_batch_does_not_change_what_is_kept(counting):
    batches = BatchLoader(dataset_of(counting, "flip"), 40)
    torch.manual_seed(1)
    expected = next(iter(batches))[0].clone()
    for pixels, (label, weight) in batches:
        pixels.zero_()
        label.zero_()
        weight.zero_()
    torch.manual_seed(1)
    pixels, (label, weight) = next(iter(batches))
    assert torch.equal(pixels, expected)
    assert label.any()
    assert weight.any()


@pytest.mark.parametrize("augmentation", [None, "flip", "standard", "trivial"])
def test_the_number_of_threads_does_not_change_what_comes(paths, augmentation):
    images = validate_images(paths, estimator=PretrainedFeatures(), reset=True)
    came = []
    for n_jobs in (None, 1, 2, 5):
        batches = BatchLoader(dataset_of(images, augmentation, n_jobs), 16, True)
        torch.manual_seed(0)
        epochs = [pixels for _ in range(2) for pixels, _ in batches]
        came.append(torch.cat(epochs))
    assert all(torch.equal(came[0], each) for each in came[1:])


def test_decoding_runs_at_most_two_batches_ahead(counting):
    batches = iter(BatchLoader(dataset_of(counting, "standard"), 4))
    next(batches)
    assert sum(counting.counts.values()) <= 4 + 2 * 4 + 1
    batches.close()


@pytest.mark.parametrize("n_jobs", [1, 3])
@pytest.mark.parametrize("augmentation", [None, "standard"])
def test_a_bad_image_is_named(paths, tmp_path, n_jobs, augmentation):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n")
    given = [*paths[:20], str(bad), *paths[20:]]
    images = validate_images(given, estimator=PretrainedFeatures(), reset=True)
    dataset = dataset_of(images, augmentation, n_jobs, rows=range(3, 41))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"X\[20\] \('.*bad\.png'\)"):
            list(BatchLoader(dataset, 4, shuffle=True))
        assert pool_threads() == []


def test_a_variation_that_fails_ends_the_threads(counting):
    def failing(image):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        list(BatchLoader(dataset_of(counting, failing), 4))
    assert pool_threads() == []


def test_an_abandoned_epoch_ends_the_threads(counting):
    batches = iter(BatchLoader(dataset_of(counting, "standard"), 4))
    next(batches)
    del batches
    gc.collect()
    assert pool_threads() == []
    for n, _ in enumerate(BatchLoader(dataset_of(counting), 4)):
        if n == 2:
            break


def test_an_abandoned_epoch_keeps_what_it_has(counting):
    batches = BatchLoader(dataset_of(counting, n_jobs=1), 4)
    next(iter(batches))
    assert len(rows_in(batches)) == 10
    assert counting.counts == Counter(range(40))


def test_a_single_image(counting):
    ((pixels, (label, weight)),) = BatchLoader(dataset_of(counting, rows=[9]), 32, True)
    assert pixels.shape == (1, 16, 16, 3)
    assert (label.tolist(), weight.tolist()) == ([2], [9 / 8])
