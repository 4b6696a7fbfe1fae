"""A network by reference is the network, here and after a journey."""

import pickle

import numpy as np
import pytest
import torch

from sktl import PretrainedFeatures
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._inference.execution import Execution
from sktl._inference.model_spec import ModelSpec, get_feature_extractor

BACKBONE = load_backbone("resnet_mini")
EXECUTION = Execution.of(PretrainedFeatures(engine="torch"))


def extractor(layers, pooling="avg", preprocessing=BACKBONE.preprocessing):
    reference = BackboneSpec.to(BACKBONE, "DEFAULT")
    return ModelSpec(reference, layers, pooling, preprocessing, EXECUTION)


@pytest.fixture
def pixels(images):
    return np.stack([image[:24, :24] for image in images[:4]])


def test_without_layers_it_is_the_whole_network(pixels):
    at_24 = BACKBONE.preprocessing.with_image_size(24)
    got = extractor((), preprocessing=at_24)().start(pixels)()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (at_24.mean, at_24.std))
    with torch.no_grad():
        expected = BACKBONE.network((x - mean) / std).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_copy_from_elsewhere_is_the_same_network():
    backbone = load_backbone("resnet_mini")  # which may not be kept any more
    mine = extractor(("stem", "stage2"), 2)
    made = mine()
    assert pickle.loads(pickle.dumps(mine))() is made
    again = get_feature_extractor(
        backbone, ["stem", "stage2"], 2, backbone.preprocessing, EXECUTION
    )
    assert again is made
    assert made.widths is not None
    assert len(made.widths) == 2


def test_it_travels_without_weights():
    assert len(pickle.dumps(extractor(("penultimate",)))) < 1000
