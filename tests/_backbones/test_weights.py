"""Tests of sktl._backbones.weights."""

import hashlib
import os
import pickle
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision import models

from sktl._backbones import weights as weights_module
from sktl._backbones.weights import (
    fetch_weights,
    file_digest,
    load_weights,
    load_weights_into,
    skip_weight_allocation,
)
from sktl._utils.tensor_file import state_dict_digest


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Leave stderr to the tests."""


@pytest.fixture
def server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Path]]:
    """Serve a folder; give its address and the folder."""
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", folder
        http.shutdown()
        thread.join()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """Give the folder into which torch.hub downloads."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(3, 2)


def _named_by_hash(folder: Path, stem: str, content: bytes) -> Path:
    digest = hashlib.sha256(content).hexdigest()
    path = folder / f"{stem}-{digest[:8]}.pth"
    path.write_bytes(content)
    return path


def _saved(layer: nn.Module, path: Path) -> bytes:
    torch.save(layer.state_dict(), path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_saved_weights_are_loaded(
    tmp_path: Path, layer: nn.Linear, suffix: str
) -> None:
    path = tmp_path / f"net{suffix}"
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(layer.state_dict(), path)

    weights = load_weights(str(path))

    assert set(weights.state_dicts[""]) == {"weight", "bias"}
    assert torch.equal(weights.state_dicts[""]["weight"], layer.weight)
    assert weights.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert weights.digest == file_digest(path)


@pytest.mark.parametrize("suffix", [".pth.tar", ".ckpt", ".bin"])
def test_files_of_training_scripts_are_read(
    tmp_path: Path, layer: nn.Linear, suffix: str
) -> None:
    path = tmp_path / f"checkpoint{suffix}"
    content = {"state_dict": layer.state_dict(), "epoch": 3, "arch": "linear"}
    torch.save(content, path)
    ((place, loaded),) = load_weights(path).state_dicts.items()
    assert place == "['state_dict']"
    assert torch.equal(loaded["bias"], layer.bias)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "lr": 0.1}, "2 keys: 'epoch', 'lr'"),
        ({}, "0 keys: none"),
        ([torch.zeros(1)], "a list"),
        ({0: torch.zeros(1)}, "1 keys: 0"),
    ],
)
def test_other_content_raises(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=f"contains {found}"):
        load_weights(tmp_path / "net.pth")


class _Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_executed(tmp_path: Path) -> None:
    path, touched = tmp_path / "net.pth", tmp_path / "touched"
    torch.save({"weight": _Attack(touched)}, path)
    with pytest.raises(ValueError, match=r"net\.pth.* Nothing in it was executed"):
        load_weights(path)
    assert not touched.exists()
    # The attack does work on whoever unpickles without looking.
    pickle.loads(pickle.dumps(_Attack(touched)))
    assert touched.exists()


def test_tar_files_of_the_first_torch_raise(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "tar.pth", "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            (tmp_path / name).write_bytes(b"")
            tar.add(tmp_path / name, name)
    with pytest.raises(ValueError, match=r"tar\.pth': it is damaged"):
        load_weights(tmp_path / "tar.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 300])
def test_a_truncated_file_raises(
    tmp_path: Path, layer: nn.Linear, suffix: str, kept: int
) -> None:
    path = tmp_path / f"net{suffix}"
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save({"weight": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"net\{suffix}"):
        load_weights(path)


def test_verifies_the_name_at_every_load(tmp_path: Path, layer: nn.Linear) -> None:
    path = _named_by_hash(tmp_path, "net", _saved(layer, tmp_path / "net.pth"))
    assert torch.equal(load_weights(path).state_dicts[""]["bias"], layer.bias)

    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)

    for read in (load_weights, file_digest):
        with pytest.raises(
            ValueError, match="delete it and it will be downloaded again"
        ):
            read(path)


@pytest.mark.parametrize("stem", ["net-imagenet", "net-1234567", "net-20240101x", "a"])
def test_a_name_without_a_hash_is_not_verified(
    tmp_path: Path, layer: nn.Linear, stem: str
) -> None:
    _saved(layer, tmp_path / f"{stem}.pth")
    assert len(load_weights(tmp_path / f"{stem}.pth").state_dicts[""]) == 2


def test_other_files_raise(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights file .*net\.pth"):
        load_weights(tmp_path / "net.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ValueError, match=r"regular file.* a folder"):
        load_weights(tmp_path / "folder.pth")
    (tmp_path / "net.h5").touch()
    with pytest.raises(ValueError, match=r"ends in \.pth.*net\.h5"):
        load_weights(tmp_path / "net.h5")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(ValueError, match="regular file"):
        load_weights(tmp_path / "pipe.pth")


def test_digest_is_cached_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(b"a" * 1000)
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    time.sleep(0.15)
    first = file_digest(path)
    assert first == hashlib.sha256(b"a" * 1000).hexdigest()
    with monkeypatch.context() as without_reading:
        without_reading.delattr(hashlib, "file_digest")
        assert file_digest(path) == first
    # Equal size, and the time of modification put back.
    path.write_bytes(b"b" * 1000)
    os.utime(path, ns=times)
    assert file_digest(path) == hashlib.sha256(b"b" * 1000).hexdigest()


def test_the_cache_of_digests_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "_digests", {})
    monkeypatch.setattr(weights_module, "_MAX_DIGESTS", 3)
    monkeypatch.setattr(
        weights_module, "_TICK_NS", -(10**18)
    )  # all were there long ago
    for i in range(10):
        path = tmp_path / str(i)
        path.write_bytes(bytes([i]))
        assert file_digest(path) == hashlib.sha256(bytes([i])).hexdigest()
        assert 0 < len(weights_module._digests) <= 3


def test_digest_changes_with_a_file_that_changes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    for i in range(50):
        path.write_bytes(bytes([i]) * 1000)
        assert file_digest(path) == hashlib.sha256(bytes([i]) * 1000).hexdigest()


def test_downloads_once(
    server: tuple[str, Path],
    hub: Path,
    layer: nn.Linear,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, folder = server
    served = _named_by_hash(folder, "net", _saved(layer, tmp_path / "net.pth"))

    path = fetch_weights(f"{address}/{served.name}", progress=False)

    assert path == hub / served.name
    assert path.read_bytes() == served.read_bytes()
    served.unlink()
    assert fetch_weights(f"{address}/{served.name}", progress=False) == path
    assert capsys.readouterr() == ("", "")


def test_a_download_with_another_digest_is_deleted(
    server: tuple[str, Path], hub: Path
) -> None:
    address, folder = server
    (folder / "net-00000000.pth").write_bytes(b"something else")
    with pytest.raises(ValueError, match="The file was deleted"):
        fetch_weights(f"{address}/net-00000000.pth", progress=False)
    assert list(hub.iterdir()) == []


def test_a_failed_download_says_what_to_do(server: tuple[str, Path], hub: Path) -> None:
    gone = f"{server[0]}/net-00000000.pth"
    nobody = "http://127.0.0.1:9/net-00000000.pth"
    for url in (gone, nobody):
        with pytest.raises(ConnectionError, match="path/to/net-00000000") as caught:
            fetch_weights(url, progress=False)
        assert url in str(caught.value)
        assert str(hub) in str(caught.value)
        assert caught.value.__cause__ is not None
    assert list(hub.iterdir()) == []


def test_weights_are_loaded_into_a_network_without_values() -> None:
    before = torch.get_rng_state()
    with skip_weight_allocation():
        network = models.regnet_y_400mf()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in network.parameters())
    source = models.regnet_y_400mf()
    load_weights_into(network, source.state_dict(), "they")
    for name, value in source.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


def test_weights_are_converted_to_the_types_of_the_network(layer: nn.Linear) -> None:
    half = {name: value.half() for name, value in layer.state_dict().items()}
    network = nn.Linear(3, 2)
    load_weights_into(network, half, "they")
    assert network.weight.dtype == torch.float32
    assert torch.equal(network.weight, half["weight"].float())


def test_a_parameter_with_several_names_stays_one() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    state = {name: value + 1 for name, value in network.state_dict().items()}
    load_weights_into(network, state, "they")
    assert network[1].weight is network[0].weight
    assert network[1].bias is not network[0].bias
    assert torch.equal(network[1].weight, state["1.weight"])
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    "create",
    [
        lambda: nn.init.normal_(torch.zeros(3), std=2.0),
        lambda: nn.init.uniform_(torch.zeros(3)),
        lambda: nn.init.kaiming_uniform_(torch.zeros(3, 3)),
        lambda: nn.init.trunc_normal_(torch.zeros(3)),
        lambda: torch.zeros(3).normal_(),
        lambda: torch.randn(3) * 2,
        lambda: torch.rand(3),
    ],
)
def test_nothing_is_drawn_without_values(create: Callable[[], torch.Tensor]) -> None:
    before = torch.get_rng_state()
    with skip_weight_allocation():
        assert len(create()) == 3
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, "they have other tensors: 1 missing .bias."),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "c": torch.zeros(1)},
            "they have other tensors: 1 unexpected .c.",
        ),
        (
            {"weight": torch.zeros(4, 3), "bias": torch.zeros(2)},
            r"1 of another shape \(weight: \(4, 3\), not \(2, 3\)\)",
        ),
    ],
)
def test_mismatched_weights_raise(
    layer: nn.Linear, state: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_weights_into(layer, state, "they")


def test_errors_of_a_network_are_reported(layer: nn.Linear) -> None:
    class Strict(nn.Linear):
        def _load_from_state_dict(self, *arguments: list[str]) -> None:
            arguments[-1].append("no version 3")

    state = layer.state_dict()
    with pytest.raises(ValueError, match="they have other tensors: no version 3"):
        load_weights_into(Strict(3, 2), state, "they")


def test_names_of_one_parameter_need_one_value() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    state = {**network.state_dict(), "1.weight": torch.ones(3, 3)}
    with pytest.raises(ValueError, match=r"1\.weight: not equal to another name"):
        load_weights_into(network, state, "they")


def test_loads_an_mnasnet_without_version() -> None:
    source = models.mnasnet0_5()
    with skip_weight_allocation():
        network = models.mnasnet0_5()
    load_weights_into(network, dict(source.state_dict()), "they")
    assert torch.equal(network.layers[0].weight, source.layers[0].weight)


def test_content_digest_depends_on_names_types_shapes_and_bits() -> None:
    digests = set()
    for shape in [(2, 3), (3, 2)]:
        for dtype in (torch.float32, torch.float64):
            for number in (0, 1):
                layer = nn.Linear(*shape, dtype=dtype)
                nn.init.constant_(layer.weight, number)
                nn.init.zeros_(layer.bias)
                digests |= {
                    state_dict_digest(layer.state_dict()),
                    state_dict_digest(layer.state_dict()),
                }
                digests.add(state_dict_digest(nn.Sequential(layer).state_dict()))
    assert len(digests) == 16


def test_content_digest_of_one_number_is_that_of_the_number() -> None:
    number = torch.tensor(3.0)
    plain, spread = {"a": number.reshape(1)}, {"a": number.expand(1)}
    assert state_dict_digest(spread) == state_dict_digest(plain)


def test_threads_share_one_download(
    hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started, finish, downloads = threading.Event(), threading.Event(), []

    def download(url: str, path: str, prefix: str, *, progress: bool) -> None:
        downloads.append(url)
        if "slow" in url:
            started.set()
            assert finish.wait(30)
        Path(path).write_bytes(b"content")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    fetch = partial(fetch_weights, progress=False)
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(fetch, "http://a/slow.pth") for _ in range(2)]
        assert started.wait(30)
        assert fetch("http://a/quick.pth").exists()  # while the other waits
        finish.set()
        assert {each.result(30) for each in slow} == {hub / "slow.pth"}
    assert sorted(downloads) == ["http://a/quick.pth", "http://a/slow.pth"]
