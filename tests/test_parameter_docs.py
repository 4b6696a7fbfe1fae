"""Parameters that several estimators share have the same documentation."""

import inspect
import itertools

import pytest
from numpydoc.docscrape import ClassDoc

from sktl import (
    FineTunedCNNClassifier,
    FineTunedCNNRegressor,
    PretrainedClassifier,
    PretrainedFeatures,
)

ESTIMATORS = (
    PretrainedFeatures,
    PretrainedClassifier,
    FineTunedCNNClassifier,
    FineTunedCNNRegressor,
)
DOCS = {
    estimator: {p.name: p for p in ClassDoc(estimator)["Parameters"]}
    for estimator in ESTIMATORS
}
SHARED = sorted(
    set().union(
        *(a.keys() & b.keys() for a, b in itertools.combinations(DOCS.values(), 2))
    )
)
# Sentences that some estimators add to the text that all have, and why.
ADDED = {
    "backbone": "they need stages, named categories, or neither",
    "weights": "random weights are a baseline, seeded differently; not for categories",
    "precision": "only fine-tuning updates weights",
    "n_jobs": "fine-tuning distributes only the frozen stages",
    "verbose": "only training has epochs",
    "batch_size": "few images need small batches in training only",
}
# Types that differ, and why.
TYPES = {
    "batch_size": "only fine-tuning depends on it",
    "weights": "a classifier without training needs pretrained weights",
    "precision": "float16 cannot train without scaling the loss",
}


# Defaults that differ, and why.
DEFAULTS = {"batch_size": TYPES["batch_size"]}


def text_of(parameter):
    return " ".join(" ".join(parameter.desc).split())


def test_the_shared_parameters_are_found():
    assert {"backbone", "weights", "batch_size", "memory", "verbose"} <= set(SHARED)
    assert {*ADDED, *TYPES} <= set(SHARED)


@pytest.mark.parametrize("name", SHARED)
def test_shared_parameters_have_the_same_text(name):
    docs = [
        DOCS[estimator][name] for estimator in ESTIMATORS if name in DOCS[estimator]
    ]
    texts = sorted({text_of(parameter) for parameter in docs}, key=len)
    assert all(text.startswith(texts[0]) for text in texts)
    assert (len(texts) > 1) == (name in ADDED)
    assert (len({parameter.type for parameter in docs}) > 1) == (name in TYPES)


@pytest.mark.parametrize("name", SHARED)
def test_shared_parameters_have_the_same_default(name):
    defaults = {
        inspect.signature(estimator).parameters[name].default
        for estimator in ESTIMATORS
        if name in DOCS[estimator]
    }
    assert (len(defaults) > 1) == (name in DEFAULTS)
