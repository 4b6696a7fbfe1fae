"""Tests of initial and fitted models: copies, seeds, digests, frozen prefixes."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from shared_fixtures import FIXED
from torch import nn

from sktl import FineTunedCNNClassifier, Preprocessing, register_backbone
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._training.initial_model import InitialModel, ModelConfig, PretrainedPrefix
from sktl._training.multiclass import MulticlassTarget
from sktl._training.network import network_digest, output_shape
from sktl._utils.tensor_file import state_dict_digest


def make_config(backbone="tiny", weights="DEFAULT", **parameters):
    estimator = FineTunedCNNClassifier(backbone, weights=weights, **parameters)
    return ModelConfig.from_estimator(estimator)


def make_model(backbone="tiny", weights="DEFAULT", n_outputs=3, seed=0, **parameters):
    config = make_config(backbone, weights, **parameters)
    return InitialModel.from_backbone(
        config, weights, n_outputs, seed=seed, progress=False
    )


def bits(module):
    return state_dict_digest(module.state_dict())


@pytest.fixture(scope="module")
def fitted(images):
    options = {"hidden_layer_sizes": 4, "image_size": 20, "random_state": 0}
    options |= {"engine": "torch"}
    return FineTunedCNNClassifier("tiny", **FIXED, max_epochs=1, **options).fit(
        images, np.arange(40) % 2
    )


@pytest.mark.parametrize("name", ["tiny", "resnet_mini"])
def test_parts_below_the_head_are_those_of_the_backbone(name):
    model, backbone = make_model(name), load_backbone(name)
    for stage, module in backbone.stages.items():
        assert bits(model.network.get_submodule(stage)) == bits(module)
    assert model.stages == list(backbone.stages)
    assert model.digest == backbone.digest
    spec = BackboneSpec.to(backbone, "DEFAULT")
    assert model.pretrained == PretrainedPrefix(len(model.network) - 1, spec)
    assert model.preprocessing == backbone.preprocessing
    x = torch.randn(2, 3, 32, 32)
    assert model.network.eval()(x).shape == (2, 3)


def test_network_shares_no_memory():
    model, other = make_model(), make_model()
    before = bits(load_backbone("tiny").network)
    shared = {p.data_ptr() for p in load_backbone("tiny").network.parameters()}
    assert shared.isdisjoint(p.data_ptr() for p in model.network.parameters())
    with torch.no_grad():
        for tensor in model.network.state_dict().values():
            tensor.zero_()
    assert bits(load_backbone("tiny").network) == before
    assert bits(other.network) == bits(make_model().network)


def test_seed_determines_the_head_only():
    first, equal, other = (make_model(seed=seed).network for seed in (1, 1, 2))
    assert bits(first) == bits(equal)
    assert bits(first[-1]) != bits(other[-1])
    assert bits(first[:-1]) == bits(other[:-1])


def test_seed_determines_random_weights():
    first, equal, other = (
        make_model("resnet_mini", None, seed=seed).network for seed in (1, 1, 2)
    )
    assert bits(first) == bits(equal)
    assert bits(first[0]) != bits(other[0])
    assert bits(first[0]) != bits(make_model("resnet_mini", seed=1).network[0])


def test_global_random_states_do_not_change():
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    make_model("resnet_mini", None, hidden_layer_sizes=8)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("sizes", "widths"),
    [
        ((), []),
        ([], []),
        (np.array([]), []),
        (8, [8]),
        ([8], [8]),
        ((8, 4), [8, 4]),
        (np.array([8, 4]), [8, 4]),
        (np.int64(8), [8]),
    ],
)
def test_hidden_layer_sizes_of_any_type(sizes, widths):
    model = make_model(hidden_layer_sizes=sizes, dropout=np.float32(0.5))
    linear = [m for m in model.network[-1].modules() if isinstance(m, nn.Linear)]
    assert [module.out_features for module in linear] == [*widths, 3]
    assert model.config == ModelConfig(
        "tiny", "DEFAULT", None, None, tuple(widths), 0.5
    )
    assert all(type(width) is int for width in model.config.hidden_layer_sizes)


@pytest.mark.parametrize("sizes", [0, (8, 0), (-1,), (8, 2.5), [8.0], ["8"], (None,)])
def test_invalid_hidden_layer_sizes(sizes):
    with pytest.raises(ValueError, match="must be positive ints, one for each"):
        make_config(hidden_layer_sizes=sizes)


def test_image_size():
    assert make_model(image_size=24).preprocessing == Preprocessing(24, 24)


def test_resize():
    model = make_model(image_size=24, resize=np.str_("pad"))
    assert model.preprocessing == Preprocessing(24, 24, resize="pad")
    assert type(model.config.resize) is str


def test_weights_from_a_file(tmp_path):
    state = {k: v + 1 for k, v in load_backbone("tiny").network.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    model = make_model(weights=tmp_path / "a.safetensors")
    assert model.digest != make_model().digest
    assert model.config.weights == str(tmp_path / "a.safetensors")
    name = "stem.0.weight"
    assert torch.equal(model.network.get_parameter(name), state[f"stages.{name}"])


@pytest.mark.parametrize("above", [[], [nn.Softmax(1)]])
def test_backbone_without_stages(above):
    layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2), *above]
    register_backbone(
        "without stages",
        lambda: nn.Sequential(*layers),
        preprocessing=Preprocessing(16, 16),
    )
    if above:  # the network without its linear layer has other features
        with pytest.raises(ValueError, match="has no stages"):
            make_model("without stages")
    else:
        model = make_model("without stages")
        assert model.stages == ["network"]
        assert model.network[-1][0].in_features == 3


def test_model_from_fitted_is_a_copy(fitted):
    model = fitted._fitted_model
    before = bits(model.network)
    assert before == bits(fitted.module_)
    start = InitialModel.from_fitted(model, model.config)
    assert bits(start.network) == before
    with torch.no_grad():
        start.network[-1][0].weight.zero_()
    assert bits(start.network) != before
    assert bits(model.network) == bits(fitted.module_) == before


def test_model_from_fitted_continues_with_the_same_settings(fitted):
    config = ModelConfig.from_estimator(fitted)
    model = InitialModel.from_fitted(fitted._fitted_model, config)
    assert model.stages == ["stem", "stage1"]
    assert model.preprocessing == Preprocessing(20, 20)
    assert model.config == ModelConfig("tiny", "DEFAULT", 20, None, (4,), 0.0)
    assert model.digest == network_digest(fitted.module_)
    spec = BackboneSpec.to(load_backbone("tiny"), "DEFAULT")
    assert model.pretrained == PretrainedPrefix(0, spec)  # all parts were trained


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backbone", "resnet18"),
        ("weights", None),
        ("image_size", 24),
        ("resize", "pad"),
        ("hidden_layer_sizes", (5,)),
        ("dropout", 0.5),
    ],
)
def test_model_from_fitted_of_another_network(fitted, name, value):
    other = copy.copy(fitted).set_params(**{name: value})
    config = ModelConfig.from_estimator(other)
    with pytest.raises(ValueError, match=f"Got other values of {name}. Fit with"):
        InitialModel.from_fitted(fitted._fitted_model, config)


@pytest.mark.parametrize("n_frozen", [0, 2, 5])
def test_to_fitted(n_frozen):
    model = make_model("resnet_mini")
    model.network.train().requires_grad_(False)
    target = MulticlassTarget(np.arange(3))
    fitted = model.to_fitted(target, n_frozen)
    assert bits(fitted.network) == bits(model.network)
    assert fitted.digest == network_digest(fitted.network)
    assert not any(module.training for module in fitted.network.modules())
    assert all(parameter.requires_grad for parameter in fitted.network.parameters())
    shared = {p.data_ptr() for p in model.network.parameters()}
    assert shared.isdisjoint(p.data_ptr() for p in fitted.network.parameters())
    backbone = load_backbone("resnet_mini")
    assert fitted.pretrained.n_parts == n_frozen
    assert fitted.target is target
    if n_frozen == 0:
        assert fitted.prefix is None
        return
    assert (fitted.prefix.n_parts, fitted.prefix.digest) == (n_frozen, backbone.digest)
    expected = output_shape(fitted.network[:n_frozen], 40)
    assert fitted.prefix.output_shape == expected


def test_frozen_prefix_that_was_trained_before_has_a_digest_of_its_own():
    target = MulticlassTarget(np.arange(3))
    first = make_model("resnet_mini").to_fitted(target, 2)
    second = InitialModel.from_fitted(first, first.config).to_fitted(target, 4)
    assert second.pretrained.n_parts == 2
    assert second.prefix.n_parts == 4
    assert second.prefix.digest == network_digest(second.network[:4])
