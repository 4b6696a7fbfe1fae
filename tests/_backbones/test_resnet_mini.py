"""The bundled network, its file and its card."""

import hashlib
import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.models.resnet import BasicBlock

import sktl
from sktl import PretrainedClassifier
from sktl._backbones.registry import load_backbone
from sktl._backbones.resnet_mini import ResNetMini

FILE = Path(sktl.__file__).parent / "data" / "resnet_mini.safetensors"


@pytest.fixture(scope="module")
def card():
    return FILE.with_suffix(".md").read_text()


def test_the_card_is_about_this_file(card):
    content = FILE.read_bytes()
    assert len(content) <= 8 * 2**20
    assert hashlib.sha256(content).hexdigest() in card
    count = sum(p.numel() for p in ResNetMini().parameters())
    assert f"| parameters | {count:,} |" in card


def test_resnet_mini_is_an_ordinary_backbone():
    backbone = load_backbone("resnet_mini")
    assert list(backbone.stages) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert len(set(backbone.categories)) == 200
    assert "goldfish" in backbone.categories
    side = backbone.preprocessing.crop_size
    x = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        assert torch.equal(backbone.staged_model(x), backbone.network(x))
        sides = []
        for stage in backbone.stages.values():
            x = stage(x)
            sides.append(x.shape[-1])
    assert sides == [40, 40, 20, 10, 5]


def test_stages_are_those_of_resnet18_with_half_the_width():
    mini = load_backbone("resnet_mini").network
    net = models.ResNet(BasicBlock, [2, 2, 2, 2], num_classes=200)
    layers = [net.layer1, net.layer2, net.layer3, net.layer4]
    names = [name for name, _ in net.layer2.named_parameters()]
    stages = [mini.stages[f"stage{i}"] for i in range(1, 5)]
    assert [name for name, _ in stages[1].named_parameters()] == names
    for layer, stage in zip(layers, stages, strict=True):
        wide = [p.numel() for p in layer.parameters() if p.ndim == 4]
        narrow = [p.numel() for p in stage.parameters() if p.ndim == 4]
        assert np.allclose(np.divide(wide, narrow), 4)  # half as wide


@pytest.mark.slow
def test_accuracy_equals_that_of_the_model_card(test_data, card):
    with np.load(test_data / "tiny_imagenet32" / "val.npz") as arrays:
        jpeg, offsets = arrays["jpeg"], arrays["offsets"]
        names = [str(name).split(",")[0] for name in arrays["name"]]
        y = np.array(names)[arrays["label"]][::5]
    X = [jpeg[a:b].tobytes() for a, b in itertools.pairwise(offsets)][::5]
    assert Image.open(io.BytesIO(X[0])).size == (32, 32)
    mine = PretrainedClassifier("resnet_mini", batch_size=256).fit(X)
    claimed = float(re.search(r"top-1 accuracy \| (0\.\d+)", card).group(1))
    # Of a fifth of the images, so within three standard errors of 0.011.
    assert mine.score(X, y) == pytest.approx(claimed, abs=0.033)
