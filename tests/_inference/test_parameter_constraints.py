"""Constraints on parameters that the estimators share."""

import inspect

import pytest

from sktl import FineTunedCNNClassifier, PretrainedClassifier, PretrainedFeatures
from sktl._inference.parameter_constraints import SHARED_CONSTRAINTS

INVALID = {
    "backbone": None,
    "weights": 3,
    "image_size": 0,
    "resize": "stretch",
    "image_shape": "square",
    "pixel_range": "uint8",
    "reducing_gap": 0.5,
    "max_image_pixels": 0,
    "extra_formats": "TGA",
    "batch_size": 0,
    "device": 0,
    "precision": "int8",
    "engine": "onnx",
    "n_jobs": 1.5,
    "memory": 3,
    "verbose": -1,
}
EACH_ESTIMATOR = pytest.mark.parametrize(
    "estimator", [PretrainedFeatures, PretrainedClassifier, FineTunedCNNClassifier]
)


def test_an_invalid_value_of_each_parameter_is_tested():
    assert INVALID.keys() == SHARED_CONSTRAINTS.keys()


@EACH_ESTIMATOR
def test_every_estimator_has_all_shared_parameters(estimator):
    assert SHARED_CONSTRAINTS.keys() <= inspect.signature(estimator).parameters.keys()


@EACH_ESTIMATOR
@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_value_raises_an_error_before_x_is_read(estimator, name):
    message = f"The '{name}' parameter of {estimator.__name__} must be"
    with pytest.raises(ValueError, match=message):
        estimator(**{name: INVALID[name]}).fit(None, [0, 1])


def test_fine_tuning_in_float16_raises_an_error():
    with pytest.raises(ValueError, match=r"'precision' parameter.*Got 'float16'"):
        FineTunedCNNClassifier(precision="float16").fit(None, [0, 1])
