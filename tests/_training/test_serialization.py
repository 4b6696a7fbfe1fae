"""What is loaded is what was saved; anything else is refused, and nothing executed."""

import warnings
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.base import clone

from sktl import (
    FeatureStore,
    FineTunedCNNClassifier,
    Preprocessing,
    register_backbone,
)
from sktl._backbones import weights as weights_room
from sktl._utils.tensor_file import read_tensors, write_tensors

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
    options = {"max_epochs": 1, "random_state": 0, **parameters}
    return FineTunedCNNClassifier(backbone, **options).fit(images, y)


@pytest.fixture(scope="module")
def mine(images):
    return fit(images)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine.safetensors"


def round_trip(estimator, file):
    estimator.save(file)
    return FineTunedCNNClassifier.load(file)


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_kind(images, file, kind):
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
        ("resnet_mini", {"trainable": 1}),
        ("resnet_mini", {"weights": None, "trainable": "head"}),
    ],
)
def test_equal_predictions_bit_for_bit(images, file, backbone, parameters):
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
def test_parameters_of_any_plain_kind(mine, file, parameters):
    estimator = clone(mine).set_params(**parameters)
    for name, value in vars(mine).items():
        if name.endswith("_") or name in ("_model_config", "_digest"):
            setattr(estimator, name, value)
    loaded = round_trip(estimator, file).get_params()
    for name, value in estimator.get_params().items():
        if isinstance(value, list | np.ndarray):
            value = tuple(value)
        assert loaded[name] == (str(value) if isinstance(value, Path) else value), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("random_state", np.random.RandomState(0)),
        ("augmentation", lambda image: image),
        ("callbacks", [object()]),
        ("device", torch.device("cpu")),
        ("memory", "store"),
        ("memory", "joblib"),
    ],
)
def test_parameters_that_are_not_plain_are_default_again(mine, file, name, value):
    if name == "memory":
        folder = file.parent / "kept"
        value = FeatureStore(folder) if value == "store" else joblib.Memory(folder)
    estimator = FineTunedCNNClassifier.load(saved(mine, file))
    estimator.set_params(**{name: value})
    with pytest.warns(UserWarning, match=f"plain values are saved; {name} will") as w:
        estimator.save(file)
    assert w[0].filename == __file__
    default = FineTunedCNNClassifier().get_params()[name]
    assert FineTunedCNNClassifier.load(file).get_params()[name] == default


def saved(estimator, file):
    estimator.save(file)
    return file


def test_history_and_features_come_too(images, file):
    flat = pd.DataFrame(images[:, :4, :4].reshape(40, -1)).rename(columns="c{}".format)
    estimator = FineTunedCNNClassifier(
        "tiny", max_epochs=2, early_stopping=True, image_shape=(4, 4, 3)
    ).fit(flat, np.arange(40) % 2)
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


def test_what_is_loaded_can_be_saved_cloned_and_trained(images, mine, file):
    loaded = round_trip(mine, file)
    again = round_trip(loaded, file)
    assert again.get_params() == loaded.get_params() == mine.get_params()
    assert not hasattr(clone(loaded), "classes_")
    before = loaded.n_iter_
    loaded.partial_fit(images, loaded.predict(images))
    assert loaded.n_iter_ == before + 1
    loaded.set_params(warm_start=True).fit(images, mine.classes_[np.arange(40) % 2])


def test_the_file_is_safetensors_of_the_network(mine, file):
    tensors = load_file(saved(mine, file))
    own = mine.module_.state_dict()
    assert set(tensors) == set(own)
    assert all(torch.equal(tensors[name], own[name]) for name in own)
    with safe_open(file, "pt") as opened:
        assert "FineTunedCNNClassifier" in opened.metadata()["sktl"]


def test_loading_needs_no_pretrained_weights(images, file, monkeypatch):
    estimator = fit(images, backbone="resnet_mini", trainable="head")
    expected = estimator.predict_proba(images)
    estimator.set_params(backbone="resnet_mini", weights="gone.pth").save(file)
    for name in ("fetch", "load_weights"):
        monkeypatch.setattr(weights_room, name, None)
        monkeypatch.setattr(f"sktl._backbones.registry.{name}", None)
    loaded = FineTunedCNNClassifier.load(file)
    np.testing.assert_array_equal(loaded.predict_proba(images), expected)
    assert loaded.weights == "gone.pth"


def test_loading_draws_nothing(mine, file):
    saved(mine, file)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    FineTunedCNNClassifier.load(file)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_that_json_cannot_hold(mine, file):
    estimator = round_trip(mine, file)
    before = file.read_bytes()
    for classes in (np.array([1j, 2]), np.array([b"a", b"b"])):
        estimator.classes_ = classes
        with pytest.raises(TypeError, match="which JSON cannot hold"):
            estimator.save(file)
        assert file.read_bytes() == before


def test_a_damaged_file(mine, file):
    whole = saved(mine, file).read_bytes()
    for position in range(0, len(whole), len(whole) // 50):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        for content in (damaged, whole[:position]):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"mine\.safetensors.*was executed"):
                FineTunedCNNClassifier.load(file)


def test_no_file(file):
    with pytest.raises(FileNotFoundError):
        FineTunedCNNClassifier.load(file)


@pytest.mark.parametrize("document", [{}, {"format": "sktl something else"}])
def test_a_file_of_something_else(file, document):
    write_tensors(file, {}, document)
    with pytest.raises(ValueError, match=r"mine\.safetensors.*file of FineTuned"):
        FineTunedCNNClassifier.load(file)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):  # noqa: D105
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dump", [joblib.dump, torch.save])
def test_a_pickle_is_not_executed(file, dump):
    dump(Attack(file.parent / "touched"), file)
    with pytest.raises(ValueError, match=r"mine\.safetensors.*Nothing in it was"):
        FineTunedCNNClassifier.load(file)
    assert not (file.parent / "touched").exists()


@pytest.mark.parametrize("value", [..., 3, [], None, "abc", {"lr": {"pairs": 3}}])
@pytest.mark.parametrize(
    "part", ["classes", "fitted", "network", "parameters", "preprocessing"]
)
def test_a_file_that_somebody_wrote_by_hand(mine, file, part, value):
    tensors, document = read_tensors(saved(mine, file))
    document[part] = value
    if value is ...:
        del document[part]
    write_tensors(file, tensors, document)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        with pytest.raises(ValueError, match=r"mine\.safetensors"):
            FineTunedCNNClassifier.load(file)


def test_a_head_that_says_it_is_wide_is_not_made(mine, file):
    tensors, document = read_tensors(saved(mine, file))
    document["network"]["hidden_layer_sizes"] = [2**50]
    write_tensors(file, tensors, document)
    with pytest.raises(ValueError, match=r"mine\.safetensors.*names and shapes"):
        FineTunedCNNClassifier.load(file)


@pytest.mark.parametrize("size", [0, 2**40, float("inf"), float("nan")])
def test_images_of_no_size(mine, file, size):
    tensors, document = read_tensors(saved(mine, file))
    document["preprocessing"]["crop_size"] = size
    write_tensors(file, tensors, document)
    with pytest.raises(ValueError, match=r"mine\.safetensors.*crop_size must be"):
        FineTunedCNNClassifier.load(file)


def test_nothing_but_what_a_fit_sets_is_set(mine, file):
    tensors, document = read_tensors(saved(mine, file))
    document["fitted"] |= {"predict": "mine", "__class__": "mine", "lr": 3}
    write_tensors(file, tensors, document)
    loaded = FineTunedCNNClassifier.load(file)
    assert vars(loaded).keys() == vars(mine).keys() - {"net_"}
    assert loaded.lr == 1e-4


def test_a_backbone_that_is_not_known(mine, file):
    tensors, document = read_tensors(saved(mine, file))
    document["network"]["backbone"] = "resnet81"
    write_tensors(file, tensors, document)
    with pytest.raises(
        ValueError, match=r"no backbone 'resnet81'.* Do you mean resnet18"
    ):
        FineTunedCNNClassifier.load(file)


def test_a_backbone_that_is_another_now(images, file):
    def builder(width):
        from conftest import TinyNet

        network = TinyNet()
        network.stages["stage1"] = torch.nn.Conv2d(8, width, 3)
        network.head[-1] = torch.nn.Linear(width, 5)
        return network

    for width in (4, 6):
        register_backbone(
            "moving", lambda w=width: builder(w), preprocessing=Preprocessing(16, 16)
        )
        if width == 4:
            fit(images, backbone="moving").save(file)
    with pytest.raises(ValueError, match=r"the network that it was.* size mismatch"):
        FineTunedCNNClassifier.load(file)
