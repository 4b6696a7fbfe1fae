"""Files are read as they were written, bit for bit; any other file raises."""

import contextlib
import errno
import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from sktl._utils.tensor_file import (
    _digest,
    read_document,
    read_tensors,
    write_tensors,
)

DOCUMENT = {"words": ["ä", None, True], "number": 0.1, "deeper": {"a": [1, {}]}}


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    one = torch.randn(3, 4)
    return {
        "scalar": torch.tensor(7),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "one": one,
        "one again": one,
        "slice of one": one[:, 1:3],
        "transposed": one.t(),
        "every second": torch.arange(9)[::2],
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


@pytest.fixture
def file(tmp_path, tensors):
    write_tensors(tmp_path / "net.safetensors", tensors, DOCUMENT)
    return tmp_path / "net.safetensors"


def check_raises(path):
    with pytest.raises(ValueError, match=r"net\.safetensors.*Nothing in it was"):
        read_tensors(path)


def test_what_was_written_is_read(file, tensors):
    read, document = read_tensors(str(file))
    assert document == DOCUMENT
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)
    assert len({t.data_ptr() for t in read.values() if t.numel()}) == 8


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "complex64",
        "int64",
        "uint8",
        "bool",
    ],
)
def test_each_dtype_keeps_its_bits(tmp_path, dtype):
    tensor = (torch.randn(3, 5) * 9).abs().to(getattr(torch, dtype))
    write_tensors(tmp_path / "a", {"x": tensor}, {})
    read = read_tensors(tmp_path / "a")[0]["x"]
    assert read.dtype == tensor.dtype
    assert torch.equal(read, tensor)


def test_special_values_keep_their_bits(tmp_path):
    tensor = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    write_tensors(tmp_path / "a", {"x": tensor}, {"x": float("inf")})
    read, document = read_tensors(tmp_path / "a")
    assert torch.equal(read["x"].view(torch.int32), tensor.view(torch.int32))
    assert document == {"x": float("inf")}


def test_empty_file(tmp_path):
    write_tensors(tmp_path / "a", {}, {})
    assert read_tensors(tmp_path / "a") == ({}, {})


def test_it_is_a_safetensors_file(file, tensors):
    read = load_file(file)
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["sktl"]) == DOCUMENT


def test_file_does_not_depend_on_the_order_of_mappings(file, tensors):
    def sha256():
        with safe_open(file, "pt") as opened:
            return opened.metadata()["sktl_sha256"]

    before = sha256()
    write_tensors(
        file, dict(reversed(tensors.items())), dict(reversed(DOCUMENT.items()))
    )
    assert sha256() == before
    assert os.listdir(file.parent) == [file.name]


def test_flipped_bits_raise(tmp_path):
    file = tmp_path / "net.safetensors"
    tensors = {
        "w": torch.ones(2, 3),
        "n": torch.tensor(3),
        "half": torch.ones(2).half(),
    }
    write_tensors(file, tensors, {"a": 'x"'})
    whole = file.read_bytes()
    assert len(whole) < 600
    for offset in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[offset] ^= 1 << bit
            file.write_bytes(damaged)
            check_raises(file)


def test_document_of_a_damaged_file(file):
    whole = bytearray(file.read_bytes())
    length = int.from_bytes(whole[:8], "little")
    for position in range(8, 8 + length):
        whole[position] ^= 0x10
        file.write_bytes(whole)
        whole[position] ^= 0x10
        try:
            load_file(file)
        except (SafetensorError, UnicodeDecodeError):
            continue  # no library reads it
        with contextlib.suppress(ValueError):
            assert read_document(file) is not None


def test_wrong_length_raises(file):
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        check_raises(file)
    for more in (b"\0", b" ", whole):
        file.write_bytes(whole + more)
        check_raises(file)


def test_consistent_changes_raise(file, tensors):
    _, document = read_tensors(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    changed = {**load_file(file), "one": torch.zeros(3, 4)}
    save_file(changed, file, metadata)
    check_raises(file)
    text = json.dumps({**document, "number": 0.2}, sort_keys=True)
    save_file(load_file(file), file, {**metadata, "sktl": text})
    check_raises(file)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):  # noqa: D105
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch", "torch_without_zip"])
def test_a_pickle_is_not_executed(tmp_path, how):
    file, touched = tmp_path / "net.safetensors", tmp_path / "touched"
    if how == "pickle":
        file.write_bytes(pickle.dumps(Attack(touched)))
    else:
        torch.save(Attack(touched), file, _use_new_zipfile_serialization=how == "torch")
    check_raises(file)
    assert not touched.exists()
    # The attack works if the file is unpickled.
    content = io.BytesIO(file.read_bytes())
    pickle.load(content) if how == "pickle" else torch.load(content, weights_only=False)
    assert touched.exists()


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"sktl": "{}"},
        {"sktl": "{}", "sktl_sha256": "0" * 64},
        {"sktl_sha256": "0" * 64},
    ],
)
def test_other_safetensors_files_raise(tmp_path, metadata):
    file = tmp_path / "net.safetensors"
    save_file({"w": torch.ones(2)}, file, metadata)
    check_raises(file)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 10**5, '{"a": ' * 10**5])
def test_invalid_document_raises(tmp_path, text):
    file = tmp_path / "net.safetensors"
    metadata = {"sktl": text, "sktl_sha256": _digest({}, text)}
    file.write_bytes(save({}, metadata=metadata))
    check_raises(file)


@pytest.mark.parametrize("length", [0, 2**20, 2**63, 2**64 - 1])
def test_invalid_header_length_raises(tmp_path, length):
    file = tmp_path / "net.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}")
    check_raises(file)


def test_unreadable_tensor_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none")
    with pytest.raises(OSError, match=str(tmp_path)):
        read_tensors(tmp_path)


@pytest.mark.parametrize("document", [{"a": {1, 2}}, {"a": b""}, {"a": object()}])
def test_unserializable_document_raises(file, document):
    before = file.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_tensors(file, {}, document)
    assert file.read_bytes() == before


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_failed_write_of_tensors_leaves_old_file(file, monkeypatch, at):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(*((os, at) if at == "fsync" else (Path, at)), full)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(file, {"w": torch.ones(2)}, {})
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_full_disk_leaves_old_file(file):
    resource = pytest.importorskip("resource")
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors(file, {"w": torch.ones(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]
