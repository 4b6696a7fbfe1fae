"""Fixtures and networks shared by several test files."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from store_rows import KEYS, SPACE, make_rows
from torch import Tensor, nn

from sktl import FeatureStore, Preprocessing, register_backbone

# Settings of a training whose defaults are selected or depend on the number of images.
FIXED = {
    "lr": 1e-4,
    "head_init": "linear_probe",
    "wise_ft_alpha": 0.4,
    "lr_schedule": "cosine",
    "batch_size": 32,
}


class StagedNet(nn.Module):
    """Network of the given stages and a head that averages over the image."""

    def __init__(self, stages: dict[str, nn.Module], width: int) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages.values():
            x = stage(x)
        return self.head(x)


class TinyNet(StagedNet):
    """Network of two stages and a head, whose forward pass takes a millisecond."""

    def __init__(self) -> None:
        stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        stage1 = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(inplace=True)
        )
        super().__init__({"stem": stem, "stage1": stage1}, 16)


register_backbone(
    "tiny", TinyNet, preprocessing=Preprocessing(resize_size=16, crop_size=16)
)


def grey_network() -> nn.Module:
    """Build a network that takes images of one channel."""
    network = TinyNet()
    network.stages["stem"][0] = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
    return network


register_backbone(
    "grey",
    grey_network,
    preprocessing=Preprocessing(18, 16, mean=(0.4,), std=(0.3,)),
)


def five_stages() -> nn.Module:
    """Build a network of five stages, as torchvision's have, with fixed weights."""
    names, widths = ("stem", "stage1", "stage2", "stage3", "stage4"), (3, 4, 6, 8, 12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stages = {
            name: nn.Sequential(
                nn.Conv2d(n_in, n_out, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(n_out),
                nn.ReLU(inplace=True),
            )
            for name, (n_in, n_out) in zip(names, pairwise((*widths, 16)), strict=True)
        }
        for stage in stages.values():
            nn.init.kaiming_normal_(stage[0].weight)  # outputs of every depth near 1
        return StagedNet(stages, 16)


def projection() -> nn.Module:
    """Build a fixed random projection of four regions to 200 categories."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(12, 200)
        nn.init.normal_(linear.weight, std=10)
        nn.init.normal_(linear.bias, std=10)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), linear)


register_backbone(
    "projection",
    projection,
    preprocessing=Preprocessing(resize_size=16, crop_size=16),
    categories=tuple(f"category {i:03}" for i in range(200)),
)
register_backbone(
    "five stages",
    five_stages,
    preprocessing=Preprocessing(resize_size=32, crop_size=32),
)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Return the folder of real images and weights, or skip the test without it.

    The environment variable ``SKTL_TEST_DATA`` sets its path.
    """
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SKTL_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real test data not found at {folder}; set SKTL_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def images() -> NDArray[np.uint8]:
    """Return forty images of 24 x 32 pixels, cut from two photographs."""
    china, flower = load_sample_images().images  # (427, 640, 3) each
    tiles = [
        photograph[y : y + 24, x : x + 32]
        for photograph in (china, flower)
        for y in range(60, 300, 60)
        for x in range(40, 540, 100)
    ]
    return np.stack(tiles)


@pytest.fixture(scope="session")
def paths(images: NDArray[np.uint8], tmp_path_factory) -> list[str]:
    """Return the paths of the same images as PNG files."""
    folder = tmp_path_factory.mktemp("images")
    names = [str(folder / f"{i:02}.png") for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(name)
    return names


@pytest.fixture
def quick_linear_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the search for the regularization of linear probes, to save time."""
    monkeypatch.setattr("sktl._training.linear_probe.C_GRID", np.array([0.01, 1.0]))
    monkeypatch.setattr("sktl._training.linear_probe._N_FOLDS", 2)


@pytest.fixture
def filled_store(tmp_path: Path) -> FeatureStore:
    """Return a store of forty rows in one shard."""
    store = FeatureStore(tmp_path / "store")
    store.put(SPACE, KEYS, make_rows(KEYS))
    return store
