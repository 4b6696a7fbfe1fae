"""Saved files name the builder of a registered backbone, and import only if trusted."""

import importlib
import sys

import numpy as np
import pytest

from sktl import FineTunedCNNClassifier
from sktl._backbones import registered
from sktl._utils.tensor_file import read_tensors, write_tensors

MODULE = """
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

width = 4

def register(builder):
    register_backbone(
        "net", builder, preprocessing=Preprocessing(8, 8), categories=["ant", "bee"],
        stages={"stem": ["conv", nn.ReLU()]},
        head=[nn.AdaptiveAvgPool2d(1), nn.Flatten(), "fc"],
    )
"""
REFERENCE = "own_nets:build"


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """Return a module with a network, which the test may import again."""
    (tmp_path / "own_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    own = dict(registered.registrations)
    monkeypatch.setattr(registered, "registrations", own)
    yield importlib.import_module("own_nets")
    sys.modules.pop("own_nets", None)


def fit(images):
    return FineTunedCNNClassifier(
        "net", max_epochs=1, trainable="head", head_init="random", lr=1e-3
    ).fit(images[:8], np.arange(8) % 2)


@pytest.fixture
def saved(nets, images, tmp_path):
    """Return a fitted estimator and its file, in a process that knows no network."""
    nets.register(nets.build)
    fitted, path = fit(images), tmp_path / "model.safetensors"
    fitted.save(path)
    forget()
    return fitted, path


def forget():
    registered.registrations.pop("net", None)
    sys.modules.pop("own_nets", None)


def test_a_trusted_builder_is_imported(saved, images, tmp_path):
    fitted, path = saved
    loaded = FineTunedCNNClassifier.load(path, trusted=[REFERENCE])
    np.testing.assert_array_equal(
        loaded.predict_proba(images), fitted.predict_proba(images)
    )
    assert registered.registrations["net"].categories == ("ant", "bee")
    loaded.save(tmp_path / "again.safetensors")
    forget()
    FineTunedCNNClassifier.load(tmp_path / "again.safetensors", trusted=(REFERENCE,))


def test_a_registered_backbone_is_used(saved, images):
    fitted, path = saved
    importlib.import_module("own_nets").register(lambda: fitted_network())

    def fitted_network():
        return importlib.import_module("own_nets").build()

    loaded = FineTunedCNNClassifier.load(path)
    np.testing.assert_array_equal(
        loaded.predict_proba(images), fitted.predict_proba(images)
    )


def test_a_backbone_with_other_arguments_is_refused(saved):
    _, path = saved
    nets = importlib.import_module("own_nets")
    nets.register(nets.build)
    forge(path, n_prefix_tokens=1, layout="NHWC")
    with pytest.raises(ValueError, match="Got another layout, n_prefix_tokens"):
        FineTunedCNNClassifier.load(path)


@pytest.mark.parametrize("trusted", [(), ["own_nets"], ["own_nets:Net", "os:system"]])
def test_other_builders_are_not_imported(saved, trusted):
    _, path = saved
    with pytest.raises(ValueError, match="imports no code by itself") as caught:
        FineTunedCNNClassifier.load(path, trusted=trusted)
    assert "own_nets" not in sys.modules
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "from own_nets import build" in lines
    # The line that is proposed works.
    (line,) = [each for each in lines if each.startswith("FineTuned")]
    assert eval(line).classes_.tolist() == [0, 1]


def forge(path, **values):
    tensors, document = read_tensors(path)
    document["registration"] |= values
    write_tensors(path, tensors, document)


def test_a_forged_reference_is_not_called(saved, tmp_path, monkeypatch):
    _, path = saved
    monkeypatch.setattr("os.abort", lambda: (tmp_path / "called").touch())
    forge(path, builder="os:abort")
    with pytest.raises(ValueError, match=r"trusted=\['os:abort'\]\)"):
        FineTunedCNNClassifier.load(path, trusted=[REFERENCE])
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"builder": "own_nets:width"}, TypeError, "must be callable. Got int"),
        ({"builder": "own_nets:missing"}, ImportError, "no attribute 'missing'"),
        ({"builder": "own nets"}, ValueError, "no reference of a function"),
        ({"builder": 3}, ValueError, "'builder' is missing or has an invalid type"),
        ({"name": None}, ValueError, "'name' is missing or has an invalid type"),
        ({"stages": {"stem": "conv"}}, ValueError, "its stages must be"),
        ({"stages": [["stem", []]]}, ValueError, "must be a list of names"),
        ({"stages": [["stem", ["Linear(2, 3)"]]]}, ValueError, "no parameters"),
        ({"stages": [["no stage", ["conv"]]]}, ValueError, "must be one word"),
        ({"head": "fc"}, ValueError, "'head' is missing or has an invalid type"),
        ({"head": ["fc"]}, ValueError, "run in order, followed by its `head`"),
        ({"categories": [1]}, ValueError, "categories must be None or a list of str"),
        ({"layout": "HW"}, ValueError, "layout must be"),
        ({"preprocessing": {}}, ValueError, "is missing or has an invalid type"),
    ],
)
def test_forged_registrations_raise(saved, values, error, message):
    _, path = saved
    forge(path, **values)
    trusted = [str(values.get("builder", REFERENCE))]
    with pytest.raises(error, match=message):
        FineTunedCNNClassifier.load(path, trusted=trusted)


@pytest.mark.parametrize("trusted", [REFERENCE, [3], None])
def test_trusted_is_a_list(saved, trusted):
    with pytest.raises(TypeError, match="trusted must be a list of references"):
        FineTunedCNNClassifier.load(saved[1], trusted=trusted)


def test_a_local_builder_is_not_saved_until_registered_again(nets, images, tmp_path):
    nets.register(lambda: nets.Net())
    fitted, path = fit(images), tmp_path / "model.safetensors"
    with pytest.raises(TypeError, match="Define it at the top level of a module"):
        fitted.save(path)
    assert not path.exists()
    nets.register(nets.build)
    fitted.save(path)


def test_the_registration_of_the_fit_is_saved(nets, images, tmp_path):
    nets.register(nets.build)
    fitted, path = fit(images), tmp_path / "model.safetensors"
    nets.register(nets.Net)
    fitted.save(path)
    assert read_tensors(path)[1]["registration"]["builder"] == REFERENCE


def test_other_files_need_no_registration(nets, images, tmp_path):
    path = tmp_path / "model.safetensors"
    nets.register(lambda: nets.Net())  # not that of the file
    FineTunedCNNClassifier(
        "resnet_mini", max_epochs=0, trainable="head", head_init="random", lr=1e-3
    ).fit(images[:8], np.arange(8) % 2).save(path)
    assert read_tensors(path)[1]["registration"] is None
    FineTunedCNNClassifier.load(path)


def test_a_file_without_reference_needs_the_registration(saved, nets):
    _, path = saved
    tensors, document = read_tensors(path)
    del document["registration"]  # as in files of previous versions
    write_tensors(path, tensors, document)
    with pytest.raises(ValueError, match="There is no backbone 'net'"):
        FineTunedCNNClassifier.load(path, trusted=[REFERENCE])
    nets.register(nets.build)
    FineTunedCNNClassifier.load(path)
