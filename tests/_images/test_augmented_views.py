"""Views depend on seed, content and view number only."""

import random
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

from sktl import Preprocessing, PretrainedFeatures
from sktl._images.augmented_views import APPLY_VIEW, AugmentedViews
from sktl._images.validation import validate_images
from sktl._training.datasets import FixedViewDataset
from sktl._training.decoded_images import DecodedImages
from sktl._utils.random_state import temporary_seed

AT_16 = Preprocessing(16, 16)


def make_views(X, augmentation="standard", *, n_views=3, seed=0):
    images = validate_images(X, estimator=PretrainedFeatures(), reset=True)
    return AugmentedViews(images, augmentation, AT_16, n_views=n_views, seed=seed)


def compute_all(views):
    return np.stack([views[i]() for i in range(len(views))])


@pytest.mark.parametrize("augmentation", ["flip", "standard", "trivial"])
def test_views_do_not_depend_on_position(paths, augmentation):
    paths = paths[:12]
    first = compute_all(make_views(paths, augmentation)).reshape(-1, 3, 16, 16, 3)
    order = np.random.default_rng(0).permutation(len(paths))
    torch.rand(3)
    other = make_views([paths[i] for i in order], augmentation, n_views=5)
    other = compute_all(other).reshape(-1, 5, 16, 16, 3)
    np.testing.assert_array_equal(other[:, :3], first[order])


def test_views_depend_on_view_number_and_seed(paths):
    first, other = (compute_all(make_views(paths, seed=seed)) for seed in (0, 1))
    different = np.unique(np.concatenate([first, other]), axis=0)
    assert len(different) > 0.95 * 2 * 3 * len(paths)  # some crops are white
    hashes = (
        make_views(paths).content_hashes() + make_views(paths, seed=1).content_hashes()
    )
    assert len(set(hashes)) == 2 * 3 * len(paths)


def test_half_of_the_flip_views_are_mirrored(images):
    got = compute_all(make_views(images, "flip", n_views=20)).reshape(-1, 20, 16, 16, 3)
    flipped = Counter()
    for views, image in zip(got, images, strict=True):
        pixels = AT_16(Image.fromarray(image))
        plain = pixels, pixels[:, ::-1]
        found = [[np.array_equal(view, one) for one in plain] for view in views]
        assert np.any(found, axis=1).all()
        flipped.update(bool(is_flipped) for _, is_flipped in found)
    assert 0.45 < flipped[True] / flipped.total() < 0.55


def test_views_equal_torchvision(images):
    view_hash, view = make_views(images, n_views=2).decode_and_hash(7)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(16, (0.35, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.2, 0.2, 0.2),
        ]
    )
    with temporary_seed(torch.device("cpu"), *struct.unpack("<8I", view_hash)):
        expected = np.array(transform(Image.fromarray(images[3])))
    np.testing.assert_array_equal(view(), expected)


def test_global_generators_are_restored(paths):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    make_views(paths)[4]()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_subset(paths):
    views = make_views(paths)
    some = views.subset([7, 0, 100]).subset([2, 0])
    assert some.content_hashes() == [
        views.content_hashes()[100],
        views.content_hashes()[7],
    ]
    np.testing.assert_array_equal(compute_all(some), compute_all(views)[[100, 7]])
    view_hash, view = some.decode_and_hash(1)
    assert view_hash == views.content_hashes()[7]
    np.testing.assert_array_equal(view(), views[7]())


def test_fingerprint_names_the_augmentation(paths):
    names = {
        make_views(paths, name).decode_fingerprint()["augmentation"]
        for name in ("flip", "trivial")
    }
    assert len(names) == 2
    assert all("torchvision 0." in name for name in names)


def test_a_bad_image_is_named_by_its_row(paths, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"X\[1\].*bad\.png"):
        make_views([paths[0], str(bad)])[4]


@pytest.mark.parametrize("augmentation", ["trivial", ImageOps.mirror])
def test_training_samples_one_view_of_each_image(images, augmentation):
    views = make_views(images, augmentation)
    indices = np.arange(len(images))
    weights = np.ones(len(images))
    decoded = DecodedImages(views, APPLY_VIEW, 16)
    dataset = FixedViewDataset(decoded, indices, indices, weights, n_views=3, n_jobs=2)
    expected = compute_all(views).reshape(-1, 3, 16, 16, 3)
    chosen = Counter()
    for _ in range(4):
        (x, (label, _)), *_ = dataset.batches(range(len(images)), 1)
        which = [
            next(v for v in range(3) if np.array_equal(pixels, expected[i, v]))
            for i, pixels in zip(label.tolist(), x.numpy(), strict=True)
        ]
        chosen.update(which)
    if augmentation == "trivial":
        assert all(30 < chosen[v] < 80 for v in range(3))  # of 160
