"""Pickles of estimators contain the registrations of their backbones."""

import copy
import os
import pickle
import subprocess
import sys

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import nn

from sktl import (
    FineTunedCNNClassifier,
    PretrainedClassifier,
    PretrainedFeatures,
    register_backbone,
)
from sktl._backbones import registered
from sktl._backbones.registration import (
    ImportedBuilder,
    Registration,
    UnavailableBuilder,
)
from sktl._images.preprocessing import Preprocessing

SIZE = Preprocessing(8, 8)


class Net(nn.Module):
    """Network of one stage, by the names of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


STAGES = {
    "stages": {"stem": ["conv", nn.ReLU()]},
    "head": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), "fc"],
    "categories": ["ant", "bee"],
}


@pytest.fixture(autouse=True)
def registrations(monkeypatch):
    """Return the registrations of this process, restored after the test."""
    own = dict(registered.registrations)
    monkeypatch.setattr(registered, "registrations", own)
    register_backbone("net", Net, preprocessing=SIZE, **STAGES)
    return own


def test_a_pickle_registers_the_backbone(images, registrations):
    features = PretrainedFeatures("net", layer="stem").fit(images)
    expected = features.transform(images[:3])
    pickled = pickle.dumps(features)
    registration = registrations.pop("net")
    loaded = pickle.loads(pickled)
    assert registrations["net"] == registration
    assert loaded.transform(images[:3]).tolist() == expected.tolist()


def test_an_estimator_takes_along_what_can_be_imported(registrations):
    register_backbone("local", lambda: Net(), preprocessing=SIZE)
    pickled = pickle.dumps(PretrainedFeatures("resnet_mini"))
    registrations.clear()
    pickle.loads(pickled)
    assert "net" in registrations
    assert "local" not in registrations


def test_a_file_and_a_hash_have_the_own_backbone_only(images, registrations, tmp_path):
    mini, net = PretrainedFeatures("resnet_mini"), PretrainedFeatures("net")
    digests = joblib.hash(mini), joblib.hash(net)
    register_backbone("other", Net, preprocessing=SIZE)
    assert (joblib.hash(mini), joblib.hash(net)) == digests
    for name, estimator in [("mini", mini), ("net", net)]:
        joblib.dump(estimator, tmp_path / name)
    registrations.clear()
    joblib.load(tmp_path / "mini")
    assert not registrations
    joblib.load(tmp_path / "net")
    assert list(registrations) == ["net"]
    assert joblib.hash(net) == digests[1]


def test_a_file_has_the_backbone_of_saved_weights(images, registrations, tmp_path):
    weights = tmp_path / "tuned.safetensors"
    FineTunedCNNClassifier(
        "net", max_epochs=0, trainable="head", head_init="random", lr=1e-3
    ).fit(images[:8], np.arange(8) % 2).save(weights)
    joblib.dump(PretrainedFeatures(weights=weights), tmp_path / "features")
    registrations.clear()
    joblib.load(tmp_path / "features")
    assert list(registrations) == ["net"]


def test_a_pipeline_caches_a_local_builder(images, tmp_path, monkeypatch):
    register_backbone("local", lambda: Net(), preprocessing=SIZE, **STAGES)
    y = np.arange(len(images)) % 2
    steps = PretrainedFeatures("local"), LogisticRegression(max_iter=1000)
    model = make_pipeline(*steps, memory=str(tmp_path)).fit(images, y)
    # The second fit reads the fitted transformer and the features, although the
    # notebook has run the registration again.
    register_backbone("local", lambda: Net(), preprocessing=SIZE, **STAGES)
    monkeypatch.setattr(PretrainedFeatures, "fit_transform", None)
    again = clone(model).fit(images, y)
    assert again.predict_proba(images).tolist() == model.predict_proba(images).tolist()
    with pytest.raises(pickle.PicklingError, match="builder of the backbone 'local'"):
        pickle.dumps(again)


def test_a_cache_needs_the_registration_of_a_local_builder(registrations):
    cached = Registration("local", UnavailableBuilder("It is a lambda."), SIZE)
    with pytest.raises(ValueError, match=r"It is a lambda\. A process that reads"):
        registered.restore(cached)
    registered.restore(cached, required=False)
    assert "local" not in registrations
    register_backbone("local", lambda: Net(), preprocessing=SIZE)
    assert registered.restore(cached) == registrations["local"]


def test_a_local_builder_is_copied_and_not_pickled():
    register_backbone("local", lambda: Net(), preprocessing=SIZE)
    features = PretrainedFeatures("local")
    for copied in (copy.copy(features), copy.deepcopy(features), clone(features)):
        assert copied.backbone == "local"
    with pytest.raises(pickle.PicklingError, match="builder of the backbone 'local'"):
        pickle.dumps(features)


def test_the_registration_of_this_process_is_kept(registrations):
    pickled = pickle.dumps([PretrainedFeatures("net"), PretrainedClassifier("tiny")])
    register_backbone("net", Net, preprocessing=Preprocessing(16, 16))
    with pytest.raises(ValueError, match="Got another preprocessing, categories, stag"):
        pickle.loads(pickled)
    # No estimator in this one has the backbone.
    del registrations["net"]
    register_backbone("net", Net, preprocessing=SIZE, **STAGES)
    pickled = pickle.dumps(PretrainedClassifier("tiny"))
    register_backbone("net", Net, preprocessing=Preprocessing(16, 16))
    pickle.loads(pickled)
    assert registrations["net"].preprocessing.crop_size == 16


def test_a_fitted_estimator_survives_another_registration(images, registrations):
    y = np.arange(len(images)) % 2
    tuned = FineTunedCNNClassifier("net", max_epochs=0).fit(images, y)
    expected = tuned.predict_proba(images)
    other = {**STAGES, "categories": ["wasp", "fly"]}
    register_backbone("net", Net, preprocessing=SIZE, **other)
    content = pickle.dumps(tuned)
    for _ in range(2):
        np.testing.assert_array_equal(
            pickle.loads(content).predict_proba(images), expected
        )
        registrations.clear()


def test_a_worker_replaces_what_it_got_before(registrations, monkeypatch):
    monkeypatch.setattr(registered, "parent_process", lambda: "another process")
    del registrations["net"]
    for name in ("a:b", "a:c"):
        registered.restore(Registration("net", ImportedBuilder(name), SIZE))
        assert registrations["net"].reference == name


def test_a_second_file_does_not_replace_the_network_of_the_first(registrations):
    del registrations["net"]
    first, second = (
        Registration("net", ImportedBuilder(name), SIZE) for name in ("a:b", "a:c")
    )
    registered.restore(first)
    registered.restore(first)
    with pytest.raises(ValueError, match="Got another builder"):
        registered.restore(second)
    registered.restore(second, required=False)
    assert registrations["net"] == first


MODULE = """
import os
import torch
from torch import nn
from sktl import Preprocessing, register_backbone

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))

def build():
    return Net()

def register(builder=build):
    register_backbone(
        "net", builder, preprocessing=Preprocessing(8, 8), categories=["ant", "bee"],
        stages={"stem": ["conv", nn.ReLU()]},
        head=[nn.AdaptiveAvgPool2d(1), nn.Flatten(), "fc"],
    )
"""
SCRIPT = """
import sys
import joblib
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sktl import PretrainedFeatures
import nets

def build():
    return nets.Net()

nets.register(build if sys.argv[1] == "script" else nets.build)
X = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
y = np.arange(12) % 2
first = "net" if sys.argv[1] == "script" else "resnet_mini"
features = PretrainedFeatures(first, engine="torch")
model = make_pipeline(features, LogisticRegression())
grid = {"pretrainedfeatures__backbone": ["net"], "logisticregression__C": [0.1, 1]}
search = GridSearchCV(model, grid, cv=2, n_jobs=2, error_score="raise").fit(X, y)
print(search.predict_proba(X).tolist())
joblib.dump(search, sys.argv[2])
"""
LOAD = """
import importlib
import os
import sys
import joblib
import numpy as np

X = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
os.rename("nets.py", "elsewhere.py")
try:
    joblib.load(sys.argv[1]).predict_proba(X)
except Exception as error:
    print(error, file=sys.stderr)
os.rename("elsewhere.py", "nets.py")
importlib.invalidate_caches()
print(joblib.load(sys.argv[1]).predict_proba(X).tolist())
"""


def run(code, folder, *arguments):
    """Run a script in a new process that can import the modules of a folder."""
    (folder / "script.py").write_text(code)
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "script.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_search_and_joblib_file_in_new_processes(tmp_path):
    (tmp_path / "nets.py").write_text(MODULE)
    saved = run(SCRIPT, tmp_path, "module", "search.joblib")
    assert saved.returncode == 0, saved.stderr
    loaded = run(LOAD, tmp_path, "search.joblib")
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout == saved.stdout
    assert "The builder 'nets:build' of a registered backbone" in loaded.stderr


@pytest.mark.slow
def test_search_with_a_function_of_the_script(tmp_path):
    (tmp_path / "nets.py").write_text(MODULE)
    saved = run(SCRIPT, tmp_path, "script", "search.joblib")
    assert saved.stdout.startswith("[["), saved.stderr  # the search works
    assert saved.returncode == 1  # the file does not
    assert "PicklingError: The builder of the backbone 'net' must" in saved.stderr
    assert "Got __main__:build" in saved.stderr
