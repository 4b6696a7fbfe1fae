"""Saved files as weights, compared with the estimators that saved them."""

import copy
import shutil
from dataclasses import replace

import joblib
import numpy as np
import pytest
import torch
from reference import normalized
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from shared_fixtures import FIXED, TinyNet
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from torch import nn
from torchvision import models

from sktl import (
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedClassifier,
    PretrainedFeatures,
    describe_backbone,
    register_backbone,
)
from sktl._backbones import registered, registry, saved_network, timm_structure
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._backbones.saved_network import DEFAULT_BACKBONE, find_saved_network
from sktl._utils.keyed_cache import KeyedCache
from sktl._utils.tensor_file import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

LABELS = np.array(["wasp", "ant", "bee"])
AFFINE = ("weight", "bias")


def fit(images, backbone="five stages", labels=LABELS, **parameters):
    options = {**FIXED, "max_epochs": 1, "lr": 0.05, "random_state": 0}
    options |= {"engine": "torch", **parameters}
    y = np.asarray(labels)[np.arange(len(images)) % len(labels)]
    return FineTunedCNNClassifier(backbone, **options).fit(images, y)


@pytest.fixture(scope="module")
def tuned(images):
    options = {"image_size": 40, "resize": "squash", "label_smoothing": 0.1}
    return fit(images, hidden_layer_sizes=(8, 6), dropout=0.3, **options)


@pytest.fixture
def file(tuned, tmp_path):
    tuned.save(tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors"


def test_penultimate_features_and_last_layer_give_the_logits(tuned, file, images):
    features = PretrainedFeatures(weights=file).fit_transform(images)
    last = tuned.module_.head[-1]
    with torch.inference_mode():
        logits = last(torch.from_numpy(features))
    assert features.shape == (40, 6)
    np.testing.assert_allclose(logits, tuned.decision_function(images), atol=1e-5)


def test_stages_are_the_fine_tuned_ones(tuned, file, images):
    x = normalized(images, tuned.preprocessing_)
    for n_stages, layer in ((1, "stem"), (4, "stage3"), (5, "stage4")):
        with torch.inference_mode():
            expected = tuned.module_[:n_stages](x).flatten(1)
        mine = PretrainedFeatures(weights=file, layer=layer, pooling="flatten")
        mine.set_params(engine="torch")
        np.testing.assert_allclose(mine.transform(images), expected, atol=1e-5)
    names = PretrainedFeatures(weights=file).fit(images).get_feature_names_out()
    assert names[0] == "five stages_penultimate_0"


@pytest.mark.parametrize("layer", ["stage3.0", "head.0"])
def test_modules_have_the_names_of_the_fitted_network(tuned, file, images, layer):
    rows = []
    module = tuned.module_.get_submodule(layer)
    hook = module.register_forward_hook(lambda *each: rows.append(each[-1]))
    with torch.inference_mode():
        tuned.module_(normalized(images, tuned.preprocessing_))
    hook.remove()
    mine = PretrainedFeatures(weights=file, layer=layer, pooling="flatten")
    mine.set_params(engine="torch")
    np.testing.assert_allclose(
        mine.transform(images), rows[0].flatten(1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        [10, 9, 2],
        *(
            pytest.param(labels, marks=pytest.mark.slow)
            for labels in ([2.0, -1.0], [False, True], [10, 9, 100])
        ),
    ],
)
def test_classifier_predicts_the_labels_of_the_fine_tuning(images, tmp_path, labels):
    file = tmp_path / "tuned.safetensors"
    estimator = fit(images, labels=labels)
    estimator.save(file)
    mine = PretrainedClassifier(weights=str(file), engine="torch").fit(images)
    loaded = FineTunedCNNClassifier.load(file)
    np.testing.assert_array_equal(mine.classes_, loaded.classes_)
    assert mine.classes_.dtype == loaded.classes_.dtype
    proba = mine.predict_proba(images)
    np.testing.assert_allclose(proba, loaded.predict_proba(images), atol=1e-5)
    np.testing.assert_array_equal(mine.predict(images), loaded.predict(images))
    label_map = {label: str(label) for label in labels[:2]}
    mapped = PretrainedClassifier(weights=file, label_map=label_map, engine="torch")
    mapped.fit(images)
    assert set(mapped.classes_) == {str(label) for label in labels[:2]}


def test_another_fine_tuning_starts_from_the_saved_network(tuned, file, images):
    second = fit(images, "resnet18", [0, 1], weights=file, max_epochs=0)
    assert second.preprocessing_ == tuned.preprocessing_
    x = normalized(images, tuned.preprocessing_)
    with torch.inference_mode():
        expected = tuned.module_[:-1](x)
        for layer in tuned.module_.head[:-1]:
            expected = layer(expected)
        np.testing.assert_allclose(second.module_[:-1](x), expected, atol=1e-5)
    trained = fit(images, "five stages", [0, 1], weights=file, trainable=2)
    before, after = tuned.module_.state_dict(), trained.module_.state_dict()
    frozen = [name for name in before if name.startswith(("stem", "stage1", "stage2"))]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["stage4.0.weight"], after["stage4.0.weight"])


@pytest.mark.slow
def test_a_chain_of_fine_tunings_is_saved_and_loaded(tuned, file, images):
    first = load_file(file)
    for n_classes, hidden in ((2, 5), (3, ())):
        options = {"hidden_layer_sizes": hidden, "dropout": 0.1, "trainable": 1}
        estimator = fit(images, "resnet18", range(n_classes), weights=file, **options)
        file = file.with_name(f"{n_classes} classes")  # without a suffix
        estimator.save(file)
    # The last layer of each head is replaced by the next head.
    names = {name for name in first if not name.startswith("heads.0.7.")}
    names |= {f"heads.{head}.{name}" for head in ("1.1", "2.1") for name in AFFINE}
    assert load_file(file).keys() == names
    expected = estimator.predict_proba(images)
    loaded = FineTunedCNNClassifier.load(file)
    np.testing.assert_array_equal(loaded.predict_proba(images), expected)
    kinds = [type(layer).__name__ for layer in loaded.module_.neck]
    assert kinds.count("Linear") == 3  # of widths 8, 6 and 5
    assert loaded.backbone == "resnet18"
    mine = PretrainedClassifier(weights=file, engine="torch").fit(images)
    np.testing.assert_allclose(mine.predict_proba(images), expected, atol=1e-5)
    loaded.partial_fit(images, np.arange(40) % 3)


@pytest.mark.parametrize("estimator", [PretrainedFeatures, PretrainedClassifier])
def test_another_backbone_raises(file, images, estimator):
    mine = estimator("resnet50", weights=file)
    with pytest.raises(
        ValueError, match=r"from the backbone 'five stages'.*'resnet50'"
    ):
        mine.fit(images)
    assert estimator().backbone == DEFAULT_BACKBONE == FineTunedCNNClassifier().backbone


def test_settings_of_the_file_can_be_overridden(tuned, file, images):
    mine = PretrainedFeatures(weights=file, image_size=48, resize="pad")
    mine.set_params(engine="torch")
    backbone = load_backbone("five stages", file)
    x = normalized(images, backbone.preprocessing_at(48, "pad"))
    with torch.inference_mode():
        expected = tuned.module_.head[:-1](tuned.module_[:-1](x))
    np.testing.assert_allclose(mine.transform(images), expected, atol=1e-5)


@pytest.mark.slow
def test_in_a_search_with_cache_and_pickles(images, paths, tmp_path):
    file = tmp_path / "tuned.safetensors"
    fit(images, "resnet_mini", trainable="head", max_epochs=0).save(file)
    features = PretrainedFeatures(weights=file, memory=tmp_path / "cache")
    features.set_params(engine="torch", image_size=32)
    model = make_pipeline(features, LogisticRegression())
    grid = {"pretrainedfeatures__layer": ["penultimate", "stage2"]}
    y = np.arange(40) % 2
    search = GridSearchCV(model, grid, cv=2, n_jobs=2, error_score="raise")
    search.fit(paths, y)
    joblib.dump(search.best_estimator_, tmp_path / "model.joblib")
    again = joblib.load(tmp_path / "model.joblib")
    np.testing.assert_array_equal(again.predict(paths), search.predict(paths))


def test_cached_rows_are_those_of_one_file(file, images, tmp_path):
    features = PretrainedFeatures(weights=file, engine="torch")
    features.set_params(memory=tmp_path / "cache")
    first = features.fit_transform(images)
    tensors, document = read_tensors(file)
    tensors["heads.0.1.bias"] += 1
    write_tensors(file, tensors, document)
    with pytest.raises(ValueError, match=r"seen in fit.* Call fit again"):
        features.transform(images)
    second = features.fit_transform(images)
    assert np.abs(first - second).max() > 0.01
    exact = PretrainedFeatures(weights=file, engine="torch").fit_transform(images)
    np.testing.assert_array_equal(second, exact)


def test_openvino_and_torch_agree(file, images):
    rows = [
        PretrainedFeatures(weights=file, engine=engine).fit_transform(images)
        for engine in ("torch", "openvino")
    ]
    np.testing.assert_allclose(*rows, rtol=1e-3, atol=1e-4)


def test_specification_loads_the_same_network(file):
    backbone = load_backbone(DEFAULT_BACKBONE, str(file))
    spec = BackboneSpec.to(backbone, file)
    assert spec.name == "five stages"
    assert spec.load() is backbone
    other = shutil.copy(file, file.with_name("copy.safetensors"))
    assert load_backbone("five stages", other) is backbone


def test_damaged_file(file, images):
    whole = file.read_bytes()
    features = PretrainedFeatures("five stages", weights=file)
    for position in range(4, len(whole), len(whole) // 12):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        for content in (damaged, whole[:position]):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"tuned\.safetensors"):
                clone(features).fit(images)


INVALID = {
    "format": [..., None, "sktl fine-tuned model, version 4", "sktl checkpoint"],
    "target": [..., 3, {}, {"kind": "other"}, {"kind": "multiclass", "classes": 3}],
    "architecture": [..., 3, {}, {"backbone": "tiny", "heads": []}],
    "preprocessing": [..., [], {"mean": [1]}],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, v) for name in INVALID for v in INVALID[name]]
)
def test_file_made_by_hand(file, name, value):
    tensors, document = read_tensors(file)
    document[name] = value
    if value is ...:
        del document[name]
    write_tensors(file, tensors, document)
    with pytest.raises(ValueError, match=r"tuned\.safetensors"):
        load_backbone("five stages", file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_layer_sizes": [2**20]}, "must have the names and shapes"),
        ({"hidden_layer_sizes": [0]}, "must be ints from 1"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_head_made_by_hand(file, change, message):
    tensors, document = read_tensors(file)
    document["architecture"]["heads"][0] |= change
    write_tensors(file, tensors, document)
    with pytest.raises(ValueError, match=message):
        load_backbone("five stages", file).network  # noqa: B018


def test_backbone_that_is_not_registered(file):
    tensors, document = read_tensors(file)
    document["architecture"]["backbone"] = "never registered"
    write_tensors(file, tensors, document)
    message = r"network in '.*tuned\.safetensors' must be known.* no backbone .never"
    with pytest.raises(ValueError, match=message):
        load_backbone("resnet18", file)


def test_other_files_are_no_saved_networks(file, tmp_path):
    save_file(load_file(file), tmp_path / "plain.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain.pth")
    for name in ("plain.safetensors", "plain.pth", "missing.pth"):
        assert find_saved_network(tmp_path / name) is None
    for weights in ("DEFAULT", None, 3):
        assert find_saved_network(weights) is None
    assert find_saved_network(str(file)).labels == ("ant", "bee", "wasp")


@pytest.mark.parametrize(
    ("module", "name"),
    [(saved_network, "read_document"), (registry, "find_saved_network")],
)
@pytest.mark.parametrize("is_before", [True, False])
def test_file_that_is_replaced_while_it_is_read(
    file, images, monkeypatch, module, name, is_before
):
    first, other = file.read_bytes(), file.with_name("other.safetensors")
    fit(images, labels=[0, 1], max_epochs=0).save(other)
    original = getattr(module, name)

    def read(path):
        result = original(path)
        shutil.copy(other, path)
        return original(path) if is_before else result

    monkeypatch.setattr(saved_network, "_saved", KeyedCache(max_size=4))
    monkeypatch.setattr(registry, "backbones", KeyedCache(max_size=4))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, read)
        if module is registry and is_before:  # all of it is the other file
            assert load_backbone(DEFAULT_BACKBONE, file).categories == (0, 1)
        else:
            with pytest.raises(ValueError, match="must not change while they are read"):
                load_backbone(DEFAULT_BACKBONE, file)
    for content, labels in ((first, ("ant", "bee", "wasp")), (None, (0, 1))):
        file.write_bytes(content or other.read_bytes())
        assert load_backbone(DEFAULT_BACKBONE, file).categories == labels


class Scale(nn.Module):
    """Multiplies by a constant that is not saved, and filled after its creation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.empty(1), persistent=False)
        self.factor.fill_(0.5)

    def forward(self, x):
        return x * self.factor


def scaled_network():
    network = TinyNet()
    network.stages["stem"].append(Scale())
    return network


class NotRegistered:
    """A source whose networks are built without values."""

    def resolve(self, name, weights, progress):
        definition = registered.resolve(name, weights, progress)
        return replace(definition, registration=None)


def test_constants_that_are_not_saved(images, tmp_path, monkeypatch):
    register_backbone("scaled", scaled_network, preprocessing=Preprocessing(16, 16))
    tuned = fit(images, "scaled")
    tuned.save(tmp_path / "tuned.safetensors")
    monkeypatch.setattr(registry, "find_source", lambda name: NotRegistered())
    monkeypatch.setattr(registry, "backbones", KeyedCache(max_size=4))
    mine = PretrainedClassifier(weights=tmp_path / "tuned.safetensors")
    mine.set_params(engine="torch").fit(images)
    expected = tuned.predict_proba(images)
    np.testing.assert_allclose(mine.predict_proba(images), expected, atol=1e-5)


def encoder():
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU())


def headless():
    return nn.Sequential(*encoder(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def without_stages():
    return nn.Sequential(*headless(), nn.Linear(6, 4))


@pytest.mark.parametrize("builder", [headless, without_stages])
def test_registered_networks_without_head_or_stages(images, tmp_path, builder):
    parts = {}
    if builder is headless:
        parts = {"stages": {"stem": ["0", "1"]}, "head": ["2", "3"]}
    name, size = builder.__name__, Preprocessing(16, 16)
    register_backbone(name, builder, preprocessing=size, **parts)
    features = PretrainedFeatures(name, engine="torch").fit_transform(images)
    with torch.inference_mode():
        expected = load_backbone(name).network[:4](normalized(images, size))
    np.testing.assert_allclose(features, expected, atol=1e-5)
    description = describe_backbone(name)
    assert description.param_grids["FineTunedCNNClassifier"]["trainable"] == [
        *("head", "all")
    ]
    assert [part["name"] for part in description.parts[-2:]] == [
        *(["penultimate", "head"] if builder is without_stages else []),
        *(["stem", "penultimate"] if builder is headless else []),
    ]
    # The head alone is fitted on the penultimate features.
    probe = fit(images, name, trainable="head", max_epochs=0, engine="torch")
    logits = probe.module_[-1](torch.from_numpy(features)).detach().numpy()
    np.testing.assert_allclose(
        probe.predict_proba(images), softmax(logits, 1), atol=1e-5
    )
    tuned, file = fit(images, name, trainable="all"), tmp_path / "tuned.safetensors"
    before, after = probe.module_.state_dict(), tuned.module_.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == before.keys()
    tuned.save(file)
    for each in (
        FineTunedCNNClassifier.load(file),
        PretrainedClassifier(weights=file, engine="torch").fit(images),
    ):
        np.testing.assert_allclose(
            each.predict_proba(images), tuned.predict_proba(images), atol=1e-5
        )
    second = fit(images, name, weights=file, trainable="head", max_epochs=0)
    assert second.module_[-1][0].in_features == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeezenet1_1", "swin_t", "resnet_mini"])
def test_networks_with_other_heads_and_layouts(images, tmp_path, name):
    options = {"max_epochs": 0, "head_init": "random", "hidden_layer_sizes": 4}
    estimator = fit(images[:4], name, [0, 1], weights=None, **options)
    estimator.save(tmp_path / "tuned.safetensors")
    mine = PretrainedClassifier(weights=tmp_path / "tuned.safetensors")
    mine.set_params(engine="torch").fit(images[:4])
    expected = estimator.predict_proba(images[:4])
    np.testing.assert_allclose(mine.predict_proba(images[:4]), expected, atol=1e-5)
    file = tmp_path / "tuned.safetensors"
    for layer in ("stage1", "stage2.1", "neck.1"):
        features = PretrainedFeatures(weights=file, layer=layer, engine="torch")
        rows = features.fit_transform(images[:4])
        assert np.isfinite(rows).all()


@pytest.mark.slow
def test_layout_of_modules_in_stages(images, tmp_path):
    options = {"max_epochs": 0, "head_init": "random"}
    estimator = fit(images[:2], "swin_t", [0, 1], weights=None, **options)
    estimator.save(tmp_path / "tuned.safetensors")
    structure = load_backbone("swin_t", tmp_path / "tuned.safetensors").structure
    # The first module of the second stage permutes the axes.
    names = ["stage1", "stage2", "stage2.1", "stage2.1.norm", "stage2.0", "neck.0"]
    expected = [False, False, True, True, None, None]
    assert [structure.is_channels_last(name) for name in names] == expected


@pytest.mark.parametrize(
    "name",
    [
        "timm/test_vit",
        "timm/test_resnet",
        # Its kernels are not saved.
        "timm/resnetblur18",
    ],
)
@pytest.mark.slow
def test_transformers_and_networks_that_cannot_be_cut(
    images, tmp_path, monkeypatch, name
):
    pytest.importorskip("timm")
    is_cut = name != "timm/test_resnet"
    if not is_cut:
        monkeypatch.setattr(timm_structure, "record", None)
    images, file = images[:6], tmp_path / "tuned.safetensors"
    options = {"head_init": "random", "image_size": 32, "engine": "torch"}
    start = {"weights": None, "hidden_layer_sizes": 5, "random_state": 91}
    tuned = fit(images, name, trainable="all", **options, **start)
    tuned.save(file)
    expected = tuned.predict_proba(images)
    # As in another process, which has not loaded the backbone before.
    monkeypatch.setattr(registry, "backbones", KeyedCache(max_size=4))
    loaded = FineTunedCNNClassifier.load(file)
    np.testing.assert_array_equal(loaded.predict_proba(images), expected)
    mine = PretrainedClassifier(weights=file, engine="torch").fit(images)
    np.testing.assert_allclose(mine.predict_proba(images), expected, atol=1e-6)
    layer, n_columns = ("stage1", 64) if is_cut else ("penultimate", 5)
    features = PretrainedFeatures(weights=file, layer=layer, engine="torch")
    assert features.fit_transform(images).shape == (6, n_columns)
    second = fit(images, name, weights=file, trainable="head", **options)
    # All but the last linear layer is frozen; the names of the parameters differ.
    before, after = tuned.module_.state_dict(), second.module_.state_dict()
    pairs = zip(list(before.values())[:-2], list(after.values())[:-2], strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def small_transformer():
    return models.VisionTransformer(32, 16, 4, 2, 8, 8, num_classes=3)


@pytest.mark.parametrize(
    "name",
    ["small transformer", pytest.param("timm/test_vit", marks=pytest.mark.slow)],
)
def test_tokens_of_all_layers(images, tmp_path, name):
    if name == "timm/test_vit":
        pytest.importorskip("timm")
    else:
        register_backbone(name, small_transformer, preprocessing=Preprocessing(32, 32))
    file, options = tmp_path / "tuned.safetensors", {"max_epochs": 0, "image_size": 32}
    start = {"weights": None, "head_init": "random", "engine": "torch"}
    fit(images[:4], name, [0, 1], **options, **start).save(file)
    backbone = copy.deepcopy(load_backbone(DEFAULT_BACKBONE, file))
    expected, kinds = {}, set()

    def count(layer):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor) and output.ndim == 3:
                expected[layer] = output.shape[1] - 4  # of (32 / 16)^2 patches
                kinds.add(type(module).__name__)

        return hook

    for layer, module in backbone.network.named_modules():
        module.register_forward_hook(count(layer))
    with torch.inference_mode():
        backbone.network(torch.zeros(1, 3, 32, 32))
    got = {layer: backbone.structure.n_prefix_tokens(layer) for layer in expected}
    assert got == expected
    assert kinds & {"Embedding", "TracedBlock"}  # which the backbone does not have


@pytest.mark.slow
def test_a_transformer_with_weights_of_another_size(images, tmp_path):
    images, name = images[:6], "small transformer"
    register_backbone(name, small_transformer, preprocessing=Preprocessing(32, 32))
    plain = models.VisionTransformer(64, 16, 4, 2, 8, 8, num_classes=3).eval()
    torch.save(plain.state_dict(), tmp_path / "w.pth")
    start = {"weights": tmp_path / "w.pth", "engine": "torch"}
    features = PretrainedFeatures(name, image_size=64, **start).fit_transform(images)
    plain.heads = nn.Identity()
    with torch.inference_mode():
        expected = plain(normalized(images, Preprocessing(64, 64)))
    np.testing.assert_allclose(features, expected, atol=1e-5)
    # At a third size, as the network is fine-tuned.
    tuned = fit(images, name, image_size=48, trainable=2, head_init="random", **start)
    assert tuned.module_.stem[0].pos_embedding.shape == (1, 17, 8)
    assert torch.equal(tuned.module_.stem[0].pos_embedding, plain.encoder.pos_embedding)
    tuned.save(tmp_path / "tuned.safetensors")
    probabilities = tuned.predict_proba(images)
    loaded = FineTunedCNNClassifier.load(tmp_path / "tuned.safetensors")
    mine = PretrainedClassifier(weights=tmp_path / "tuned.safetensors", engine="torch")
    for each in (loaded, mine.fit(images)):
        np.testing.assert_allclose(each.predict_proba(images), probabilities, atol=1e-6)


@pytest.mark.slow
def test_names_in_the_file_do_not_depend_on_the_blocks(images, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    images, file = images[:4], tmp_path / "tuned.safetensors"
    options = {"max_epochs": 0, "head_init": "random", "engine": "torch"}
    tuned = fit(images, "timm/test_vit", [0, 1], weights=None, image_size=32, **options)
    tuned.save(file)
    own = timm.create_model("test_vit").state_dict()
    expected = {f"backbone.{name}" for name in own if not name.startswith("head.")}
    expected |= {f"heads.0.0.{name}" for name in AFFINE}
    assert load_file(file).keys() == expected
    # Another version may divide the network elsewhere, or not at all.
    monkeypatch.setattr(timm_structure, "record", None)
    monkeypatch.setattr(registry, "backbones", KeyedCache(max_size=4))
    loaded = FineTunedCNNClassifier.load(file)
    assert len(loaded.module_) < len(tuned.module_)
    probabilities = [each.predict_proba(images) for each in (tuned, loaded)]
    np.testing.assert_allclose(*probabilities, atol=1e-6)
    mine = PretrainedClassifier(weights=file, engine="torch").fit(images)
    np.testing.assert_allclose(mine.predict_proba(images), probabilities[0], atol=1e-6)
