"""Tests of sktl._backbones.timm."""

import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hub_server import COMMIT, HubServer, serving
from PIL import Image
from shared_fixtures import FIXED
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchvision import models

from sktl import FineTunedCNNClassifier, PretrainedClassifier, PretrainedFeatures
from sktl._backbones import registry
from sktl._backbones import timm as source
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._utils.keyed_cache import KeyedCache

timm = pytest.importorskip("timm")
constants = pytest.importorskip("huggingface_hub").constants

# Torch warns inside of timm, where positions are resampled.
pytestmark = pytest.mark.filterwarnings("ignore:.*searchsorted", "ignore:Using a non-t")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "backbones", KeyedCache(max_size=4))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Serve files of weights, to an empty cache."""
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def _noise(side: int = 160) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def _saved(folder: Path, state_dict: dict[str, Tensor]) -> Path:
    torch.save(state_dict, folder / "net.pth")
    return folder / "net.pth"


def _created(name: str, **options: object) -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model(name, **options).eval()


def _loaded_by_timm(name: str, path: Path, **options: object) -> nn.Module:
    overlay = {"file": str(path)}
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **options
    ).eval()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_networks_are_those_of_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = timm.create_model(name).eval()
    path = _saved(tmp_path, expected.state_dict())
    torch.manual_seed(4)
    before = torch.get_rng_state()
    for weights in (path, None):
        backbone = load_backbone(f"timm/{name}", weights, random_state=3)
        with torch.inference_mode():
            assert torch.equal(backbone.network(_noise()), expected(_noise()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/test_vitt", r"no backbone 'timm/test_vitt' .* mean timm/test_vit"),
        ("timm/test_vit.a1", r"no weights 'a1' for 'timm/test_vit'.* tags r160_in1k\."),
        ("timm/test_vit@", "revision must follow"),
        ("timm/tv_resnet50", r"mean timm/resnet50\.tv_in1k\?"),
        ("timm/efficientnet_b6", "has no pretrained weights .* Set weights=None"),
    ],
)
def test_invalid_names_raise(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(name)
    assert len(str(caught.value)) < 400


def test_a_tag_belongs_to_the_name() -> None:
    match = r"weights='r160_in1k'. Set backbone='timm/test_vit\.r160_in1k'"
    with pytest.raises(ValueError, match=match):
        load_backbone("timm/test_vit", "r160_in1k")
    with pytest.raises(ValueError, match="has the weights DEFAULT; a path ends"):
        load_backbone("timm/test_vit", "V1")


def test_without_timm_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'sktl\[timm\]'"):
        load_backbone("timm/test_vit2")


def test_weights_of_another_network_raise(tmp_path: Path) -> None:
    path = _saved(tmp_path, nn.Linear(3, 2).state_dict())
    for name in ("timm/test_vit", "timm/test_resnet"):
        with pytest.raises(ValueError, match=f"{name}' have other tensors: .* missing"):
            _ = load_backbone(name, path).network


@pytest.mark.parametrize(
    "name", ["test_vit", pytest.param("test_efficientnet", marks=pytest.mark.slow)]
)
def test_weights_come_from_the_hub(hub: HubServer, name: str) -> None:
    expected = _created(name)
    content = safetensors.torch.save(expected.state_dict())
    hub.files[f"timm/{name}.r160_in1k", "model.safetensors"] = content

    backbone = load_backbone(f"timm/{name}")

    assert backbone.categories is not None
    with torch.inference_mode():
        assert torch.equal(backbone.network(_noise()), expected(_noise()))
    n_requests = len(hub.requests)
    by_tag = load_backbone(f"timm/{name}.r160_in1k")
    assert by_tag.digest == backbone.digest
    pinned = load_backbone(f"timm/{name}@{COMMIT}")
    assert pinned.digest == backbone.digest
    assert len(hub.requests) == n_requests == 2


def test_a_specification_of_the_hub_is_loaded_in_other_processes(
    hub: HubServer,
) -> None:
    content = safetensors.torch.save(_created("test_vit2").state_dict())
    hub.files["timm/test_vit2.r160_in1k", "model.safetensors"] = content
    backbone = load_backbone("timm/test_vit2")
    spec = pickle.loads(pickle.dumps(BackboneSpec.to(backbone, "DEFAULT")))
    assert spec.load() is backbone


def test_rows_equal_those_of_timms_transform_and_network(tmp_path: Path) -> None:
    expected = _created("test_vit3")
    path = _saved(tmp_path, expected.state_dict())
    config = timm.data.resolve_model_data_config(expected)
    transform = timm.data.create_transform(**config, is_training=False)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 200, 260, 3), np.uint8)
    x = torch.stack([transform(Image.fromarray(each)) for each in pixels])
    with torch.inference_mode():
        x = expected.forward_features(x)
        features = expected.forward_head(x, pre_logits=True).numpy()
    mine = PretrainedFeatures("timm/test_vit3", weights=path, engine="torch")
    rows = mine.transform(pixels)
    np.testing.assert_allclose(rows, features, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_positions_are_resampled_as_timm_does(tmp_path: Path) -> None:
    path = _saved(tmp_path, _created("test_vit").state_dict())
    expected = _loaded_by_timm("test_vit", path, img_size=96)
    backbone = load_backbone("timm/test_vit", path)
    assert backbone.preprocessing_at(96).crop_size == 96
    for side, nearest in [(90, "80 or 96"), (10, "16")]:
        with pytest.raises(ValueError, match=rf"multiple of 16 .* {nearest}\."):
            backbone.preprocessing_at(side)
    with torch.inference_mode():
        torch.testing.assert_close(backbone.network(_noise(96)), expected(_noise(96)))
    # A file with the positions of another size.
    half = _created("test_vit", img_size=96).half()
    path = _saved(tmp_path, half.float().state_dict())
    expected = _loaded_by_timm("test_vit", path)
    path = _saved(tmp_path, half.half().state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(
            load_backbone("timm/test_vit", path).network(_noise()), expected(_noise())
        )


@pytest.mark.slow
def test_networks_of_one_size_refuse_others() -> None:
    backbone = load_backbone("timm/levit_128s", None)
    side = backbone.preprocessing.crop_size
    with pytest.raises(ValueError, match=rf"supports only images of {side} pixels"):
        backbone.preprocessing_at(96)
    assert load_backbone("timm/test_resnet", None).preprocessing_at(90).crop_size == 90


@pytest.mark.slow
def test_names_of_other_files_are_converted_as_timm_does(tmp_path: Path) -> None:
    # torchvision's names of a network of which timm has the same.
    torch.manual_seed(0)
    old = models.regnet_y_400mf().eval()
    path = _saved(tmp_path, old.state_dict())
    backbone = load_backbone("timm/regnety_004.tv2_in1k", path)
    expected = _loaded_by_timm("regnety_004.tv2_in1k", path)
    with torch.inference_mode():
        got = backbone.network(_noise(64))
        torch.testing.assert_close(got, expected(_noise(64)))
        torch.testing.assert_close(got, old(_noise(64)))
    # The function of timm is in its place again.
    assert timm.models.build_model_with_cfg.__globals__["load_pretrained"] is (
        timm.models.load_pretrained
    )


@pytest.mark.slow
def test_no_parameter_stays_random(tmp_path: Path) -> None:
    # timm loads this network although names are missing.
    torch.manual_seed(0)
    state = timm.create_model("dla46x_c").state_dict()
    name = next(name for name in state if name.startswith("level3.tree1"))
    del state[name]
    path = _saved(tmp_path, state)
    _loaded_by_timm("dla46x_c", path)
    with pytest.raises(ValueError, match=re.escape(f"1 missing ({name})")):
        _ = load_backbone("timm/dla46x_c", path).network


@pytest.mark.parametrize("n_outputs", [7, None])
def test_the_head_is_that_of_the_file(tmp_path: Path, n_outputs: int | None) -> None:
    tuned = _created("test_efficientnet", num_classes=n_outputs or 1000)
    state = tuned.state_dict()
    if n_outputs is None:
        state = {n: v for n, v in state.items() if not n.startswith("classifier")}
    backbone = load_backbone("timm/test_efficientnet", _saved(tmp_path, state))
    assert backbone.categories is None
    if n_outputs is None:
        assert backbone.missing_head == ("classifier.bias", "classifier.weight")
    else:
        with torch.inference_mode():
            assert torch.equal(backbone.network(_noise()), tuned(_noise()))


@pytest.mark.slow
def test_constants_that_are_not_saved_are_computed(tmp_path: Path) -> None:
    expected = _created("test_vit4")  # with rotary positions
    backbone = load_backbone("timm/test_vit4", _saved(tmp_path, expected.state_dict()))
    with torch.inference_mode():
        assert torch.equal(backbone.network(_noise()), expected(_noise()))


def test_categories_are_those_of_timm() -> None:
    one = source.resolve("timm/test_resnet", "DEFAULT", False, fetch=False)
    assert one.categories == tuple(models.ResNet18_Weights.DEFAULT.meta["categories"])
    assert one.known_weights == ("DEFAULT",)
    large = source.resolve(
        "timm/convnext_tiny.fb_in22k", "DEFAULT", False, fetch=False
    ).categories
    info = timm.data.ImageNetInfo("imagenet-22k")
    assert large is not None
    assert len(large) == info.num_classes() == 21841
    for index in (0, 1000, 21840):
        assert info.index_to_description(index).startswith(large[index])
    headless = source.resolve("timm/vit_small_patch14_dinov2", None, False)
    assert headless.categories is None


@pytest.mark.slow
def test_categories_are_predicted(tmp_path: Path) -> None:
    network = _created("test_resnet")
    path = _saved(tmp_path, network.state_dict())
    X = np.random.default_rng(0).integers(0, 256, (2, 170, 170, 3), np.uint8)
    classifier = PretrainedClassifier("timm/test_resnet", weights=path).fit(X)
    config = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**config, is_training=False)
    x = torch.stack([transform(Image.fromarray(each)) for each in X])
    with torch.inference_mode():
        indices = network(x).argmax(1)
    names = models.ResNet18_Weights.DEFAULT.meta["categories"]
    assert list(classifier.predict(X)) == [names[i] for i in indices]


def test_tags_differ_in_preprocessing() -> None:
    sides = [
        source.resolve(name, None, False).preprocessing.crop_size
        for name in ("timm/resnet50.a1_in1k", "timm/convnext_base.fb_in22k_ft_in1k_384")
    ]
    assert sides == [224, 384]


def test_only_the_weights_of_the_tag_have_its_license() -> None:
    expected = timm.get_pretrained_cfg("test_vit").license
    assert expected is not None
    for weights, license_ in [("DEFAULT", expected), ("own.pth", None), (None, None)]:
        definition = source.resolve("timm/test_vit", weights, False, fetch=False)
        assert definition.license == license_


@pytest.mark.slow
def test_a_grid_search_uses_workers(tmp_path: Path) -> None:
    path = _saved(tmp_path, _created("test_resnet").state_dict())
    X = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    y = [0, 1] * 4
    model = make_pipeline(
        PretrainedFeatures("timm/test_resnet", weights=path, image_size=32),
        LogisticRegression(),
    )
    grid = {"logisticregression__C": [0.1, 1.0]}
    search = GridSearchCV(model, grid, cv=2, n_jobs=2, error_score="raise")
    assert search.fit(X, y).predict(X).shape == (8,)


@pytest.mark.slow
def test_the_weights_of_a_published_network(test_data: Path) -> None:
    path = test_data / "weights" / "tf_efficientnet_lite0-imagenet.pth"
    expected = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    state = torch.load(path, weights_only=True)
    state = {n: v for n, v in state.items() if not n.startswith("classifier")}
    expected.load_state_dict(state)
    config = timm.data.resolve_model_data_config(expected)
    transform = timm.data.create_transform(**config, is_training=False)
    photos = sorted((test_data / "hymenoptera" / "val").rglob("*.jpg"))[:4]
    x = torch.stack([transform(Image.open(each).convert("RGB")) for each in photos])
    with torch.inference_mode():
        features = expected.eval()(x).numpy()
    rows = PretrainedFeatures("timm/tf_efficientnet_lite0", weights=path).transform(
        list(map(str, photos))
    )
    np.testing.assert_allclose(rows, features, rtol=1e-4, atol=1e-4)


def _ants_and_bees(test_data: Path, part: str) -> tuple[list[str], list[str]]:
    photos = sorted((test_data / "hymenoptera" / part).rglob("*.jpg"))
    return list(map(str, photos)), [photo.parent.name for photo in photos]


@pytest.fixture
def lite0(test_data: Path) -> dict[str, object]:
    path = test_data / "weights" / "tf_efficientnet_lite0-imagenet.pth"
    return {"backbone": "timm/tf_efficientnet_lite0", "weights": path}


@pytest.mark.slow
def test_features_of_a_published_network_separate_classes(
    test_data: Path, lite0: dict[str, object]
) -> None:
    features = PretrainedFeatures(**lite0)
    (X, y), (X_val, y_val) = (_ants_and_bees(test_data, p) for p in ("train", "val"))
    model = make_pipeline(features, StandardScaler(), LogisticRegression(C=0.1))
    assert model.fit(X, y).score(X_val, y_val) >= 0.94
    rows = clone(features).set_params(engine="openvino").fit_transform(X_val[::20])
    np.testing.assert_allclose(
        rows, features.fit_transform(X_val[::20]), rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
def test_predictions_of_a_published_network(
    test_data: Path, lite0: dict[str, object]
) -> None:
    X, y = _ants_and_bees(test_data, "val")
    ants = [path for path, label in zip(X, y, strict=True) if label == "ants"][:24]
    named = list(PretrainedClassifier(**lite0).fit(ants).predict(ants))
    assert named.count("ant") >= 16


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [1, "all"])
def test_a_published_network_is_fine_tuned(
    test_data: Path, lite0: dict[str, object], trainable: object
) -> None:
    X, y = (each[::4] for each in _ants_and_bees(test_data, "train"))
    options = {**FIXED, "image_size": 96, "max_epochs": 2, "random_state": 0}
    classifier = FineTunedCNNClassifier(**lite0, trainable=trainable, **options)
    X_val, y_val = (each[::2] for each in _ants_and_bees(test_data, "val"))
    assert classifier.fit(X, y).score(X_val, y_val) > 0.75
    before = load_backbone(lite0["backbone"], lite0["weights"]).stages
    unchanged = [
        all(map(torch.equal, old.parameters(), new.parameters()))
        for old, new in zip(before.values(), classifier.module_, strict=False)
    ]
    assert unchanged == [trainable == 1] * 4 + [False]


def _dinov2(test_data: Path) -> tuple[str, Path, nn.Module]:
    """Return name, weights file and network of a transformer of 224 pixels."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    (path,) = (test_data / "weights").glob("vit_small_patch14_dinov2*.pth")
    name = "vit_small_patch14_dinov2"
    network = timm.create_model(name, img_size=224, num_classes=0).eval()
    state = torch.load(path, weights_only=True)
    state = {key: value.float() for key, value in state.items()}
    network.load_state_dict(checkpoint_filter_fn(state, network))
    return name, path, network


@pytest.mark.slow
def test_a_transformer_in_half_precision_without_a_head(test_data: Path) -> None:
    name, path, expected = _dinov2(test_data)
    backbone = load_backbone(f"timm/{name}", path)
    assert backbone.preprocessing_at(224).crop_size == 224
    with torch.inference_mode():
        got, features = backbone.network(_noise(224)), expected(_noise(224))
    torch.testing.assert_close(got, features, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_pooled_tokens_of_a_published_transformer(test_data: Path, engine: str) -> None:
    name, path, network = _dinov2(test_data)
    config = timm.data.resolve_model_data_config(network)
    config["input_size"] = (3, 224, 224)
    transform = timm.data.create_transform(**config, is_training=False)
    photos = sorted((test_data / "hymenoptera" / "val").rglob("*.jpg"))[::60]
    x = torch.stack([transform(Image.open(each).convert("RGB")) for each in photos])
    assert x.shape == (3, 3, 224, 224)
    with torch.inference_mode():
        tokens = network.forward_features(x)  # (n, 1 + 16 * 16, 384)
    expected = {"cls": tokens[:, 0], "avg": tokens[:, 1:].mean(1)}
    cases = [("stage4", "avg"), ("penultimate", "cls"), ("stage4", "cls")]
    # OpenVINO converts the network in each case, and has no layers of its own.
    for layer, pooling in cases[:2] if engine == "openvino" else cases:
        rows = PretrainedFeatures(
            f"timm/{name}",
            weights=path,
            image_size=224,
            layer=layer,
            pooling=pooling,
            engine=engine,
        ).transform([str(photo) for photo in photos])
        np.testing.assert_allclose(rows, expected[pooling], rtol=1e-4, atol=1e-4)


def test_embeddings_are_distinguished_from_categories() -> None:
    found, expected = set(), set()
    for name in timm.list_models(pretrained=True):
        n_outputs = timm.get_pretrained_cfg(name).num_classes
        # Embeddings have widths such as 512; a number of categories is no multiple.
        if n_outputs and n_outputs % 128 == 0:
            expected.add(name)
        if n_outputs and source.has_embeddings(name):
            found.add(name)
    assert found == expected
