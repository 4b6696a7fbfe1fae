"""Tests of sktl._backbones.hub, against a local server of the hub's calls."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hub_server import COMMIT, HubServer, serving

from sktl._backbones.hub import fetch_hub_file
from sktl._backbones.weights import load_weights

pytest.importorskip("huggingface_hub")
from huggingface_hub import constants, file_download

_REPOSITORY, _NAME = "timm/test_net.a1", "model.safetensors"
_KEY = (_REPOSITORY, _NAME)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Serve a weights file, to an empty cache ``tmp_path / "cache"``."""
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        server.files[_KEY] = safetensors.torch.save({"weight": torch.arange(5000.0)})
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        # The client waits for seconds between its attempts.
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


def _fetch(revision: str | None = None) -> Path:
    return fetch_hub_file(_REPOSITORY, _NAME, revision, progress=False)


def _files(folder: Path) -> set[tuple[str, int, int]]:
    return {
        (str(path), path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if not path.is_dir()
    }


def _complete_files(folder: Path) -> list[Path]:
    """List all weights files, and links to them, that have their final name."""
    return [
        path
        for path in folder.rglob("*")
        if path.name == _NAME or (path.parent.name == "blobs" and not path.suffix)
    ]


def test_a_file_is_downloaded_once(
    hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = _fetch()
    assert path.name == _NAME
    assert tmp_path / "cache" in path.parents
    assert path.read_bytes() == hub.files[_KEY]
    weights = load_weights(path)
    assert torch.equal(weights.state_dicts[""]["weight"], torch.arange(5000.0))
    assert capfd.readouterr() == ("", "")
    n_requests, files = len(hub.requests), _files(tmp_path / "cache")
    assert _fetch() == path
    assert len(hub.requests) == n_requests == 2
    assert _files(tmp_path / "cache") == files


def test_a_revision_is_pinned(hub: HubServer) -> None:
    hub.revisions.add("v1")
    path = _fetch("v1")
    assert all("/resolve/v1/" in request for request in hub.requests)
    assert _fetch(COMMIT) == path
    assert len(hub.requests) == 2
    with pytest.raises(ConnectionError, match="has no such revision"):
        _fetch("v2")


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        ((403, "GatedRepo"), "accept their terms .* HF_TOKEN"),
        ((401, "RepoNotFound"), "no such repository, or it is private"),
        ((404, "EntryNotFound"), "has no such file"),
        ((503, ""), "503"),
    ],
)
def test_refused_files_raise(
    hub: HubServer, tmp_path: Path, refused: tuple[int, str], reason: str
) -> None:
    hub.refused[_REPOSITORY] = refused
    with pytest.raises(ConnectionError, match=reason) as caught:
        _fetch()
    address = f"{hub.address}/{_REPOSITORY}/resolve/main/{_NAME}"
    for part in (_NAME, _REPOSITORY, address, str(tmp_path / "cache")):
        assert part in str(caught.value)
    assert len(str(caught.value)) < 900
    assert not list(tmp_path.rglob(_NAME)) or refused[0] == 404  # marked as missing


def test_without_a_connection_the_error_has_address_and_folder(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.shutdown()
    hub.server_close()
    # Some versions of the client say only that they have closed their connections.
    with pytest.raises(ConnectionError, match=r"Connection refused|closed") as caught:
        _fetch()
    for part in (hub.address, str(tmp_path / "cache"), f"weights='path/to/{_NAME}'"):
        assert part in str(caught.value)


def test_offline_mode_requests_nothing(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="offline mode") as caught:
        _fetch()
    assert str(tmp_path / "cache") in str(caught.value)
    assert hub.requests == []


def test_a_download_that_breaks_off_is_resumed(hub: HubServer) -> None:
    hub.max_bytes = 8000  # each response is cut off, but brings more
    paths = []
    for _ in range(4):
        with contextlib.suppress(ConnectionError):  # some versions resume later
            paths.append(_fetch())
    assert paths[-1].read_bytes() == hub.files[_KEY]
    assert sum(request.startswith("GET") for request in hub.requests) > 2


def test_a_server_that_dies_leaves_nothing_that_is_used(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.max_bytes, hub.dies = 8000, True
    for _ in range(2):
        with pytest.raises(ConnectionError, match="could not be downloaded"):
            _fetch()
    assert _complete_files(tmp_path / "cache") == []


def test_other_content_raises_until_it_is_deleted(hub: HubServer) -> None:
    content = hub.files[_KEY]
    hub.promised[_KEY] = hashlib.sha256(content).hexdigest()
    hub.files[_KEY] = content[:-1] + b"\1"
    path = _fetch()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"is damaged .* delete it") as caught:
            load_weights(path)
    blob = path.resolve()
    assert str(blob) in str(caught.value)
    hub.files[_KEY] = content
    blob.unlink()
    assert len(load_weights(_fetch()).state_dicts[""]) == 1


def test_damage_in_the_cache_is_detected(hub: HubServer) -> None:
    path = _fetch()
    load_weights(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.resolve().write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(_fetch())


def test_a_full_disk_raises(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(path: str) -> SimpleNamespace:
        return SimpleNamespace(free=10**9)

    class Full:
        def write(self, chunk: bytes) -> int:
            raise OSError(28, "No space left on device")

    original = file_download.http_get
    monkeypatch.setattr(
        file_download,
        "http_get",
        lambda url, file, **options: original(url, Full(), **options),
    )
    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(ConnectionError, match="No space left on device"):
        _fetch()
    assert _complete_files(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_raises(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    if os.access(tmp_path / "cache", os.W_OK):
        pytest.skip("requires a user who cannot write to every folder")
    with pytest.raises(ConnectionError, match="Permission denied"):
        _fetch()


def test_threads_share_one_download(hub: HubServer) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: _fetch(), range(4)))
    assert len(paths) == 1
    assert sum(request.startswith("GET") for request in hub.requests) == 1


def test_without_the_client_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'sktl\[timm\]'"):
        _fetch()


_USE_WITHOUT_A_NETWORK = """
import os, pathlib, sys, time
from sktl._backbones.hub import fetch_hub_file
from sktl._backbones.weights import load_weights
start = time.monotonic()
path = fetch_hub_file("timm/test_net.a1", "model.safetensors", None, progress=False)
print(load_weights(path).digest, time.monotonic() - start < 2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["writing", "offline", "both"])
def test_a_cache_is_used_without_network_and_without_writing(
    hub: HubServer, tmp_path: Path, missing: str
) -> None:
    path = _fetch()
    hub.shutdown()
    hub.server_close()
    cache = tmp_path / "cache"
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_ENDPOINT": hub.address}
    if missing != "writing":
        environment["HF_HUB_OFFLINE"] = "1"
    if missing != "offline":
        subprocess.run(["chmod", "-R", "a-w", str(cache)], check=True)
    before = _files(cache)
    run = subprocess.run(
        [sys.executable, "-c", _USE_WITHOUT_A_NETWORK],
        env=environment,
        capture_output=True,
        text=True,
    )
    subprocess.run(["chmod", "-R", "u+w", str(cache)], check=True)
    assert run.stdout.split() == [path.resolve().name, "True"], run.stderr
    assert _files(cache) == before
