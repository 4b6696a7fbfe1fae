"""Tests of the memory of loaded estimators: read, and not written."""

import copy
import os
import pickle

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sktl import (
    FeatureStore,
    FineTunedCNNClassifier,
    PretrainedClassifier,
    PretrainedFeatures,
)

Y = np.arange(12) % 2


def make_features(memory):
    return PretrainedFeatures("tiny", weights=None, memory=memory)


MAKE = {
    "features": make_features,
    "pipeline": lambda memory: make_pipeline(
        make_features(memory), LogisticRegression()
    ),
    "classifier": lambda memory: PretrainedClassifier("projection", memory=memory),
    "fine-tuned": lambda memory: FineTunedCNNClassifier(
        "tiny",
        weights=None,
        trainable="head",
        head_init="random",
        lr=1e-4,
        batch_size=32,
        max_epochs=1,
        memory=memory,
        random_state=0,
        engine="torch",
    ),
}


def output(estimator, X):
    if hasattr(estimator, "predict_proba"):
        return estimator.predict_proba(X)
    return estimator.transform(X)


def from_pickle(estimator, tmp_path):
    return pickle.loads(pickle.dumps(estimator))


def from_joblib(estimator, tmp_path):
    joblib.dump(estimator, tmp_path / "model.joblib")
    return joblib.load(tmp_path / "model.joblib")


@pytest.fixture(params=MAKE)
def fitted(request, images, tmp_path):
    """Return an estimator that was fitted on twelve images, and its store."""
    store = FeatureStore(tmp_path / "store")
    return MAKE[request.param](store).fit(images[:12], Y), store


@pytest.mark.parametrize("load", [from_pickle, from_joblib])
def test_a_loaded_estimator_does_not_write(fitted, images, tmp_path, load):
    estimator, store = fitted
    output(estimator, images[:12])  # fit of PretrainedFeatures computes no rows
    before = store.info()
    loaded = load(estimator, tmp_path)
    got = output(loaded, images)
    assert store.info() == before
    np.testing.assert_allclose(got, output(estimator, images), rtol=1e-5, atol=1e-6)
    assert store.info()["rows"] == before["rows"] + 28  # that one writes


def test_a_loaded_estimator_reads(images, tmp_path, monkeypatch):
    features = make_features(tmp_path).fit(images)
    expected = features.transform(images)
    loaded = pickle.loads(pickle.dumps(features))
    monkeypatch.delattr("sktl._inference.model_spec.get_compiled_model")
    np.testing.assert_array_equal(loaded.transform(images), expected)


def test_a_loaded_estimator_creates_no_directory(images, tmp_path, monkeypatch):
    (tmp_path / "fit").mkdir()
    (tmp_path / "served").mkdir()
    monkeypatch.chdir(tmp_path / "fit")
    estimators = [make("features").fit(images[:12], Y) for make in MAKE.values()]
    pickled = pickle.dumps(estimators)
    monkeypatch.chdir(tmp_path / "served")
    for estimator in pickle.loads(pickled):
        output(estimator, images)
    assert os.listdir() == []


def set_memory(estimator, X):
    name = "pretrainedfeatures__memory" if hasattr(estimator, "steps") else "memory"
    return estimator.set_params(**{name: estimator.get_params()[name]})


def fit_again(estimator, X):
    return estimator.fit(X[:12], Y)


@pytest.mark.parametrize(
    "ask",
    [
        set_memory,
        fit_again,
        lambda estimator, X: clone(estimator).fit(X[:12], Y),
    ],
)
def test_a_loaded_estimator_writes_if_asked(fitted, images, ask):
    estimator, store = fitted
    loaded = ask(pickle.loads(pickle.dumps(estimator)), images)
    output(loaded, images)
    assert store.info()["rows"] == 40


def test_an_assigned_memory_is_written(images, tmp_path):
    loaded = pickle.loads(pickle.dumps(make_features(str(tmp_path / "a")).fit(images)))
    loaded.memory = str(tmp_path / "b")
    loaded.transform(images)
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_write_as_the_original_does(fitted, images, copied):
    estimator, store = fitted
    loaded = pickle.loads(pickle.dumps(estimator))
    before = store.info()
    output(copied(loaded), images)
    assert store.info() == before
    mine = copied(estimator)
    np.testing.assert_array_equal(output(mine, images), output(estimator, images))
    assert store.info()["rows"] == 40
    assert mine.get_params().keys() == estimator.get_params().keys()


@pytest.mark.parametrize("session", ["the same", "another"])
def test_estimators_of_worker_processes_write(fitted, images, monkeypatch, session):
    estimator, store = fitted
    pickled = pickle.dumps(estimator)
    output(estimator, images[:12])
    monkeypatch.setattr("os.getpid", lambda: -1)
    if session == "another":
        monkeypatch.setattr("sktl._inference.memory_access._session", lambda: "other")
    output(pickle.loads(pickled), images)
    assert store.info()["rows"] == (40 if session == "the same" else 12)


def test_an_unfitted_estimator_writes(images, tmp_path):
    loaded = pickle.loads(pickle.dumps(make_features(tmp_path)))
    loaded.transform(images)
    assert FeatureStore(tmp_path).info()["rows"] == 40


@pytest.mark.slow
def test_workers_of_a_search_write_and_their_results_too(paths, images, tmp_path):
    features = PretrainedFeatures("resnet_mini", memory=tmp_path / "store")
    features.set_params(image_size=32, engine="torch")
    search = GridSearchCV(
        make_pipeline(features, LogisticRegression()),
        {"logisticregression__C": [0.1, 1]},
        cv=2,
        n_jobs=2,
        refit=False,
    )
    search.fit(images, np.arange(40) % 2)
    assert FeatureStore(tmp_path / "store").info()["rows"] == 40
    fit = joblib.delayed(PretrainedFeatures.fit)
    (returned,) = joblib.Parallel(2)([fit(clone(features), images)])
    returned.transform(255 - images)
    assert FeatureStore(tmp_path / "store").info()["rows"] == 80
