"""Tests of the methods that write and read files of the fine-tuned estimators."""

import joblib
import numpy as np
import pytest
import torch
from trainer_helpers import Y, make_classifier

from sktl import FeatureStore, FineTunedCNNClassifier
from sktl._utils.tensor_file import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("quick_linear_probe")


@pytest.fixture(scope="module")
def fitted(images):
    return make_classifier(max_epochs=1).fit(images, Y)


@pytest.fixture
def file(fitted, tmp_path):
    fitted.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


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
def test_other_parameters_have_their_defaults_again(file, name, value):
    if name == "memory":
        folder = file.parent / "cache"
        value = FeatureStore(folder) if value == "store" else joblib.Memory(folder)
    estimator = FineTunedCNNClassifier.load(file)
    estimator.set_params(**{name: value})
    with pytest.warns(
        UserWarning, match=f"plain values are saved. .* {name}, which"
    ) as w:
        estimator.save(file)
    assert w[0].filename == __file__
    default = FineTunedCNNClassifier().get_params()[name]
    assert FineTunedCNNClassifier.load(file).get_params()[name] == default


def test_unknown_parameters(file):
    tensors, document = read_tensors(file)
    document["parameters"] |= {"momentum": 0.9}
    write_tensors(file, tensors, document)
    with pytest.raises(ValueError, match=r"parameters of FineTuned.* Got momentum"):
        FineTunedCNNClassifier.load(file)


def test_subclass_loads_a_file_of_its_base_class(images, fitted, file):
    class Subclass(FineTunedCNNClassifier):
        pass

    loaded = Subclass.load(file)
    assert type(loaded) is Subclass
    np.testing.assert_array_equal(loaded.predict(images), fitted.predict(images))


def test_rows_of_numbers_and_parameters_without_a_plain_value(images, tmp_path):
    X = images.reshape(40, -1)
    estimator = make_classifier(
        image_shape=images.shape[1:], checkpoint=tmp_path, augmentation=max_brightness
    ).fit(X, Y)
    with pytest.warns(UserWarning, match="no values of augmentation, since"):
        loaded = FineTunedCNNClassifier.from_checkpoint(tmp_path)
    assert loaded.n_features_in_ == X.shape[1]
    assert loaded.augmentation is None
    np.testing.assert_array_equal(loaded.predict(X), estimator.predict(X))


def max_brightness(image):
    return image.point(lambda value: 255)
