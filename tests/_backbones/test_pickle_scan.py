"""Tests of sktl._backbones.pickle_scan."""

import argparse
import pickle
import subprocess
import sys
import zipfile
from collections import Counter

import pytest
import torch
from shared_fixtures import TinyNet
from torch import nn

from sktl._backbones.pickle_scan import scan_pickle
from sktl._backbones.weights import load_weights, load_weights_into

DEEP = b")" + b"\x85" * 1_000_000
LARGE = b"\x8a\x06\0\0\0\0\0\x10\x85"  # (2**44,)
REFUSED = {
    "deep": (b"})" + b"\x85" * 101 + b"K\x01s.", "tuples nested"),
    "deep by memo": (b")q\0" + b"h\0h\0\x86q\0" * 101 + b".", "tuples nested"),
    "deep by calls": (b"ctorch\nSize\n" * 101 + b")" + b"\x85R" * 101 + b".", "tuples"),
    "bytearray": (b"c__builtin__\nbytearray\n" + LARGE + b"R.", "GLOBAL __builtin__"),
    "storage": (b"ctorch\nFloatStorage\n" + LARGE + b"R.", "GLOBAL torch.FloatSt"),
    "code": (b"cos\nsystem\nU\x04true\x85R.", "GLOBAL os.system"),
    "code by memo": (b"cos\nsystem\nq\0h\0)R.", "GLOBAL os.system"),
    "no name": (b"K\x01)R.", "GLOBAL 0"),
    "new object": (b"ctorch\nFloatTensor\n)\x81.", "GLOBAL torch.FloatT"),
    "state of a tensor": (b"ctorch._utils\n_rebuild_tensor\n)R)b.", "the state"),
    "state of a name": (b"ccollections\nOrderedDict\n}b.", "the state"),
    "beyond the mark": (b"K\x01(\x85.", "more than the stack"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rejects(name):
    code, words = REFUSED[name]
    with pytest.raises(pickle.UnpicklingError, match=words):
        scan_pickle(code)


def zipped(path, code):
    """Put a pickle where torch.save puts it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_accepts_files_of_training_scripts(tmp_path, zipped):
    network, path = TinyNet(), tmp_path / "training.pth"
    state, optimizer = network.state_dict(), torch.optim.AdamW(network.parameters())
    state["stages.stem.0.weight"] = network.stages["stem"][0].weight  # a Parameter
    optimizer.step(lambda: sum(p.sum() for p in network.parameters()).backward())
    rest = {"set": {1, 2}, "counter": Counter([3]), "nested": [[(1, (2.5, None, 1j))]]}
    rest |= {"size": torch.Size([3]), "type": torch.float16, "on": torch.device("cpu")}
    saved = {"model": state, "optimizer": optimizer.state_dict(), "rest": rest, 2: True}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    loaded = load_weights(path).state_dicts["['model']"]
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("beside", [argparse.Namespace(lr=0.1), nn.Linear(2, 2)])
def test_an_error_names_the_class_in_the_file(tmp_path, beside):
    path, name = tmp_path / "training.pth", type(beside).__qualname__
    torch.save({"model": TinyNet().state_dict(), "beside": beside}, path)
    with pytest.raises(ValueError, match=rf"calls \S+\.{name}, which is code"):
        load_weights(path)


@pytest.mark.slow
def test_nested_tuples_do_not_crash_the_process(tmp_path):
    path = zipped(tmp_path / "deep.pth", b"}" + DEEP + b"K\x01s.")
    code = (
        f"from sktl._backbones.weights import load_weights; load_weights({str(path)!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "ValueError: A weights file must contain only weights" in run.stderr


@pytest.mark.parametrize("attribute", ["items", "get", "keys", "_metadata"])
def test_attributes_of_a_state_dict_are_ignored(tmp_path, attribute):
    state, path = TinyNet().state_dict(), tmp_path / "weights.pth"
    other = attribute.upper()  # under its name torch.save would fail
    setattr(state, other, {"head": 3})
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(other.encode(), attribute.encode()))
    loaded, network = load_weights(path).state_dicts[""], TinyNet()
    load_weights_into(network, loaded, "It")
    expected = state.items()
    assert all(torch.equal(network.state_dict()[name], v) for name, v in expected)


def test_a_tensor_that_claims_a_large_shape_is_not_allocated(tmp_path):
    state = TinyNet().state_dict()
    state["head.2.bias"] = torch.zeros(1, dtype=torch.float16).expand(2**50)
    torch.save(state, tmp_path / "weights.pth")
    loaded = load_weights(tmp_path / "weights.pth").state_dicts[""]
    with pytest.raises(ValueError, match=r"another shape .head.2.bias"):
        load_weights_into(TinyNet(), loaded, "It")


def test_numbers_of_a_type_that_cannot_be_converted(tmp_path):
    state = TinyNet().state_dict()
    state["head.2.bias"] = torch.empty(5, dtype=torch.bits8)
    with pytest.raises(ValueError, match=r"It: head.2.bias has torch.bits8"):
        load_weights_into(TinyNet(), state, "It")
