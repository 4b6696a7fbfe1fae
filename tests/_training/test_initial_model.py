"""A training starts from a copy of the backbone, and a head that a seed decides."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sktl import FineTunedCNNClassifier, Preprocessing, register_backbone
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._training.initial_model import InitialModel
from sktl._utils.tensor_file import state_dict_digest


def build_initial_model(name="tiny", weights="DEFAULT", n_classes=3, **options):
    given = {
        "image_size": None,
        "hidden_layer_sizes": (),
        "dropout": 0.0,
        "seed": 0,
        "progress": False,
        **options,
    }
    return InitialModel.from_backbone(name, weights, n_classes, **given)


def bits(module):
    return state_dict_digest(module.state_dict())


@pytest.fixture(scope="module")
def fitted(images):
    return FineTunedCNNClassifier(
        "tiny", max_epochs=1, hidden_layer_sizes=4, image_size=20, random_state=0
    ).fit(images, np.arange(40) % 2)


@pytest.mark.parametrize("name", ["tiny", "resnet_mini"])
def test_below_the_head_it_is_the_backbone(name):
    start, backbone = build_initial_model(name), load_backbone(name)
    for stage, module in backbone.stages.items():
        assert bits(start.network.get_submodule(stage)) == bits(module)
    assert start.stages == list(backbone.stages)
    assert start.digest == backbone.digest
    reference = BackboneSpec.to(backbone, "DEFAULT")
    assert start.pretrained == (len(start.network) - 1, reference)
    assert start.preprocessing == backbone.preprocessing
    x = torch.randn(2, 3, 32, 32)
    assert start.network.eval()(x).shape == (2, 3)


def test_nobody_else_holds_the_network():
    one, other = build_initial_model(), build_initial_model()
    before = bits(load_backbone("tiny").network)
    shared = {p.data_ptr() for p in load_backbone("tiny").network.parameters()}
    assert shared.isdisjoint(p.data_ptr() for p in one.network.parameters())
    with torch.no_grad():
        for tensor in one.network.state_dict().values():
            tensor.zero_()
    assert bits(load_backbone("tiny").network) == before
    assert bits(other.network) == bits(build_initial_model().network)


def test_the_seed_decides_the_head_and_nothing_else():
    one, again, other = (build_initial_model(seed=seed).network for seed in (1, 1, 2))
    assert bits(one) == bits(again)
    assert bits(one[-1]) != bits(other[-1])
    assert bits(one[:-1]) == bits(other[:-1])


def test_the_seed_decides_random_weights():
    one, again, other = (
        build_initial_model("resnet_mini", None, seed=seed).network
        for seed in (1, 1, 2)
    )
    assert bits(one) == bits(again)
    assert bits(one[0]) != bits(other[0])
    assert bits(one[0]) != bits(build_initial_model("resnet_mini", seed=1).network[0])


def test_global_random_states_are_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    build_initial_model("resnet_mini", None, hidden_layer_sizes=8)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("given", "widths"),
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
def test_widths_in_any_form(given, widths):
    start = build_initial_model(hidden_layer_sizes=given, dropout=np.float32(0.5))
    linear = [m for m in start.network[-1].modules() if isinstance(m, nn.Linear)]
    assert [module.out_features for module in linear] == [*widths, 3]
    assert start.model_config == {
        "backbone": "tiny",
        "weights": "DEFAULT",
        "image_size": None,
        "hidden_layer_sizes": widths,
        "dropout": 0.5,
    }


@pytest.mark.parametrize("given", [0, (8, 0), (-1,), (8, 2.5), [8.0], ["8"], (None,)])
def test_widths_that_are_none(given):
    with pytest.raises(ValueError, match="must be positive ints, one for each"):
        build_initial_model(hidden_layer_sizes=given)


def test_another_size_of_images():
    assert build_initial_model(image_size=24).preprocessing == Preprocessing(24, 24)


def test_weights_of_a_file(tmp_path):
    state = {k: v + 1 for k, v in load_backbone("tiny").network.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    start = build_initial_model(weights=tmp_path / "a.safetensors")
    assert start.digest != build_initial_model().digest
    name = "stem.0.weight"
    assert torch.equal(start.network.get_parameter(name), state[f"stages.{name}"])


def test_a_network_without_stages():
    register_backbone(
        "uncut",
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
        preprocessing=Preprocessing(16, 16),
    )
    with pytest.raises(ValueError, match="stages"):
        build_initial_model("uncut")


def test_going_on_is_with_a_copy(fitted):
    start = InitialModel.from_fitted(fitted)
    assert bits(start.network) == bits(fitted.module_)
    assert start.network is not fitted.module_
    with torch.no_grad():
        start.network[-1][0].weight.zero_()
    assert bits(start.network) != bits(fitted.module_)


def test_going_on_is_with_all_that_belongs_to_it(fitted):
    start = InitialModel.from_fitted(fitted)
    assert start.stages == ["stem", "stage1"]
    assert start.preprocessing == Preprocessing(20, 20)
    assert start.model_config["hidden_layer_sizes"] == [4]
    assert start.digest == fitted._digest
    reference = BackboneSpec.to(load_backbone("tiny"), "DEFAULT")
    assert start.pretrained == (0, reference)  # all was trained


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backbone", "resnet18"),
        ("weights", None),
        ("image_size", 24),
        ("hidden_layer_sizes", (5,)),
        ("dropout", 0.5),
    ],
)
def test_going_on_is_with_the_same_network(fitted, name, value):
    other = copy.copy(fitted).set_params(**{name: value})
    with pytest.raises(ValueError, match=f"Got other values of {name}. Fit with"):
        InitialModel.from_fitted(other)
