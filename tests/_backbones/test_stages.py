"""Tests of sktl._backbones.stages."""

from collections.abc import Callable
from functools import cache
from itertools import chain

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from sktl._backbones import stages as stages_module
from sktl._backbones.check_stages import check_staged_model
from sktl._backbones.stages import StagedModel
from sktl._backbones.torchvision import describe_network
from sktl._backbones.weights import skip_weight_allocation

_CLASSIFIERS = models.list_models(module=models)
_TRANSFORMERS = [name for name in _CLASSIFIERS if name.startswith("vit_")]

# One of each family: the side of the output of each stage for 224 pixels, and the
# module that sees the penultimate feature.
_FAMILIES = {
    "alexnet": ((55, 27, 6), "classifier.6"),
    "convnext_tiny": ((56, 56, 28, 14, 7), "classifier.2"),
    "densenet121": ((112, 56, 28, 14, 7), "classifier"),
    "efficientnet_b0": ((112, 56, 28, 14, 7), "classifier.1"),
    "efficientnet_v2_s": ((112, 56, 28, 14, 7), "classifier.1"),
    "googlenet": ((112, 56, 28, 14, 7), "fc"),
    "inception_v3": ((109, 52, 25, 12, 5), "fc"),
    "maxvit_t": ((112, 56, 28, 14, 7), "classifier.5"),
    "mnasnet0_5": ((112, 56, 28, 14, 7), "classifier.1"),
    "mobilenet_v2": ((112, 56, 28, 14, 7), "classifier.1"),
    "mobilenet_v3_small": ((112, 56, 28, 14, 7), "classifier.3"),
    "regnet_x_400mf": ((112, 56, 28, 14, 7), "fc"),
    "regnet_y_400mf": ((112, 56, 28, 14, 7), "fc"),
    "resnet18": ((112, 56, 28, 14, 7), "fc"),
    "resnext50_32x4d": ((112, 56, 28, 14, 7), "fc"),
    "shufflenet_v2_x0_5": ((56, 28, 14, 7), "fc"),
    "squeezenet1_0": ((109, 54, 27, 13), "classifier.1"),
    "squeezenet1_1": ((111, 55, 27, 13), "classifier.1"),
    "swin_t": ((56, 56, 28, 14, 7), "head"),
    "swin_v2_t": ((56, 56, 28, 14, 7), "head"),
    "vgg11": ((224, 112, 56, 28, 7), "classifier.6"),
    "vgg11_bn": ((224, 112, 56, 28, 7), "classifier.6"),
    "wide_resnet50_2": ((112, 56, 28, 14, 7), "fc"),
}


def split_into_stages(network: nn.Module, image_size: int) -> StagedModel:
    return stages_module.split_into_stages(describe_network(network), image_size)


def last_linear(network: nn.Module) -> str | None:
    return stages_module.last_linear(network, describe_network(network))


def _without_values(name: str) -> nn.Module:
    options = {}
    if name in ("googlenet", "inception_v3"):
        # Auxiliary heads run in training only. transform_input as with weights.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    before = torch.get_rng_state()
    with skip_weight_allocation():
        network: nn.Module = models.get_model(name, **options)
    # Weights files are read without the lock of the random number generators.
    assert torch.equal(torch.get_rng_state(), before)
    return network.eval()


def _randomized(network: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value of its own, so that each matters."""
    generator = torch.Generator().manual_seed(0)
    # Such as the positions within a window of attention.
    constants = {
        name: value
        for name, value in network.named_buffers()
        if not name.endswith(("running_mean", "running_var"))
    }
    network.to_empty(device="cpu")
    for name, value in chain(network.named_parameters(), network.named_buffers()):
        if name in constants:
            value.copy_(constants[name])
        elif value.ndim == 1:
            value.data.uniform_(0.5, 1.5, generator=generator)
        else:
            fan_in = value[0].numel()
            value.data.uniform_(-1, 1, generator=generator).mul_(2 / fan_in**0.5)
    return network


@cache
def _images(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def _sides(parts: StagedModel, side: int) -> list[int]:
    x, sides = torch.empty(1, 3, side, side, device="meta"), []
    for stage in parts.stages.values():
        tensors = dict(chain(stage.named_parameters(), stage.named_buffers()))
        on_meta = {name: value.to("meta") for name, value in tensors.items()}
        x = torch.func.functional_call(stage, on_meta, (x,))
        sides.append(x.shape[-1])
    return sides


# By default a network with residual blocks, one with branches, and one without either.
_FEW = ("resnet18", "shufflenet_v2_x0_5", "squeezenet1_1")
_each_family = pytest.mark.parametrize(
    "name",
    [
        name if name in _FEW else pytest.param(name, marks=pytest.mark.slow)
        for name in _FAMILIES
    ],
)


@_each_family
def test_stages_and_head_are_the_network(name: str) -> None:
    network = _randomized(_without_values(name))
    parts = split_into_stages(network, 224)
    images = _images(224 if name == "maxvit_t" else 80)
    with torch.inference_mode():
        expected = network(images.clone())
        x, outputs = images.clone(), []
        for stage in parts.stages.values():
            x = stage(x)
            outputs.append((x, x.clone()))
        got = parts.head(x)
    assert expected.isfinite().all()
    assert (expected[0] != expected[1]).any()
    assert torch.equal(got, expected)
    # No stage may write into what the one before has given.
    assert all(torch.equal(seen, kept) for seen, kept in outputs)


@_each_family
def test_a_stage_ends_where_the_resolution_halves(name: str) -> None:
    sides, linear = _FAMILIES[name]
    network = _without_values(name)
    parts = split_into_stages(network, 224)
    assert _sides(parts, 224) == list(sides)
    assert (
        list(parts.stages)
        == ["stem", "stage1", "stage2", "stage3", "stage4"][: len(sides)]
    )
    assert last_linear(network) == linear


@pytest.mark.parametrize(
    "name",
    [
        name if name in _FEW else pytest.param(name, marks=pytest.mark.slow)
        for name in _CLASSIFIERS
        if name not in _TRANSFORMERS
    ],
)
def test_every_cnn_is_split_without_values(name: str) -> None:
    network = _without_values(name)
    parts = split_into_stages(network, 224)
    assert 3 <= len(parts.stages) <= 5
    # Each parameter of the network is in exactly one part, none is added.
    modules = [*parts.stages.values(), parts.head]
    shares = [parameter for module in modules for parameter in module.parameters()]
    assert len(shares) == len(set(shares))
    assert set(shares) == set(network.parameters())
    # The last linear layer, which gives one output for each category.
    linear = network.get_submodule(last_linear(network) or "")
    assert next(linear.parameters()).shape[0] == 1000
    assert linear in set(parts.head.modules())


@pytest.mark.parametrize("side", [299, 384, 480])
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("inception_v3", "alexnet", "swin_t")
        ),
    ],
)
def test_stages_do_not_depend_on_the_image_size(name: str, side: int) -> None:
    network = _without_values(name)
    one, other = split_into_stages(network, 224), split_into_stages(network, side)
    for stage, same in zip(one.stages.values(), other.stages.values(), strict=True):
        assert set(stage.parameters()) == set(same.parameters())


def test_the_stages_of_a_resnet_are_its_layers() -> None:
    network = _without_values("resnet18")
    stages = split_into_stages(network, 224).stages
    assert list(stages["stem"].children()) == [
        network.conv1,
        network.bn1,
        network.relu,
    ]
    assert list(stages["stage1"].children()) == [network.maxpool, network.layer1]
    assert list(stages["stage4"].children()) == [network.layer4]


@pytest.mark.slow
def test_a_patch_embedding_is_the_stem() -> None:
    network = _without_values("convnext_tiny")
    stages = split_into_stages(network, 224).stages
    assert list(stages["stem"].children()) == [network.features[0]]
    assert list(stages["stage1"].children()) == [network.features[1]]


def test_a_pool_at_the_end_belongs_to_the_stage_before() -> None:
    network = _without_values("alexnet")
    stages = split_into_stages(network, 224).stages
    assert list(stages["stem"].children()) == list(network.features[:2])
    assert list(stages["stage2"].children()) == list(network.features[5:])


def test_stages_return_the_activations_of_the_network() -> None:
    network = _randomized(_without_values("regnet_y_400mf"))
    seen: dict[str, Tensor] = {}
    network.trunk_output.block2.register_forward_hook(
        lambda module, inputs, output: seen.update(block2=output)
    )
    with torch.inference_mode():
        network(_images(64))
        x = _images(64)
        for stage in list(split_into_stages(network, 224).stages.values())[:3]:
            x = stage(x)
    assert torch.equal(x, seen["block2"])


def test_training_a_stage_trains_the_network() -> None:
    network = _randomized(_without_values("resnet18"))
    stage = split_into_stages(network, 224).stages["stage4"]
    stage.requires_grad_(False)
    assert not any(p.requires_grad for p in network.layer4.parameters())
    assert all(p.requires_grad for p in network.layer3.parameters())


def test_input_transforms_are_kept_only_where_the_network_has_them() -> None:
    network = _randomized(_without_values("googlenet"))
    network.transform_input = False
    with torch.inference_mode():
        x = _images(64)
        assert torch.equal(split_into_stages(network, 224)(x.clone()), network(x))


@pytest.mark.parametrize(
    "name",
    [
        name if name == "vit_b_16" else pytest.param(name, marks=pytest.mark.slow)
        for name in _TRANSFORMERS
    ],
)
def test_a_vision_transformer_has_four_equal_stages(name: str) -> None:
    network = _without_values(name)
    side = network.image_size
    stages = split_into_stages(network, side).stages
    assert list(stages) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    layers = list(network.encoder.layers)
    quarter = len(layers) // 4
    for k in range(4):
        blocks = list(stages[f"stage{k + 1}"])
        assert blocks[:quarter] == layers[k * quarter : (k + 1) * quarter]
    assert list(stages["stage4"])[quarter:] == [network.encoder.ln]
    assert last_linear(network) == "heads.head"


def test_stages_of_a_vision_transformer_are_the_network() -> None:
    torch.manual_seed(0)
    network = models.VisionTransformer(32, 8, 5, 2, 16, 24, num_classes=3).eval()
    nn.init.normal_(network.heads.head.weight)
    parts = split_into_stages(network, 32)
    check_staged_model(network, parts, 32)
    x = torch.randn(2, 3, 32, 32)
    # 5 layers: the last stage has two.
    assert [len(stage) for stage in parts.stages.values()] == [2, 1, 1, 1, 3]
    assert parts.stages["stem"](x).shape == (2, 17, 16)


class _Small(nn.Module):
    """A network that defines its stages."""

    def __init__(self, collect: Callable[..., object], factor: float = 1.0) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, stride=2)
        self.two = nn.Conv2d(4, 5, 3, stride=2)
        self.stages = collect([self.one, self.two])
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(pool, nn.Linear(5, 6))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x))) * self.factor  # type: ignore[no-any-return]


def _by_name(blocks: list[nn.Module]) -> dict[str, nn.Module]:
    return dict(zip(("low", "high"), blocks, strict=True))


@pytest.mark.parametrize(
    ("collect", "names"),
    [
        (nn.ModuleList, ["stem", "stage1"]),
        (tuple, ["stem", "stage1"]),
        (lambda blocks: nn.Sequential(*blocks), ["stem", "stage1"]),
        (_by_name, ["low", "high"]),
        (lambda blocks: nn.ModuleDict(_by_name(blocks)), ["low", "high"]),
    ],
)
def test_a_network_may_define_its_stages(
    collect: Callable[..., object], names: list[str]
) -> None:
    network = _Small(collect).eval()
    parts = split_into_stages(network, 32)
    assert list(parts.stages) == names
    assert last_linear(network) == "head.1"
    check_staged_model(network, parts, 32)


def test_stages_that_differ_from_the_network_raise() -> None:
    network = _Small(nn.ModuleList, factor=1.01).eval()
    with pytest.raises(ValueError, match="_Small, run in order"):
        check_staged_model(network, split_into_stages(network, 32), 32)

    stranger = _Small(lambda blocks: [nn.Conv2d(3, 4, 1), blocks[1]]).eval()
    with pytest.raises(ValueError, match="_Small must be its own modules"):
        check_staged_model(stranger, split_into_stages(stranger, 32), 32)


def test_other_networks_have_no_stages() -> None:
    class Changed(models.ResNet):
        """A subclass may do something else in forward."""

    with skip_weight_allocation():
        changed = Changed(models.resnet.BasicBlock, [1, 1, 1, 1])
    for network in (changed, nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Identity()):
        reason = describe_network(network).reason_not_staged
        assert reason is not None
        assert type(network).__name__ in reason
        with pytest.raises(ValueError, match="No stages"):
            split_into_stages(network, 224)


def test_a_network_without_linear_layer_has_no_last_one() -> None:
    network = _without_values("resnet18")
    network.fc = nn.Identity()
    assert last_linear(network) is None
    assert last_linear(nn.Sequential(nn.Conv2d(3, 4, 1))) is None


@pytest.mark.parametrize(
    ("name", "root", "others"),
    [
        ("resnet18", "fc", set()),
        ("squeezenet1_1", "classifier", set()),
        ("mobilenet_v3_small", "classifier", {"classifier.0"}),
        ("convnext_tiny", "classifier", {"classifier.0"}),
        ("vgg11", "classifier", {"classifier.0", "classifier.3"}),
        ("swin_t", "head", {"norm"}),
        ("vit_b_32", "heads", set()),
    ],
)
def test_tensors_of_the_head(name: str, root: str, others: set[str]) -> None:
    network = _without_values(name)
    head = stages_module.find_head(network, describe_network(network))
    last = last_linear(network)
    assert head.name == root
    assert head.last == {f"{last}.weight", f"{last}.bias"}
    layers = {tensor.rpartition(".")[0] for tensor in head.tensors - head.last}
    assert layers == others


def test_a_network_without_linear_layer_has_no_head() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1))
    head = stages_module.find_head(network, describe_network(network))
    assert (head.name, head.tensors, head.last) == ("", set(), set())


@pytest.mark.parametrize(
    "name",
    [
        *("head", "neck", "network", "penultimate", "block.1", ""),
        # Attributes of torch modules, which no child can have as its name.
        *("keys", "pop", "append", "type", "training"),
    ],
)
def test_names_of_own_stages_are_checked(name: str) -> None:
    network = nn.Module()
    network.stages = {name: nn.Identity()}  # type: ignore[assignment]
    network.head = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="The name of a stage must be one word"):
        split_into_stages(network, 32)
