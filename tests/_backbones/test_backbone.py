"""Tests of sktl._backbones.backbone."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from sktl._backbones.backbone import Backbone, LoadedNetwork
from sktl._backbones.registry import load_backbone
from sktl._backbones.source import BackboneDefinition, NetworkStructure
from sktl._images.preprocessing import Preprocessing


@pytest.mark.slow
def test_a_vision_transformer_has_images_of_whole_patches() -> None:
    backbone = load_backbone("vit_b_32", None)
    assert list(backbone.stages) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert backbone.neck is None
    assert backbone.penultimate == "heads.head"
    assert backbone.last_linear.in_features == 768
    assert backbone.preprocessing_at(224) == Preprocessing(224, 224)
    assert backbone.preprocessing_at(256) == Preprocessing(256, 256)
    with pytest.raises(ValueError, match=r"multiple of 32 .* Choose 128 or 160\."):
        backbone.preprocessing_at(150)


def test_a_network_with_images_of_one_size() -> None:
    mini = load_backbone("resnet_mini")
    definition = replace(mini.definition, has_fixed_image_size=True)
    backbone = Backbone("mini", "", definition, lambda: LoadedNetwork(mini.network, ""))
    size = mini.preprocessing.crop_size
    assert backbone.preprocessing_at(size).crop_size == size
    with pytest.raises(ValueError, match=f"only images of {size} pixels a side"):
        backbone.preprocessing_at(2 * size)


def test_images_may_have_another_size_within_limits() -> None:
    backbone = load_backbone("squeezenet1_1", None)
    assert backbone.preprocessing_at(None) == Preprocessing(256, 224)
    assert backbone.preprocessing_at(64) == Preprocessing(64, 64)
    assert backbone.preprocessing_at(17).crop_size == 17
    with pytest.raises(ValueError, match="image_size must be at least 17"):
        backbone.preprocessing_at(16)


def test_images_may_become_square_in_another_way() -> None:
    backbone = load_backbone("squeezenet1_1", None)
    assert backbone.preprocessing_at(None, "crop") == Preprocessing(256, 224)
    squashed = Preprocessing(256, 224, resize="squash")
    assert backbone.preprocessing_at(None, "squash") == squashed
    padded = Preprocessing(64, 64, resize="pad")
    assert backbone.preprocessing_at(64, "pad") == padded


@pytest.mark.parametrize(
    ("width", "expected"), [(None, False), (200, True), (9, False)]
)
def test_outputs_are_embeddings_if_their_number_is_that_of_the_weights(
    width: int | None, expected: bool
) -> None:
    mini = load_backbone("resnet_mini")
    definition = replace(mini.definition, embedding_width=width)
    backbone = Backbone("mini", "", definition, lambda: LoadedNetwork(mini.network, ""))
    assert backbone.returns_embeddings is expected


def test_stages_of_a_copy_are_modules_of_its_network() -> None:
    shared = load_backbone("resnet_mini")
    private = copy.deepcopy(shared)
    assert private.digest == shared.digest
    own = set(private.network.modules())
    assert all(stage in own for stage in private.stages.values())
    assert private.head is not shared.head
    x = torch.zeros(1, 3, 40, 40)
    with torch.inference_mode():
        assert torch.equal(private.network(x), shared.network(x))


def _described_by(describe: Callable[[nn.Module], NetworkStructure]) -> Backbone:
    network = nn.Linear(1, 1)
    definition = BackboneDefinition(
        lambda num_classes: network, describe, Preprocessing(8, 8), None
    )
    return Backbone("mine", "", definition, lambda: LoadedNetwork(network, ""))


def test_backbones_do_not_wait_for_each_other() -> None:
    started, finish = threading.Event(), threading.Event()

    def describe_slowly(network: nn.Module) -> NetworkStructure:
        started.set()
        assert finish.wait(30)
        return NetworkStructure()

    slow = _described_by(describe_slowly)
    other = _described_by(lambda network: NetworkStructure())
    with ThreadPoolExecutor(2) as pool:
        described = pool.submit(lambda: slow.structure)
        assert started.wait(30)
        try:
            assert pool.submit(lambda: other.structure).result(10) is other.structure
        finally:
            finish.set()
        assert described.result(30) is slow.structure
