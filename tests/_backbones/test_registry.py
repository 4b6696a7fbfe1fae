"""Tests of sktl._backbones.registry."""

import copy
import hashlib
import pickle
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

from sktl._backbones import registered, registry
from sktl._backbones.backbone import Backbone
from sktl._backbones.catalog import list_backbones
from sktl._backbones.feature_extractor import FeatureExtractor, layer_widths
from sktl._backbones.new_head import replace_head
from sktl._backbones.register import register_backbone
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._backbones.source import NetworkStructure
from sktl._images.preprocessing import Preprocessing
from sktl._utils.keyed_cache import KeyedCache
from sktl._utils.tensor_file import state_dict_digest

_SMALL = Preprocessing(resize_size=32, crop_size=32)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test without cached or registered backbones."""
    monkeypatch.setattr(registered, "registrations", {})
    monkeypatch.setattr(registry, "backbones", KeyedCache(max_size=4))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


def _resnet10(num_classes: int = 10) -> models.ResNet:
    return models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)


def _small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


def _noise(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def _saved(folder: Path, network: nn.Module, name: str = "net.pth") -> Path:
    torch.save(network.state_dict(), folder / name)
    return folder / name


def test_a_backbone_is_torchvisions_network_and_transform(test_data: Path) -> None:
    path = test_data / "weights" / "squeezenet1_1-imagenet.pth"
    photo = next((test_data / "hymenoptera" / "val").rglob("*.jpg"))
    image = Image.open(photo).convert("RGB")
    expected = models.squeezenet1_1()
    expected.load_state_dict(torch.load(path, weights_only=True))
    weights = models.SqueezeNet1_1_Weights.DEFAULT
    x = weights.transforms()(image)[None]  # (1, 3, 224, 224)

    backbone = load_backbone("squeezenet1_1", path)

    own = backbone.preprocessing
    pixels = torch.from_numpy(own(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (own.mean, own.std))
    torch.testing.assert_close(((pixels - mean) / std)[None], x)
    with torch.inference_mode():
        assert torch.equal(backbone.network(x), expected.eval()(x))
        assert torch.equal(backbone.staged_model(x), expected(x))  # type: ignore[misc]
    assert backbone.categories == tuple(weights.meta["categories"])
    assert backbone.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert backbone.min_size == 17
    assert (backbone.penultimate, backbone.reason_without_stages) == (
        "classifier.1",
        None,
    )
    assert backbone.last_linear is backbone.network.classifier[1]


def test_loaded_networks_are_frozen() -> None:
    backbone = load_backbone("mnasnet0_5", None)
    assert not backbone.network.training
    for value in backbone.network.state_dict().values():
        assert value.device.type == "cpu"
        assert value.dtype in (torch.float32, torch.int64)
    assert not any(p.requires_grad for p in backbone.network.parameters())


def test_random_weights_are_seeded_and_those_of_torchvision() -> None:
    torch.manual_seed(3)
    expected = models.shufflenet_v2_x0_5()
    before = torch.get_rng_state()

    one, same, other = (
        load_backbone("shufflenet_v2_x0_5", None, random_state=seed)
        for seed in (3, 3, 4)
    )

    assert torch.equal(torch.get_rng_state(), before)
    assert one is same
    assert one.digest != other.digest
    assert one.categories is None
    assert torch.equal(one.network.fc.weight, expected.fc.weight)
    assert not torch.equal(other.network.fc.weight, expected.fc.weight)


def test_equal_content_is_loaded_once(tmp_path: Path) -> None:
    first = _saved(tmp_path, _resnet10())
    second = tmp_path / "copy.pth"
    second.write_bytes(first.read_bytes())
    register_backbone("mine", _resnet10, preprocessing=_SMALL)
    one = load_backbone("mine", first)
    assert load_backbone("mine", str(second)) is one
    # Another content under the same path is another backbone.
    _saved(tmp_path, _resnet10())
    other = load_backbone("mine", first)
    assert other.digest != one.digest
    assert not torch.equal(other.network.fc.weight, one.network.fc.weight)


def test_threads_share_one_network() -> None:
    built, loaded = [], []

    def build() -> nn.Module:
        built.append(1)
        return _resnet10()

    register_backbone("mine", build, preprocessing=_SMALL)
    threads = [
        threading.Thread(target=lambda: loaded.append(load_backbone("mine")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(loaded) == 8
    assert len(set(map(id, loaded))) == 1


def test_only_the_last_used_backbones_are_cached() -> None:
    register_backbone("mine", _small, preprocessing=_SMALL)
    first = load_backbone("mine", random_state=0)
    second = load_backbone("mine", random_state=1)
    for seed in range(2, 9):
        load_backbone("mine", random_state=seed)
        assert load_backbone("mine", random_state=0) is first
    assert load_backbone("mine", random_state=1) is not second


def test_a_copy_can_be_trained_and_its_stages_are_its_own() -> None:
    register_backbone("mine", _resnet10, preprocessing=_SMALL)
    shared = load_backbone("mine")
    private = copy.deepcopy(shared)
    private.stages["stage4"].requires_grad_(True)
    trained = {n for n, p in private.network.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"layer4"}
    assert not any(p.requires_grad for p in shared.network.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda: models.googlenet(init_weights=False, transform_input=True),
        lambda: models.inception_v3(init_weights=False, transform_input=True),
        lambda: models.inception_v3(
            init_weights=False, transform_input=True, aux_logits=False
        ),
    ],
    ids=["googlenet", "inception_v3", "inception_v3 without aux"],
)
@pytest.mark.slow
def test_auxiliary_heads_may_be_in_the_file(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    expected = build().eval()
    name = "googlenet" if isinstance(expected, models.GoogLeNet) else "inception_v3"
    backbone = load_backbone(name, _saved(tmp_path, expected))
    with torch.inference_mode():
        x = _noise(96)
        assert torch.equal(backbone.network(x), expected(x))
        assert torch.equal(backbone.staged_model(x), expected(x))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1"])
def test_the_head_takes_the_width_of_the_file(name: str, tmp_path: Path) -> None:
    tuned = models.get_model(name, num_classes=7).eval()
    backbone = load_backbone(name, _saved(tmp_path, tuned))
    with torch.inference_mode():
        assert torch.equal(backbone.network(_noise()), tuned(_noise()))
    assert backbone.categories is None


def test_half_precision_and_safetensors_are_read(tmp_path: Path) -> None:
    source = models.mnasnet0_5().half()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "net.safetensors")
    backbone = load_backbone("mnasnet0_5", tmp_path / "net.safetensors")
    got, expected = backbone.network.classifier[1], source.classifier[1]
    assert got.weight.dtype == torch.float32
    assert torch.equal(got.weight, expected.weight.float())


def test_weights_of_features_only_work_below_the_head(tmp_path: Path) -> None:
    source = models.squeezenet1_1()
    nn.init.constant_(source.classifier[1].weight, float("nan"))
    backbone = load_backbone("squeezenet1_1", _saved(tmp_path, source))
    x = _noise()
    for stage in backbone.stages.values():
        x = stage(x)
    assert x.isfinite().all()


def test_names_of_weights_and_of_their_files_mean_the_same(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = _saved(tmp_path, models.mobilenet_v2())
    name = f"mobilenet_v2-{hashlib.sha256(saved.read_bytes()).hexdigest()[:8]}.pth"
    (hub / name).write_bytes(saved.read_bytes())
    weights = models.MobileNet_V2_Weights.IMAGENET1K_V1
    monkeypatch.setattr(weights.value, "url", f"https://example.invalid/{name}")

    by_name = load_backbone("mobilenet_v2", "IMAGENET1K_V1")

    assert (
        load_backbone("mobilenet_v2", "MobileNet_V2_Weights.IMAGENET1K_V1") is by_name
    )
    assert load_backbone("mobilenet_v2", hub / name) is by_name
    assert by_name.preprocessing.resize_size == 256
    assert by_name.categories == tuple(weights.meta["categories"])
    # Under another name it is anybody's, and goes with the default weights.
    assert load_backbone("mobilenet_v2", saved).preprocessing.resize_size == 232


def test_without_a_connection_the_error_has_the_url(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    url = "http://127.0.0.1:9/resnet18-f37072fd.pth"
    monkeypatch.setattr(models.ResNet18_Weights.DEFAULT.value, "url", url)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9") as caught:
        load_backbone("resnet18")
    assert str(hub) in str(caught.value)


def test_a_registered_network_is_a_backbone() -> None:
    mine = _resnet10().eval()
    preset = models.ResNet18_Weights.DEFAULT.transforms()
    register_backbone(
        "mine", lambda: mine, preprocessing=preset, categories=list("abcdefghij")
    )
    assert "mine" in list_backbones()
    others = {"resnet_mini", *models.list_models(module=models)}
    assert list_backbones() == sorted({"mine", *others})
    backbone = load_backbone("mine")
    with torch.inference_mode():
        assert torch.equal(backbone.network(_noise()), mine(_noise()))
    assert list(backbone.stages) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert backbone.categories == tuple("abcdefghij")
    assert backbone.preprocessing == Preprocessing(256, 224)
    # The user's own network is left as it was.
    assert all(p.requires_grad for p in mine.parameters())


def test_a_registered_network_is_built_from_a_seed_or_a_file(tmp_path: Path) -> None:
    register_backbone("mine", _resnet10, preprocessing=_SMALL)
    torch.manual_seed(5)
    expected = _resnet10()
    before = torch.get_rng_state()
    backbone = load_backbone("mine", None, random_state=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(backbone.network.fc.weight, expected.fc.weight)
    assert backbone is load_backbone("mine", "DEFAULT", random_state=5)

    path = _saved(tmp_path, _resnet10())
    stored = torch.load(path, weights_only=True)
    assert torch.equal(
        load_backbone("mine", path).network.fc.weight, stored["fc.weight"]
    )
    with pytest.raises(ValueError, match=r"net\.pth' for the backbone 'mine' have"):
        load_backbone("mine", _saved(tmp_path, _resnet10(num_classes=3)))


def test_a_network_is_described_once_to_load_it_and_once_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = registered.torchvision.describe_network
    described: list[nn.Module] = []

    def count(network: nn.Module) -> NetworkStructure:
        described.append(network)
        return describe(network)

    monkeypatch.setattr(registered.torchvision, "describe_network", count)
    register_backbone(
        "mine", _resnet10, preprocessing=_SMALL, categories=list("abcdefghij")
    )
    backbone = load_backbone("mine", _saved(tmp_path, _resnet10()))
    assert "stage4" in backbone.stages
    assert (backbone.n_outputs, backbone.penultimate) == (10, "fc")
    assert len(described) == 2


def test_registering_again_replaces() -> None:
    register_backbone("mine", lambda: _resnet10(3), preprocessing=_SMALL)
    first = load_backbone("mine")
    register_backbone("mine", lambda: _resnet10(4), preprocessing=_SMALL)
    second = load_backbone("mine")
    assert (first.last_linear.out_features, second.last_linear.out_features) == (3, 4)


def test_the_digest_of_a_registered_network_depends_on_its_architecture() -> None:
    digests = set()
    for stride in (1, 2):
        build = lambda s=stride: nn.Sequential(nn.Conv2d(3, 4, 3, stride=s))  # noqa: E731
        register_backbone("mine", build, preprocessing=_SMALL)
        digests.add(load_backbone("mine").digest)
    assert len(digests) == 2


def _old_digest(backbone: Backbone, layout: str) -> str:
    """Return the digest of a registered network in older caches."""
    weights = state_dict_digest(backbone.network.state_dict())
    content = f"{backbone.network} {backbone.preprocessing} {weights}{layout}"
    return hashlib.sha256(content.encode()).hexdigest()


@pytest.mark.parametrize(
    ("build", "layout"),
    [(lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), " None 1"), (_resnet10, "")],
)
def test_digests_of_networks_with_the_same_rows_are_unchanged(
    build: Callable[[], nn.Module], layout: str
) -> None:
    register_backbone("mine", build, preprocessing=_SMALL)
    backbone = load_backbone("mine")
    assert backbone.digest == _old_digest(backbone, layout)


def test_digests_of_networks_with_other_rows_have_changed() -> None:
    # Prefix tokens were averaged with the patches.
    def vit() -> nn.Module:
        return models.VisionTransformer(32, 16, 1, 1, 8, 8, num_classes=2)

    register_backbone("mine", vit, preprocessing=_SMALL)
    backbone = load_backbone("mine")
    assert backbone.digest != _old_digest(backbone, "")
    timm = pytest.importorskip("timm")
    build = lambda: timm.create_model("test_vit", dynamic_img_size=True)  # noqa: E731
    register_backbone("mine", build, preprocessing=_SMALL)
    backbone = load_backbone("mine")
    assert backbone.digest != _old_digest(backbone, " None 1")


def test_a_network_without_stages_or_linear_layer() -> None:
    register_backbone(
        "mine", lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), preprocessing=_SMALL
    )
    backbone = load_backbone("mine")
    with pytest.raises(ValueError, match=r"'mine' has no stages: a Sequential is not"):
        _ = backbone.stages
    with pytest.raises(ValueError, match=r"The backbone 'mine' has no linear layer"):
        _ = backbone.penultimate


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("resnet-18", None, ValueError, "Do you mean .*resnet18"),
        ("fcn_resnet50", None, ValueError, "There is no backbone 'fcn_resnet50'"),
        ("resnet50", "V3", ValueError, "IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        ("resnet50", 3, TypeError, "must be a str, a path or None. Got 3"),
        ("resnet50", "no/such.pth", FileNotFoundError, "There is no weights file"),
        ("resnet50", "no/such", FileNotFoundError, "There is no weights file"),
    ],
)
def test_unknown_names_raise(
    name: str, weights: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_backbone(name, weights)  # type: ignore[arg-type]


def test_weights_of_another_network_raise(tmp_path: Path) -> None:
    path = _saved(tmp_path, models.squeezenet1_0())
    with pytest.raises(ValueError, match="'squeezenet1_1' have other") as caught:
        _ = load_backbone("squeezenet1_1", path).network
    assert len(str(caught.value)) < 1000


def _headless(network: nn.Module, last: str) -> dict[str, Tensor]:
    state = network.state_dict()
    return {name: v for name, v in state.items() if not name.startswith(last)}


@pytest.mark.slow
def test_weights_without_a_head_are_those_of_all_other_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_backbone(
        "mine", _resnet10, preprocessing=_SMALL, categories=list("abcdefghij")
    )
    source = _resnet10().eval()
    wrapped = {f"module.{n}": v for n, v in _headless(source, "fc.").items()}
    path = tmp_path / "moco.pth.tar"
    torch.save({"state_dict": wrapped, "epoch": 3}, path)

    backbone = load_backbone("mine", path)

    assert capsys.readouterr().out == ""
    load_backbone("mine", path, progress=True)
    out = capsys.readouterr().out
    assert "the prefix 'module.'; the head is missing (fc.bias, fc.weight)." in out
    load_backbone("mine", path, progress=True)
    assert capsys.readouterr().out == ""
    assert backbone.missing_head == ("fc.bias", "fc.weight")
    assert backbone.categories is None
    assert load_backbone("mine").categories == tuple("abcdefghij")
    full = load_backbone("mine", _saved(tmp_path, source, "full.pth"))
    copied = copy.deepcopy(backbone)
    assert copied.missing_head == backbone.missing_head
    x = _noise()
    for layer in ("penultimate", "stage2", "layer4.0.conv2", "avgpool"):
        got = [
            FeatureExtractor(each, [layer], "avg")(x)
            for each in (backbone, copied, full)
        ]
        assert torch.equal(got[0], got[2]), layer
        assert torch.equal(got[1], got[2]), layer
    with pytest.raises(ValueError, match=r"'fc' requires fc\.bias, which is missing"):
        FeatureExtractor(backbone, ["fc"], "avg")(x)
    size = backbone.preprocessing
    with pytest.raises(ValueError, match=r"'fc' requires fc\.bias"):
        layer_widths(backbone, ["penultimate", "fc"], "avg", size)


@pytest.mark.parametrize(
    ("name", "missing", "refused"),
    [
        ("squeezenet1_1", "classifier.", False),
        pytest.param(
            "mobilenet_v3_small", "classifier.3", False, marks=pytest.mark.slow
        ),
        pytest.param("mobilenet_v3_small", "classifier.", True, marks=pytest.mark.slow),
    ],
)
def test_layers_above_missing_weights_raise(
    name: str, missing: str, refused: bool, tmp_path: Path
) -> None:
    source = models.get_model(name).eval()
    torch.save(_headless(source, missing), tmp_path / "net.bin")
    headless = load_backbone(name, tmp_path / "net.bin")
    full = load_backbone(name, _saved(tmp_path, source))
    assert headless.categories is None
    assert len(full.categories or ()) == 1000
    extract = [FeatureExtractor(b, ["penultimate"], "avg") for b in (headless, full)]
    if refused:
        with pytest.raises(ValueError, match=r"'penultimate' requires classifier\.0"):
            extract[0](_noise())
        with pytest.raises(ValueError, match=r"have no classifier\.0\.bias"):
            replace_head(headless, 3)
    else:
        assert torch.equal(extract[0](_noise()), extract[1](_noise()))
        heads = [replace_head(each, 3).eval() for each in (headless, full)]
        heads[1][-1].load_state_dict(heads[0][-1].state_dict())
        assert torch.equal(heads[0](_noise()), heads[1](_noise()))


def test_weights_without_more_than_the_head_raise(tmp_path: Path) -> None:
    register_backbone("mine", _resnet10, preprocessing=_SMALL)
    torch.save(_headless(_resnet10(), "layer4."), tmp_path / "net.pth")
    match = r"15 missing \(layer4.0.conv1.weight, .*, \.\.\.\)\. Check"
    with pytest.raises(ValueError, match=match):
        load_backbone("mine", tmp_path / "net.pth")


def test_a_specification_is_valid_in_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saved(tmp_path, _resnet10(), "mine.pth")
    register_backbone("mine", _resnet10, preprocessing=Preprocessing(32, 32))
    monkeypatch.chdir(tmp_path)
    backbone = load_backbone("mine", "mine.pth")
    reference = BackboneSpec.to(backbone, "mine.pth")
    monkeypatch.chdir(tmp_path.parent)
    assert pickle.loads(pickle.dumps(reference)).load() is backbone
    assert BackboneSpec.to(load_backbone("resnet_mini"), "DEFAULT").weights == "DEFAULT"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        BackboneSpec.to(load_backbone("mine", "~/mine.pth"), "~/mine.pth") == reference
    )
    random = load_backbone("resnet18", None, random_state=3)
    assert BackboneSpec.to(random, None, 3).load() is random


def _resnet3() -> models.ResNet:
    return _resnet10(3)


def test_a_specification_has_the_registration_of_its_backbone() -> None:
    register_backbone("mine", _resnet10, preprocessing=_SMALL)
    backbone = load_backbone("mine")
    spec = BackboneSpec.to(backbone, "DEFAULT")
    register_backbone("mine", _resnet3, preprocessing=_SMALL)
    assert copy.deepcopy([spec])[0] is spec
    pickled = pickle.dumps(spec)
    registered.registrations.clear()
    loaded = pickle.loads(pickled)
    assert loaded == spec
    assert registered.registrations["mine"].reference.endswith(":_resnet10")
    assert loaded.load().digest == backbone.digest


def test_a_specification_raises_without_its_weights(tmp_path: Path) -> None:
    file = _saved(tmp_path, _resnet10())
    register_backbone("mine", _resnet10, preprocessing=Preprocessing(32, 32))
    reference = BackboneSpec.to(load_backbone("mine", file), file)
    _saved(tmp_path, _resnet10())
    with pytest.raises(
        ValueError, match=rf"must have the digest {reference.digest[:12]} on"
    ):
        reference.load()
    file.unlink()
    name = re.escape(socket.gethostname())
    with pytest.raises(
        FileNotFoundError, match=rf"net.*must be on the machine '{name}'"
    ):
        reference.load()


def test_weights_are_read_when_the_network_is_accessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models.squeezenet1_1(num_classes=7)
    _saved(tmp_path, source, "squeezenet.pth")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "load_weights", None)
        backbone = load_backbone("squeezenet1_1", "squeezenet.pth")
        assert backbone is load_backbone("squeezenet1_1", "squeezenet.pth")
        assert backbone.preprocessing_at(64) == Preprocessing(64, 64)
        assert len(backbone.digest) == 64
        assert not backbone.is_loaded
    monkeypatch.chdir(tmp_path.parent)
    got = backbone.last_linear.weight
    assert torch.equal(got, source.classifier[1].weight)
    assert backbone.categories is None
    assert backbone.is_loaded


def test_weights_that_change_before_they_are_read_raise(tmp_path: Path) -> None:
    path = _saved(tmp_path, models.squeezenet1_1())
    backbone = load_backbone("squeezenet1_1", path)
    _saved(tmp_path, models.squeezenet1_1())
    for _ in range(2):
        with pytest.raises(ValueError, match="must not change while they are read"):
            _ = backbone.network
    assert load_backbone("squeezenet1_1", path).network is not None


def test_an_equal_file_replaces_one_that_was_not_read(tmp_path: Path) -> None:
    first = _saved(tmp_path, models.squeezenet1_1())
    load_backbone("squeezenet1_1", first)
    second = first.rename(tmp_path / "moved.pth")
    backbone = load_backbone("squeezenet1_1", second)
    assert backbone.network is not None
    second.rename(first)
    assert load_backbone("squeezenet1_1", first) is backbone


def test_a_slow_builder_does_not_delay_files_and_cached_backbones() -> None:
    cached = load_backbone("squeezenet1_1", None)
    started, finish = threading.Event(), threading.Event()

    def build_slowly() -> nn.Module:
        started.set()
        assert finish.wait(30)
        return _resnet10()

    register_backbone("slow", build_slowly, preprocessing=_SMALL)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(load_backbone, "slow")
        assert started.wait(30)
        other = pool.submit(lambda: load_backbone("resnet_mini").network)
        assert other.result(30) is not None
        assert load_backbone("squeezenet1_1", None) is cached
        assert not slow.done()
        finish.set()
        assert slow.result(30).network is not None


def test_builders_that_load_other_backbones_do_not_deadlock() -> None:
    together = threading.Barrier(2, timeout=30)

    def build(other: str) -> nn.Module:
        if other:
            load_backbone(other)
        return _small()

    def load(name: str) -> Backbone:
        together.wait()
        return load_backbone(name)

    for seed in range(5):
        registry.backbones.clear()
        register_backbone("a", lambda: build("b"), preprocessing=_SMALL)
        register_backbone("b", lambda: build(""), preprocessing=_SMALL)
        with ThreadPoolExecutor(2) as pool:
            loaded = list(pool.map(load, "ab", timeout=60))
        assert loaded[1] is load_backbone("b"), seed
