"""A model specification gives the same model in this and in another process."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import normalized

from sktl import PretrainedFeatures
from sktl._backbones.feature_extractor import layer_widths
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._inference import model_spec as model_spec_module
from sktl._inference.execution import ExecutionConfig
from sktl._inference.model_spec import ModelSpec

BACKBONE = load_backbone("resnet_mini")
EXECUTION = ExecutionConfig.from_estimator(PretrainedFeatures(engine="torch"))


def model_spec(layers, pooling="avg", preprocessing=BACKBONE.preprocessing):
    backbone = BackboneSpec.to(BACKBONE, "DEFAULT")
    return ModelSpec(backbone, layers, pooling, preprocessing, EXECUTION)


@pytest.fixture
def pixels(images):
    return np.stack([image[:24, :24] for image in images[:4]])


def test_without_layers_it_is_the_whole_network(pixels):
    at_24 = BACKBONE.preprocessing.with_image_size(24)
    got = model_spec((), preprocessing=at_24).compile().start(pixels)()
    with torch.no_grad():
        expected = BACKBONE.network(normalized(pixels, at_24)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_an_unpickled_spec_shares_the_compiled_model():
    spec = model_spec(("stem", "stage2"), 2)
    model = spec.compile()
    assert pickle.loads(pickle.dumps(spec)).compile() is model
    assert pickle.loads(pickle.dumps(spec.compile))() is model
    other = replace(spec, execution=replace(EXECUTION, batch_size=1, n_jobs=2))
    assert other.compile() is model
    widths = layer_widths(BACKBONE, spec.layers, 2, BACKBONE.preprocessing)
    side = BACKBONE.preprocessing.crop_size
    pixels = np.zeros((3, side, side, 3), np.uint8)
    assert model.start(pixels)().shape == (3, sum(widths))


def test_a_pickle_holds_no_weights():
    assert len(pickle.dumps(model_spec(("penultimate",)))) < 1000


def test_every_setting_is_part_of_the_namespace():
    spec = model_spec(("stem",))
    others = [
        spec,
        model_spec(()),
        model_spec(("stem", "stage1")),
        model_spec(("stem",), "max"),
        model_spec(("stem",), preprocessing=BACKBONE.preprocessing.with_image_size(24)),
        model_spec(("stem",), preprocessing=BACKBONE.preprocessing_at(None, "squash")),
        model_spec(("stem",), preprocessing=BACKBONE.preprocessing_at(None, "pad")),
        replace(spec, execution=replace(EXECUTION, precision="bfloat16")),
        replace(spec, execution=replace(EXECUTION, engine="openvino")),
        replace(spec, backbone=replace(spec.backbone, digest="0" * 64)),
        replace(spec, backbone=replace(spec.backbone, name="other")),
    ]
    namespaces = {tuple(other.namespace().items()) for other in others}
    assert len(namespaces) == len(others)
    same = replace(spec, execution=replace(EXECUTION, batch_size=1, n_jobs=2))
    assert same.namespace() == spec.namespace()
    assert "tokens" not in spec.namespace()
    cropped = model_spec(
        ("stem",), preprocessing=BACKBONE.preprocessing_at(None, "crop")
    )
    assert cropped.namespace() == spec.namespace()


@pytest.mark.parametrize("layer", ["encoder", "encoder.layers.encoder_layer_3"])
def test_pooled_tokens_are_not_read_from_older_caches(layer):
    # Of torchvision's vision transformers; their class token was once averaged too.
    old = {"backbone", "weights", "layer", "pooling"}
    spec = model_spec(("penultimate", layer))
    vit = replace(spec, backbone=replace(spec.backbone, name="vit_b_16"))
    flat = replace(vit, pooling="flatten").namespace()
    assert vit.namespace().keys() - flat.keys() == {"tokens"}
    assert old < flat.keys()
    # The encoder of another network has no such rows.
    assert "tokens" not in spec.namespace()


@pytest.mark.parametrize(
    "layer", ["stem", "stage2", "stage2.0", "neck.0", "penultimate", "blocks.1"]
)
def test_stages_of_timm_have_a_version(layer, monkeypatch):
    spec = model_spec((layer, "norm"), "flatten")
    of_timm = replace(spec, backbone=replace(spec.backbone, name="timm/test_vit"))
    before = of_timm.namespace()
    monkeypatch.setattr(model_spec_module, "CUT_VERSION", "another")
    is_cut = layer.split(".")[0] in ("stem", "stage2", "neck")
    assert (of_timm.namespace() != before) == is_cut
    assert "stages" not in spec.namespace()
