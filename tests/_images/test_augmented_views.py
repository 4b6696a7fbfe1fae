"""Fixed views: what they show depends on seed, content and number, on nothing else."""

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
from sktl._training.datasets import ImageDataset
from sktl._utils.random_state import temporary_seed

AT_16 = Preprocessing(16, 16)


def views_of(X, augmentation="standard", *, n_views=3, seed=0):
    images = validate_images(X, estimator=PretrainedFeatures(), reset=True)
    return AugmentedViews(images, augmentation, AT_16, n_views=n_views, seed=seed)


def shown(views):
    return np.stack([views[i]() for i in range(len(views))])


@pytest.mark.parametrize("augmentation", ["flip", "standard", "trivial"])
def test_what_a_view_shows_does_not_depend_on_where_it_stands(paths, augmentation):
    first = shown(views_of(paths, augmentation)).reshape(-1, 3, 16, 16, 3)
    order = np.random.default_rng(0).permutation(len(paths))
    torch.rand(3)
    other = views_of([paths[i] for i in order], augmentation, n_views=5)
    other = shown(other).reshape(-1, 5, 16, 16, 3)
    np.testing.assert_array_equal(other[:, :3], first[order])


def test_views_differ_between_numbers_and_seeds(paths):
    first, other = (shown(views_of(paths, seed=seed)) for seed in (0, 1))
    different = np.unique(np.concatenate([first, other]), axis=0)
    assert len(different) > 0.95 * 2 * 3 * len(paths)  # some crops are all white
    keys = views_of(paths).content_hashes() + views_of(paths, seed=1).content_hashes()
    assert len(set(keys)) == 2 * 3 * len(paths)


def test_flips_are_flips_and_half_of_them_happen(images):
    got = shown(views_of(images, "flip", n_views=20)).reshape(-1, 20, 16, 16, 3)
    flipped = Counter()
    for views, image in zip(got, images, strict=True):
        pixels = AT_16(Image.fromarray(image))
        plain = pixels, pixels[:, ::-1]
        found = [[np.array_equal(view, one) for one in plain] for view in views]
        assert np.any(found, axis=1).all()
        flipped.update(bool(is_flipped) for _, is_flipped in found)
    assert 0.45 < flipped[True] / flipped.total() < 0.55


def test_views_are_torchvisions(images):
    key, view = views_of(images, n_views=2).decode_and_hash(7)
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(16, (0.35, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.2, 0.2, 0.2),
        ]
    )
    with temporary_seed(torch.device("cpu"), *struct.unpack("<8I", key)):
        expected = np.array(chain(Image.fromarray(images[3])))
    np.testing.assert_array_equal(view(), expected)


def test_global_generators_are_where_they_were(paths):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    views_of(paths)[4]()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_some_of_the_views_are_those(paths):
    views = views_of(paths)
    some = views.subset([7, 0, 100]).subset([2, 0])
    assert some.content_hashes() == [
        views.content_hashes()[100],
        views.content_hashes()[7],
    ]
    np.testing.assert_array_equal(shown(some), shown(views)[[100, 7]])
    key, view = some.decode_and_hash(1)
    assert key == views.content_hashes()[7]
    np.testing.assert_array_equal(view(), views[7]())


def test_a_space_names_what_decides_a_view(paths):
    names = {
        views_of(paths, name).decode_fingerprint()["augmentation"]
        for name in ("flip", "trivial")
    }
    assert len(names) == 2
    assert all("torchvision 0." in name for name in names)


def test_a_bad_image_is_named_by_its_row(paths, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"X\[1\].*bad\.png"):
        views_of([paths[0], str(bad)])[4]


@pytest.mark.parametrize("augmentation", ["trivial", ImageOps.mirror])
def test_one_view_of_each_image_is_trained_on(images, augmentation):
    views = views_of(images, augmentation)
    dataset = ImageDataset(
        views,
        np.arange(len(images)),
        np.arange(len(images)),
        np.ones(len(images)),
        augmentation=APPLY_VIEW,
        side=16,
        n_jobs=2,
    )
    expected = shown(views).reshape(-1, 3, 16, 16, 3)
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
