"""Tests of sktl.describe_backbone."""

import json

import pytest
import torch
from torch import nn
from torchvision import models

from sktl import (
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedFeatures,
    describe_backbone,
    list_backbones,
    register_backbone,
)
from sktl._backbones import registry, torchvision
from sktl._backbones.registry import load_backbone
from sktl._training.network import count_trainable_stages

TORCHVISION = [name for name in list_backbones() if name in torchvision.names()]
FAST = {"resnet18", "squeezenet1_0", "vit_b_32"}


class ReadsValues(nn.Module):
    """A network that runs only on real values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        scale = 2.0 if x.mean().item() > 0 else 1.0
        return self.fc(self.conv(x * scale).mean((2, 3)))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST else pytest.mark.slow)
        for name in TORCHVISION
    ],
)
def test_costs_are_those_that_torchvision_publishes(name):
    member = models.get_model_weights(name).DEFAULT
    description = describe_backbone(name)
    assert description.weights == member.name
    assert description.known_weights == list(type(member).__members__)
    assert description.license == member.meta.get("license")
    assert description.n_categories == len(member.meta["categories"])
    assert description.image_size == member.transforms().crop_size[0]
    published = member.meta["_ops"]  # billions, three decimals
    assert description.n_multiply_adds / 1e9 == pytest.approx(published, abs=6e-4)
    if name != "inception_v3":  # published with the auxiliary head
        assert description.n_parameters == member.meta["num_params"]


@pytest.mark.parametrize("image_size", [None, 56])
def test_stages_are_those_that_run(image_size):
    backbone = load_backbone("resnet_mini")
    description = describe_backbone("resnet_mini", image_size=image_size)
    parts = {part["name"]: part for part in description.parts}
    assert list(parts) == [*backbone.stages, "penultimate", "head"]
    side = image_size or 40
    assert description.image_size == side
    x = torch.zeros(1, 3, side, side)
    for name, stage in backbone.stages.items():
        x = stage(x)
        part = parts[name]
        shape = (1, part["n_channels"], part["n_rows"], part["n_columns"])
        assert shape == x.shape
        assert part["n_parameters"] == sum(p.numel() for p in stage.parameters())
    # Of the convolution of the stem: 3 x 3 x 3 products for each of its outputs.
    assert parts["stem"]["n_multiply_adds"] == 27 * 32 * side**2
    assert parts["penultimate"]["n_channels"] == 256
    assert parts["head"]["n_multiply_adds"] == 200 * 256
    assert sum(part["n_multiply_adds"] for part in description.parts) == (
        description.n_multiply_adds
    )


def test_weights_are_neither_downloaded_nor_read(monkeypatch):
    monkeypatch.delattr(torchvision, "fetch_weights")
    monkeypatch.delattr(registry, "load_weights")
    swag = describe_backbone("vit_b_16", weights="IMAGENET1K_SWAG_E2E_V1")
    assert swag.image_size == 384
    assert "SWAG" in swag.license
    assert swag.n_multiply_adds / 1e9 == pytest.approx(55.484, abs=1e-3)
    assert describe_backbone("resnet18", weights=None).n_categories is None
    own = describe_backbone("resnet18", weights="folder/own.pth")
    assert (own.weights, own.license) == ("folder/own.pth", None)


@pytest.mark.parametrize("pooling", ["avg", "flatten"])
def test_bytes_are_those_in_the_cache(images, tmp_path, pooling):
    key = {"avg": "feature_bytes", "flatten": "activation_bytes"}[pooling]
    for part in describe_backbone("tiny").parts[:-1]:
        memory = tmp_path / part["name"]
        PretrainedFeatures(
            "tiny", layer=part["name"], pooling=pooling, memory=memory
        ).fit_transform(images[:32])
        (shard,) = memory.rglob("*.safetensors")
        header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        assert part[key] == (shard.stat().st_size - header) / 32


def test_candidates_are_accepted(images):
    grids = describe_backbone("five stages").param_grids
    features = PretrainedFeatures("five stages", engine="torch")
    widths = [
        features.set_params(layer=layer).fit_transform(images[:2])
        for layer in grids["PretrainedFeatures"]["layer"]
    ]
    assert [rows.shape[1] for rows in widths] == [16, 16, 12, 8, 6]
    stages = ["stem", "stage1", "stage2", "stage3", "stage4"]
    candidates = grids["FineTunedCNNClassifier"]["trainable"]
    counts = [count_trainable_stages(value, stages, "") for value in candidates]
    assert counts == [0, 1, 2, 3, 4, 5]
    assert grids.keys() == {
        PretrainedFeatures.__name__,
        FineTunedCNNClassifier.__name__,
    }


def test_description_is_plain_and_readable():
    register_backbone(
        "<b>",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 7)),
        preprocessing=Preprocessing(8, 8),
        categories=tuple("abcdefg"),
    )
    description = describe_backbone("<b>")
    read = json.loads(json.dumps(description))
    assert read["parts"] == description["parts"] == description.parts
    assert (description.n_categories, description.n_parameters) == (7, 112 + 145 * 7)
    text, html = str(description), description._repr_html_()
    assert repr(description) == text
    for shown in ("1,015", "not stated", description.reason_without_stages[:20]):
        assert shown in text
        assert shown in html
    assert "<b>" in text
    assert "<b><b></b>" not in html
    assert "&lt;b&gt;" in html
    # The columns of the table are aligned.
    table = text.split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1
    assert len(table) == len(description.parts) + 1


def test_network_that_reads_values():
    register_backbone("reads values", ReadsValues, preprocessing=Preprocessing(16, 16))
    description = describe_backbone("reads values")
    assert description.n_multiply_adds is None
    assert [part["n_channels"] for part in description.parts] == [4, 2]
    assert [part["n_parameters"] for part in description.parts] == [112, 10]
    assert "not measured" in str(description)


def test_network_without_linear_layer():
    register_backbone(
        "no linear layer",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.AvgPool2d(6)),
        preprocessing=Preprocessing(8, 8),
        stages={"stem": ["0"]},
        head=["1"],
    )
    description = describe_backbone("no linear layer")
    assert [part["name"] for part in description.parts] == ["stem"]
    assert description.n_parameters == 27 * 4
    assert description.n_multiply_adds == 27 * 4 * 36
    assert description.param_grids == {"PretrainedFeatures": {"layer": ["stem"]}}


@pytest.mark.parametrize(
    ("name", "smallest", "multiple", "shown"),
    [
        ("vit_b_32", 32, 32, " 224 x 224 pixels, a multiple of 32\n"),
        ("resnet_mini", 8, 1, " 40 x 40 pixels, at least 8 x 8\n"),
        pytest.param("maxvit_t", 224, 1, "no other size\n", marks=pytest.mark.slow),
    ],
)
def test_image_sizes(name, smallest, multiple, shown):
    description = describe_backbone(name, weights=None)
    assert description.min_image_size == smallest
    assert description.image_size_multiple == multiple
    assert description.is_image_size_fixed == (name == "maxvit_t")
    assert shown in str(description)


@pytest.mark.parametrize(
    ("name", "n_prefix", "parameters_of_head"),
    [
        pytest.param(
            "timm/test_vit.r160_in1k", 1, 64 * 1000 + 1000, marks=pytest.mark.slow
        ),
        pytest.param(
            "timm/deit_tiny_distilled_patch16_224",
            2,
            2 * (192 * 1000 + 1000),
            marks=pytest.mark.slow,
        ),
        pytest.param("timm/vit_small_patch16_224.dino", 1, 0, marks=pytest.mark.slow),
    ],
)
def test_networks_of_timm(name, n_prefix, parameters_of_head):
    timm = pytest.importorskip("timm")
    network = timm.create_model(name.removeprefix("timm/"))
    description = describe_backbone(name, weights=None)
    n_parameters = sum(each.numel() for each in network.parameters())
    assert description.n_parameters == n_parameters
    assert sum(part["n_parameters"] for part in description.parts) == n_parameters
    stage = description.parts[1]
    assert stage["n_tokens"] == stage["n_rows"] * stage["n_columns"] + n_prefix
    assert stage["feature_bytes"] == 4 * network.num_features + 36
    heads = [part for part in description.parts if part["name"] == "head"]
    assert len(heads) == (parameters_of_head > 0)
    assert sum(part["n_parameters"] for part in heads) == parameters_of_head
    assert description.license is None  # of random weights
    expected = network.pretrained_cfg["license"]
    assert describe_backbone(name).license == expected


def test_saved_file_has_its_own_network(images, tmp_path):
    y = ["ant", "bee"] * 20
    options = {"max_epochs": 0, "head_init": "random", "engine": "torch"}
    tuned = FineTunedCNNClassifier("five stages", trainable=1, **options)
    tuned.fit(images, y).save(tmp_path / "tuned.safetensors")
    description = describe_backbone("resnet18", weights=tmp_path / "tuned.safetensors")
    assert description.name == "five stages"
    assert description.n_categories == 2
    assert description.parts[-1]["n_channels"] == 2
    assert description.parts[:-1] == describe_backbone("five stages").parts[:-1]


def test_default_dtype_changes_nothing():
    expected = describe_backbone("resnet_mini")
    torch.set_default_dtype(torch.float64)
    try:
        assert describe_backbone("resnet_mini") == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet19"}, "no backbone 'resnet19'. Do you mean resnet1"),
        ({"name": "resnet18", "image_size": 0}, "'image_size' parameter of describe"),
        ({"name": "resnet18", "weights": "V9"}, "has the weights IMAGENET1K_V1, DEF"),
        ({"name": "maxvit_t", "image_size": 256}, "only images of 224 pixels"),
        ({"name": "resnet18", "weights": 3}, "'weights' parameter of describe_back"),
    ],
)
def test_invalid_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        describe_backbone(**arguments)
