"""Tests of the network in training: new head, frozen prefix, trainable stages."""

import copy

import pytest
import torch
from torch import nn

from sktl._backbones.new_head import replace_head, stage_names
from sktl._backbones.registry import load_backbone
from sktl._images.preprocessing import Normalization
from sktl._training.network import (
    NormalizedInput,
    PartiallyFrozen,
    count_frozen_parts,
    count_trainable_stages,
    interpolate_weights,
    network_digest,
    output_shape,
    soften_head,
)

STAGES = ["stem", "stage1", "stage2", "stage3"]


def one_step(network):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1)
    network.train()
    network(torch.randn(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "family",
    [
        "resnet18",
        pytest.param("mobilenet_v2", marks=pytest.mark.slow),
        pytest.param("densenet121", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("trainable", ["head", 1])
def test_frozen_stages_do_not_change(family, trainable):
    network = replace_head(load_backbone(family, None), 3)
    before = copy.deepcopy(network.state_dict())
    names = stage_names(network)
    n_trainable = count_trainable_stages(trainable, names, "resnet_mini")
    one_step(PartiallyFrozen(network, n_trainable))
    trained = ("head.", *(f"{n}." for n in names[len(names) - n_trainable :]))
    trained += ("neck.",) if n_trainable else ()
    changed = {
        name
        for name, value in network.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed
    assert all(name.startswith(trained) for name in changed)
    parameters = {name for name, _ in network.named_parameters()}
    assert {n for n in parameters if n.startswith(trained)} <= changed


def test_training_does_not_change_the_shared_backbone():
    backbone = load_backbone("resnet_mini")
    before = copy.deepcopy(backbone.network.state_dict())
    one_step(PartiallyFrozen(replace_head(backbone, 3), 4))
    for name, value in backbone.network.state_dict().items():
        assert torch.equal(value, before[name])
    assert not backbone.network.training
    assert not any(p.requires_grad for p in backbone.network.parameters())


@pytest.mark.parametrize("n_trainable", range(6))
def test_unfreeze(n_trainable):
    network = replace_head(load_backbone("resnet_mini"), 3)
    partially_frozen = PartiallyFrozen(network, 0)
    partially_frozen.train()
    partially_frozen.unfreeze(n_trainable)
    *stages, neck, head = network
    trainable = [False] * (5 - n_trainable) + [True] * n_trainable
    assert [stage.training for stage in stages] == trainable
    assert [next(s.parameters()).requires_grad for s in stages] == trainable
    assert neck.training == (n_trainable > 0)
    assert head.training


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [("head", 0), ("all", 4), (0, 0), (2, 2), (4, 4), ("stage3", 1), ("stem", 4)],
)
def test_count_trainable_stages(trainable, expected):
    assert count_trainable_stages(trainable, STAGES, "net") == expected


def test_a_network_without_stages_has_only_a_head():
    assert count_trainable_stages("head", ["network"], "net") == 0
    assert count_trainable_stages("all", ["network"], "net") == 1
    with pytest.raises(ValueError, match=r"'net' has no stages, so .* Got 2 instead"):
        count_trainable_stages(2, ["network"], "net")


@pytest.mark.parametrize(
    ("trainable", "reason"),
    [("stage9", "one of the stages"), (5, "from 0 to 4"), (-1, "from 0 to 4")],
)
def test_invalid_trainable(trainable, reason):
    with pytest.raises(ValueError, match=reason):
        count_trainable_stages(trainable, STAGES, "net")
    with pytest.raises(
        ValueError, match=r"Do you mean 'stage3'\? describe_backbone\('net'\) shows"
    ):
        count_trainable_stages("stage_3", STAGES, "net")


def test_bfloat16_returns_float32():
    network = replace_head(load_backbone("resnet_mini"), 3)
    x = torch.randn(2, 3, 32, 32)
    exact = PartiallyFrozen(network, 1).eval()(x)
    rough = PartiallyFrozen(network, 1, torch.bfloat16).eval()(x)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)


def test_count_frozen_parts():
    network = replace_head(load_backbone("resnet_mini"), 3)  # 5 stages, neck, head
    assert [count_frozen_parts(network, n) for n in range(6)] == [6, 4, 3, 2, 1, 0]


def test_digest_depends_on_weights_and_architecture():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    copied = copy.deepcopy(network)
    assert network_digest(copied) == network_digest(network)
    copied[1].running_mean += 1
    assert network_digest(copied) != network_digest(network)
    strided = copy.deepcopy(network)
    strided[0].stride = (2, 2)
    assert network_digest(strided) != network_digest(network)


def test_output_shape_leaves_the_network_as_it_is():
    network = replace_head(load_backbone("resnet_mini"), 3).train()
    before = network_digest(network)
    assert output_shape(network, 32) == (3,)
    assert output_shape(network[:5], 32) == (256, 4, 4)
    assert all(module.training for module in network.modules())
    assert network_digest(network) == before


def test_freeze_batch_norm_keeps_the_statistics():
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for freeze in (False, True):
        network = replace_head(load_backbone("resnet_mini"), 3)
        before = copy.deepcopy(network.stage4.state_dict())
        PartiallyFrozen(network, 1, freeze_batch_norm=freeze).train()(x)
        changed = [
            name
            for name, value in network.stage4.state_dict().items()
            if not torch.equal(value, before[name])
        ]
        assert bool(changed) == (not freeze)


def test_prefix_is_fused_once_and_again_after_a_change_of_depth():
    network = replace_head(load_backbone("resnet_mini"), 3)
    fused = []

    def fuse(prefix):
        fused.append(len(prefix))
        return copy.deepcopy(prefix)

    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = PartiallyFrozen(network, 1, fuse_prefix=fuse).eval()
    parameters = len(list(model.parameters()))
    expected = network.eval()(x)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
    assert len(list(model.parameters())) == parameters
    model.unfreeze(2)
    torch.testing.assert_close(model(x), expected)
    model.unfreeze(5)  # no prefix is left
    torch.testing.assert_close(model(x), expected)
    assert fused == [4, 3]


def test_pixels_are_normalized_and_activations_are_not():
    backbone = load_backbone("resnet_mini")
    network = replace_head(backbone, 3)
    model = NormalizedInput(PartiallyFrozen(network, 1), backbone.preprocessing).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 40, 40, 3), generator=generator).to(torch.uint8)
    with torch.inference_mode():
        normalized = Normalization(backbone.preprocessing)(pixels)
        torch.testing.assert_close(model(pixels), network(normalized))
        activations = network[:4](normalized)
        torch.testing.assert_close(model(activations), network(normalized))


def test_output_shape_of_a_prefix_without_parameters():
    prefix = nn.Sequential(nn.AvgPool2d(2))
    assert output_shape(prefix, 16) == (3, 8, 8)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert output_shape(convolution, 16) == (4, 14, 14)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_interpolated_weights(alpha):
    first = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    last = copy.deepcopy(first)
    last(torch.randn(5, 3))  # changes the statistics and counts a batch
    with torch.no_grad():
        last[0].weight.add_(torch.arange(6.0).reshape(2, 3))
    initial, final = first.state_dict(), last.state_dict()
    got = interpolate_weights(initial, final, alpha)
    assert got.keys() == final.keys()
    assert got["1.num_batches_tracked"] == 1
    for name in ("0.weight", "0.bias", "1.running_mean", "1.running_var"):
        expected = (1 - alpha) * initial[name] + alpha * final[name]
        torch.testing.assert_close(got[name], expected)
    for weights, end in ((initial, 0.0), (final, 1.0)):
        if alpha == end:
            assert torch.equal(got["0.weight"], weights["0.weight"])


@pytest.mark.parametrize("hidden_layer_sizes", [(), (4,)])
def test_softened_head_makes_the_same_predictions_less_certain(hidden_layer_sizes):
    network = replace_head(
        load_backbone("tiny"), 3, hidden_layer_sizes=hidden_layer_sizes
    ).eval()
    head, x = network[-1], torch.randn(20, 16)
    with torch.no_grad():
        before = head(x)
        soften_head(head)
        after = head(x)
    factor = (after.norm() / before.norm()).item()
    assert 0 < factor < 1
    torch.testing.assert_close(after, factor * before)
