"""The three estimators with networks that are fast, and their output."""

import pytest
from shared_fixtures import FIXED

from sktl import FineTunedCNNClassifier, PretrainedClassifier, PretrainedFeatures

ESTIMATORS = [
    FineTunedCNNClassifier(
        "tiny", **FIXED, max_epochs=1, random_state=0, engine="torch"
    ),
    PretrainedClassifier("projection", engine="torch"),
    PretrainedFeatures("tiny", engine="torch"),
]
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def output_of(estimator, X):
    """Return the features or the probabilities of an estimator."""
    method = "transform" if hasattr(estimator, "transform") else "predict_proba"
    return getattr(estimator, method)(X)
