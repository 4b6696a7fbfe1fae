"""Tests of saved models: round trips, damaged files, files made by hand."""

import copy
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from shared_fixtures import FIXED, TinyNet
from sklearn.base import clone

from sktl import (
    FineTunedCNNClassifier,
    Preprocessing,
    register_backbone,
)
from sktl._training import serialization
from sktl._training.multiclass import MulticlassTarget
from sktl._training.network import network_digest
from sktl._utils.tensor_file import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

LABELS = {
    "str": ["a", "ü and more"],
    "object": np.array(["a", "bb"], object),
    "int": [3, 7],
    "negative": [-(2**62), 5],
    "uint8": np.array([3, 7], "u1"),
    "bool": [False, True],
    "float": [-1.0, 2.0],
    "float32": np.array([-1.0, 2.0], "f4"),
    "big endian": np.array([3, 7], ">i4"),
}


def fit(images, labels=("a", "b"), backbone="tiny", **parameters):
    y = np.asarray(labels)[np.arange(40) % len(labels)]
    options = {**FIXED, "max_epochs": 1, "random_state": 0, "engine": "torch"}
    options |= parameters
    return FineTunedCNNClassifier(backbone, **options).fit(images, y)


@pytest.fixture(scope="module")
def fitted(images):
    return fit(images)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def round_trip(estimator, file):
    estimator.save(file)
    return FineTunedCNNClassifier.load(file)


@pytest.mark.parametrize(
    "kind",
    [
        kind if number % 3 == 0 else pytest.param(kind, marks=pytest.mark.slow)
        for number, kind in enumerate(LABELS)
    ],
)
def test_labels_of_any_type(images, file, kind):
    estimator = fit(images, LABELS[kind])
    loaded = round_trip(estimator, file)
    np.testing.assert_array_equal(loaded.classes_, estimator.classes_)
    assert loaded.classes_.dtype == estimator.classes_.dtype
    assert [type(c) for c in loaded.classes_] == [type(c) for c in estimator.classes_]
    np.testing.assert_array_equal(loaded.predict(images), estimator.predict(images))


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [
        ("tiny", {}),
        ("tiny", {"hidden_layer_sizes": (8, 4), "dropout": 0.3}),
        ("tiny", {"image_size": 24, "augmentation": "standard"}),
        ("tiny", {"resize": "pad", "augmentation": "standard"}),
        pytest.param("resnet_mini", {"trainable": 1}, marks=pytest.mark.slow),
        ("five stages", {"weights": None, "trainable": "head"}),
    ],
)
def test_loaded_model_predicts_equal_bits(images, file, backbone, parameters):
    estimator = fit(images, ["a", "b", "c"], backbone, **parameters)
    loaded = round_trip(estimator, file)
    for X in (images, images[:3]):
        np.testing.assert_array_equal(
            loaded.decision_function(X), estimator.decision_function(X)
        )
    for name, tensor in estimator.module_.state_dict().items():
        assert torch.equal(loaded.module_.state_dict()[name], tensor), name
    assert loaded.preprocessing_ == estimator.preprocessing_
    assert not loaded.module_.training


@pytest.mark.parametrize(
    "parameters",
    [
        {"weights": Path("some.pth")},
        {"trainable": "stage1", "head_init": "random"},
        {"trainable": np.int64(1), "lr": np.float32(0.01)},
        {"hidden_layer_sizes": [8, 4]},
        {"hidden_layer_sizes": np.array([8, 4])},
        {"hidden_layer_sizes": 8},
        {"class_weight": {"a": 2.0, "b": 1}},
        {"class_weight": {np.int64(0): 2, True: np.float64(0.5)}},
        {"class_weight": "balanced"},
        {"early_stopping": np.bool_(True), "validation_fraction": 0.5},
        {"augmentation": None, "callbacks": None, "checkpoint": Path("here")},
        {"callbacks": []},
        {"image_shape": (16, 32, 3), "pixel_range": (0, 255.0)},
        {"memory": "some where", "random_state": 42, "verbose": 1, "n_jobs": 2},
    ],
)
def test_parameters_of_plain_types(fitted, file, parameters):
    estimator = copy.copy(fitted).set_params(**parameters)
    loaded = round_trip(estimator, file).get_params()
    for name, value in estimator.get_params().items():
        if isinstance(value, list | np.ndarray):
            value = tuple(value)
        assert loaded[name] == (str(value) if isinstance(value, Path) else value), name


def save(estimator, file):
    estimator.save(file)
    return file


def test_history_and_feature_names_are_loaded(images, file):
    flat = pd.DataFrame(images[:, :4, :4].reshape(40, -1)).rename(columns="c{}".format)
    options = {**FIXED, "max_epochs": 2, "early_stopping": True}
    estimator = FineTunedCNNClassifier("tiny", image_shape=(4, 4, 3), **options).fit(
        flat, np.arange(40) % 2
    )
    loaded = round_trip(estimator, file)
    for name in ("n_iter_", "best_epoch_", "loss_curve_", "validation_scores_"):
        assert getattr(loaded, name) == getattr(estimator, name)
    assert loaded.history_ == estimator.history_
    assert loaded.n_features_in_ == 48
    assert loaded.feature_names_in_.tolist() == list(flat)
    assert loaded.feature_names_in_.dtype == object
    np.testing.assert_array_equal(loaded.predict(flat), estimator.predict(flat))
    with pytest.raises(ValueError, match="feature names"):
        loaded.predict(flat.rename(columns=str.upper))


def test_selected_settings_are_loaded(images, file):
    auto = dict.fromkeys(("lr", "head_init", "wise_ft_alpha"), "auto")
    estimator = fit(images, **auto)
    loaded = round_trip(estimator, file)
    assert loaded.selection_ == estimator.selection_ != []
    for name in ("lr", "head_init", "wise_ft_alpha"):
        assert getattr(loaded, f"{name}_") == getattr(estimator, f"{name}_") != "auto"
        assert getattr(loaded, name) == "auto"
    loaded.partial_fit(images, estimator.predict(images))
    assert loaded.lr_ == estimator.lr_


def test_loaded_model_can_be_saved_cloned_and_trained(images, fitted, file):
    loaded = round_trip(fitted, file)
    again = round_trip(loaded, file)
    assert again.get_params() == loaded.get_params() == fitted.get_params()
    assert not hasattr(clone(loaded), "classes_")
    before = loaded.n_iter_
    loaded.partial_fit(images, loaded.predict(images))
    assert loaded.n_iter_ == before + 1
    loaded.set_params(warm_start=True).fit(images, fitted.classes_[np.arange(40) % 2])


def test_file_contains_the_weights_as_safetensors(fitted, file):
    tensors = load_file(save(fitted, file))
    own = fitted.module_.state_dict()
    below = [name for name in TinyNet().state_dict() if name.startswith("stages.")]
    expected = {f"backbone.{name}": own[name.removeprefix("stages.")] for name in below}
    expected |= {
        f"heads.0.0.{name}": own[f"head.0.{name}"] for name in ("weight", "bias")
    }
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    with safe_open(file, "pt") as opened:
        assert "FineTunedCNNClassifier" in opened.metadata()["sktl"]


def network_with_a_shared_layer():
    network, shared = TinyNet(), torch.nn.Conv2d(16, 16, 3, padding=1)
    network.stages["stage1"].append(shared)
    network.stages["stage2"] = torch.nn.Sequential(shared, torch.nn.ReLU())
    return network


def test_shared_parameters_are_saved_once(images, file):
    preprocessing = Preprocessing(16, 16)
    register_backbone(
        "shared layer", network_with_a_shared_layer, preprocessing=preprocessing
    )
    estimator = fit(images, backbone="shared layer", trainable="head")
    loaded = round_trip(estimator, file)
    names = load_file(file).keys()
    assert "backbone.stages.stage1.2.weight" in names
    assert "backbone.stages.stage2.0.weight" not in names
    module = loaded.module_
    assert module.stage1[2].weight is module.stage2[0].weight
    expected = estimator.predict_proba(images)
    np.testing.assert_array_equal(loaded.predict_proba(images), expected)


def test_shared_parameters_of_a_frozen_stage_are_not_trained(images, tmp_path):
    register_backbone(
        "shared layer",
        network_with_a_shared_layer,
        preprocessing=Preprocessing(16, 16),
    )
    memory = tmp_path / "cache"
    estimator = fit(images, backbone="shared layer", trainable=1, memory=memory)
    cached = estimator.predict_proba(images)
    computed = estimator.set_params(memory=None).predict_proba(images)
    np.testing.assert_allclose(cached, computed, atol=1e-6)


def test_loading_needs_no_pretrained_weights(images, file, monkeypatch):
    options = {"trainable": "head", "image_size": 32}
    estimator = fit(images, backbone="resnet_mini", **options)
    expected = estimator.predict_proba(images)
    estimator.set_params(backbone="resnet_mini", weights="gone.pth").save(file)
    monkeypatch.setattr("sktl._backbones.torchvision.fetch_weights", None)
    monkeypatch.setattr("sktl._backbones.registry.load_weights", None)
    loaded = FineTunedCNNClassifier.load(file)
    np.testing.assert_array_equal(loaded.predict_proba(images), expected)
    assert loaded.weights == "gone.pth"


def test_loading_does_not_change_the_random_state(fitted, file):
    save(fitted, file)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    FineTunedCNNClassifier.load(file)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_that_cannot_be_save(fitted, file):
    estimator = round_trip(fitted, file)
    before = file.read_bytes()
    for classes in (np.array([1j, 2]), np.array([b"a", b"b"])):
        model = replace(estimator._fitted_model, target=MulticlassTarget(classes))
        estimator._fitted_model = model
        with pytest.raises(TypeError, match="JSON cannot hold a"):
            estimator.save(file)
        assert file.read_bytes() == before


def test_damaged_file(fitted, file):
    whole = save(fitted, file).read_bytes()
    for position in range(0, len(whole), len(whole) // 50):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        for content in (damaged, whole[:position]):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"model\.safetensors.*was executed"):
                FineTunedCNNClassifier.load(file)


def test_missing_file(file):
    with pytest.raises(FileNotFoundError):
        FineTunedCNNClassifier.load(file)


@pytest.mark.parametrize("document", [{}, {"format": "sktl something else"}])
def test_file_of_another_format(file, document):
    write_tensors(file, {}, document)
    with pytest.raises(ValueError, match=r"model\.safetensors.*file of FineTuned"):
        FineTunedCNNClassifier.load(file)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):  # noqa: D105
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dump", [joblib.dump, torch.save])
def test_pickle_is_not_executed(file, dump):
    dump(Attack(file.parent / "touched"), file)
    with pytest.raises(ValueError, match=r"model\.safetensors.*Nothing in it was"):
        FineTunedCNNClassifier.load(file)
    assert not (file.parent / "touched").exists()


GAP = [{"epoch": epoch, "train_loss": 1.0} for epoch in (1, 3)]
INVALID_WIDTHS = [3, None, [0], [True], [2.5], ["a"], {}, [10**30]]
INVALID_DROPOUTS = [None, "0.5", True, 2, -1, 10**400]
INVALID_VALUES = {
    "estimator": [..., 3, [], None, "PretrainedClassifier"],
    "parameters": [..., 3, [], None, "abc", {"lr": {"pairs": 3}}, {"lr": {}}],
    "target": [..., 3, [], None, "abc", {}, {"kind": "other"}, {"kind": ["a"]}],
    "network": [..., 3, [], None, "abc", {"lr": {"pairs": 3}}],
    "network.backbone": [..., 3, None],
    "architecture": [..., 3, [], None, {}],
    "architecture.backbone": [..., 3, None, "resnet81"],
    "architecture.heads": [
        *(..., 3, None, [], [3], [{}], {}),
        *([{"hidden_layer_sizes": value, "dropout": 0.0}] for value in INVALID_WIDTHS),
        *([{"hidden_layer_sizes": [], "dropout": value}] for value in INVALID_DROPOUTS),
        *([{"dropout": 0.0}], [{"hidden_layer_sizes": []}]),
    ],
    "network.weights": [..., 3, None],
    "network.image_size": ["20", 2.5, True, []],
    "network.resize": ["stretch", 3, True, []],
    "preprocessing": [..., 3, [], None, "abc", {"lr": {"pairs": 3}}],
    "preprocessing.mean": [..., 3, None, ["a"] * 3, [[]] * 3, [0.5], {}, [10**400] * 3],
    "preprocessing.interpolation": [..., 3, None, "best"],
    "preprocessing.resize": [..., 3, None, "stretch"],
    "preprocessing.resize_size": [..., "20", 2.5, None, -1],
    "history": [..., 3, None, "abc", {}, [3], [{}], [[]], [{"epoch": 1}], GAP],
    "best_epoch": [..., None, "1", 1.0, True, 99],
    "lr": [..., None, "1", True, [], 10**400],
    "wise_ft_alpha": [..., None, "1", True, [], 10**400],
    "head_init": [..., None, 3, "auto", "zeros", []],
    "selection": [..., 3, None, "abc", {}, [3], [{}], [[]], [{"lr": 0.1}]],
    "n_features_in": ["3", 2.5, True, 0, -1, []],
    "feature_names_in": [3, "abc", [3], {}, [None]],
}


@pytest.mark.parametrize(
    ("part", "value"),
    [(part, v) for part in INVALID_VALUES for v in INVALID_VALUES[part]],
)
def test_file_made_by_hand(fitted, file, part, value):
    tensors, document = read_tensors(save(fitted, file))
    *parents, name = part.split(".")
    inner = document[parents[0]] if parents else document
    inner[name] = value
    if value is ...:
        del inner[name]
    write_tensors(file, tensors, document)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            FineTunedCNNClassifier.load(file)


def test_invalid_width_allocates_no_memory(fitted, file):
    tensors, document = read_tensors(save(fitted, file))
    document["architecture"]["heads"][0]["hidden_layer_sizes"] = [2**20]
    write_tensors(file, tensors, document)
    with pytest.raises(ValueError, match=r"model\.safetensors.*names and shapes"):
        FineTunedCNNClassifier.load(file)


@pytest.mark.parametrize("size", [0, 2**40, float("inf"), float("nan")])
def test_invalid_image_size(fitted, file, size):
    tensors, document = read_tensors(save(fitted, file))
    document["preprocessing"]["crop_size"] = size
    write_tensors(file, tensors, document)
    with pytest.raises(ValueError, match=r"model\.safetensors.*crop_size"):
        FineTunedCNNClassifier.load(file)


def test_unknown_entries_are_ignored(fitted, file):
    tensors, document = read_tensors(save(fitted, file))
    document |= {"predict": "x", "__class__": "x", "dropout": 0.5, "n_iter_": 99}
    write_tensors(file, tensors, document)
    loaded = FineTunedCNNClassifier.load(file)
    assert vars(loaded).keys() == vars(fitted).keys() - {"net_", "module_"}
    assert (loaded.dropout, loaded.n_iter_) == (0.0, 1)


def test_fitted_model_of_a_file(fitted, file):
    loaded = round_trip(fitted, file)._fitted_model
    assert loaded.digest == fitted._fitted_model.digest
    assert loaded.digest == network_digest(loaded.network)
    assert loaded.config == fitted._fitted_model.config
    # Nothing that is cached for the backbone may be used.
    assert (loaded.pretrained.n_parts, loaded.prefix) == (0, None)


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError])
@pytest.mark.parametrize(
    "name", ["load_backbone", "parse_architecture", "load_weights_into", "from_json"]
)
def test_error_of_our_own_code_is_not_called_damage(
    fitted, file, monkeypatch, name, error
):
    def broken(*arguments, **options):
        raise error("a mistake in the code")

    save(fitted, file)
    monkeypatch.setattr(serialization, name, broken)
    with pytest.raises(error, match="a mistake in the code"):
        FineTunedCNNClassifier.load(file)


@pytest.mark.parametrize(
    "parameters", [{}, {"lr": 0.1, "hidden_layer_sizes": np.array([3])}]
)
def test_split_parameters(parameters):
    others = {"callbacks": [object()], "augmentation": len}
    plain, names = serialization.split_parameters({**parameters, **others})
    assert plain.keys() == parameters.keys()
    assert names == list(others)


def test_unknown_backbone(fitted, file):
    tensors, document = read_tensors(save(fitted, file))
    document["architecture"]["backbone"] = "resnet81"
    write_tensors(file, tensors, document)
    with pytest.raises(
        ValueError, match=r"no backbone 'resnet81'.* Do you mean resnet18"
    ):
        FineTunedCNNClassifier.load(file)


def network_of_width(width):
    network = TinyNet()
    network.stages["stage1"] = torch.nn.Conv2d(8, width, 3)
    network.head[-1] = torch.nn.Linear(width, 5)
    return network


def network_of_width_4():
    return network_of_width(4)


def test_backbone_registered_with_another_network(images, file):
    for builder in (network_of_width_4, lambda: network_of_width(6)):
        register_backbone(
            "changing width", builder, preprocessing=Preprocessing(16, 16)
        )
        if builder is network_of_width_4:
            fit(images, backbone="changing width").save(file)
    with pytest.raises(ValueError, match=r"its backbone must be known.* another shape"):
        FineTunedCNNClassifier.load(file)


@pytest.mark.parametrize("trainable", ["head", 1, "all"])
def test_gradients_of_all_stages_after_fit_and_after_load(
    images, file, tmp_path, trainable
):
    fitted = fit(images, trainable=trainable)
    joblib.dump(fitted, tmp_path / "model.joblib")
    pixels = torch.from_numpy(images[:4, :16, :16]).permute(0, 3, 1, 2) / 255
    gradients = []
    for estimator in (
        fitted,
        round_trip(fitted, file),
        joblib.load(tmp_path / "model.joblib"),
    ):
        module = estimator.module_
        assert all(parameter.requires_grad for parameter in module.parameters())
        module(pixels)[:, 0].sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert all(gradient.any() for gradient in gradients[0])
    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux")
def test_loading_starts_no_threads(images, file):
    fit(images, backbone="resnet_mini", head_init="random", max_epochs=0).save(file)

    def n_started():
        torch.set_num_threads(4)  # of this thread
        before = len(os.listdir("/proc/self/task"))
        FineTunedCNNClassifier.load(file)
        return len(os.listdir("/proc/self/task")) - before

    n_before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(n_started).result() == 0
    finally:
        torch.set_num_threads(n_before)


# A child that forks after torch started threads hangs, so it gets a minute.
FORK = """
import os, sys, time
import numpy as np
from sktl import FineTunedCNNClassifier
model = FineTunedCNNClassifier.load(sys.argv[1])
X = np.zeros((1, 40, 40, 3), np.uint8)
children = []
for engine in ("torch", "openvino"):
    model.set_params(engine=engine)
    child = os.fork()
    if child == 0:
        proba = model.predict_proba(X)
        os._exit(0 if abs(proba.sum() - 1) < 1e-5 else 1)
    children.append(child)
deadline = time.monotonic() + 60
while children and time.monotonic() < deadline:
    done, status = os.waitpid(children[-1], os.WNOHANG)
    if done:
        assert os.waitstatus_to_exitcode(status) == 0
        children.pop()
    time.sleep(0.01)
for child in children:
    os.kill(child, 9)
sys.exit(len(children))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_loaded_a_model_may_fork(images, file):
    fit(images, backbone="resnet_mini", head_init="random", max_epochs=0).save(file)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", FORK, str(file)]
    subprocess.run(command, env=environment, check=True, timeout=120)
