"""Weights files: download, verify and read them, and load them into a network.

Unpickling can execute any code, so ``.pth`` files are read only by torch's restricted
unpickler; ``.safetensors`` files contain no code. torchvision writes the first digits
of the sha256 of a file into its name, and checks them once, after the download. The
cache of the Hugging Face Hub consists of links to files whose name is their sha256, and
does not check it. Here both are checked each time the file is read, which also detects
a file that was damaged or replaced on disk.
"""

import hashlib
import os
import re
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from io import BufferedReader
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sktl._backbones.pickle_scan import scan_pickle
from sktl._backbones.unwrap import (
    CONTAINERS,
    SUFFIXES,
    StateDict,
    describe_mismatch,
    find_state_dicts,
)
from sktl._utils.keyed_cache import KeyedCache
from sktl._utils.tensor_file import parse_tensors, read_document

# The sha256 of torchvision's resnet18-f37072fd.pth begins with f37072fd.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")
_HASH = re.compile(r"[0-9a-f]{64}")

# Longer than the resolution of time stamps on Linux, macOS and Windows.
_TICK_NS = 100_000_000
# Digests by path, size, times and inode: hashing a file of 1 GB takes a second.
_digests: dict[tuple[str, int, int, int, int], str] = {}
_MAX_DIGESTS = 1024
# Caches nothing: threads that need the same file wait for one download.
_downloads: KeyedCache[str, None] = KeyedCache(max_size=0)


@dataclass(frozen=True, eq=False)
class Weights:
    """The content of a weights file.

    Attributes
    ----------
    state_dicts : dict of str to dict of str to Tensor
        The state dicts, on the CPU, by their place in the file, as from
        `find_state_dicts`.
    digest : str
        sha256 of the file, 64 hexadecimal digits.
    """

    state_dicts: dict[str, StateDict]
    digest: str


def load_weights(path: str | PathLike[str]) -> Weights:
    """Read the state dicts in a file, without executing anything in it.

    Parameters
    ----------
    path : str or path-like
        A file of ``torch.save(network.state_dict(), path)``, or a ``.safetensors``
        file, with a name that ends in one of `SUFFIXES`; or a file of `write_tensors`.
        The state dict may be the value of a key such as ``"state_dict"``, see
        `sktl._backbones.unwrap`.

    Returns
    -------
    Weights
        The tensors and the digest of the file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a regular file, has another suffix or another digest than its
        name, cannot be read without executing code, or contains no state dict.
    """
    path = Path(_regular_file(path)[0])
    is_own_file = read_document(path) is not None
    if not is_own_file and not path.name.endswith(SUFFIXES):
        raise ValueError(
            f"Weights must be a file that ends in {', '.join(SUFFIXES)}. Got "
            f"{str(path)!r}. Save a network with torch.save(network.state_dict(), "
            "'name.pth')."
        )
    # One handle for both, so that the verified content is the one that is read.
    with path.open("rb") as file:
        digest = _verified_digest(file, str(path))
        file.seek(0)
        if is_own_file:  # which has a sha256 of its tensors
            loaded, _ = parse_tensors(file.read(), str(path))
        else:
            loaded = _read_tensors(file, path)
    state_dicts = find_state_dicts(loaded)
    _check_found(state_dicts, loaded, path)
    return Weights(state_dicts, digest)


def file_digest(path: str | PathLike[str]) -> str:
    """Return the sha256 of a weights file, from the cache if it has not changed.

    Parameters
    ----------
    path : str or path-like
        A regular file.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a regular file or its name has another digest.
    """
    name, status = _regular_file(path)
    known = _digests.get(_signature(status, name))
    if known is not None:
        return known
    with open(name, "rb") as file:
        return _verified_digest(file, name)


def fetch_weights(url: str, *, progress: bool) -> Path:
    """Return the local copy of a weights file; download it if it is missing.

    As with torchvision, the copy is in the folder ``checkpoints`` of
    ``torch.hub.get_dir()``. It gets its name when it is complete and verified. Threads
    wait only for the same file.

    Parameters
    ----------
    url : str
        Address of the file; its name contains the first digits of its sha256.
    progress : bool
        Whether to show a progress bar of the download.

    Returns
    -------
    Path
        The local file.

    Raises
    ------
    ConnectionError
        If the file cannot be downloaded.
    ValueError
        If the digest of the downloaded file is not the one in its name.
    """
    name = Path(urlparse(url).path).name
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / name
    if not path.exists():
        _downloads.get_or_create(str(path), partial(_download, url, path, progress))
    return path


def _download(url: str, path: Path, progress: bool) -> None:
    if path.exists():  # by another thread
        return
    folder, name = path.parent, path.name
    promised = _HASH_IN_NAME.search(name)
    prefix = promised.group(1) if promised else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), prefix, progress=progress)
    except (OSError, HTTPException) as error:  # of the network, or of the folder
        raise ConnectionError(
            f"The weights {name!r} are not on this machine and could not be downloaded "
            f"from {url}: {error}. Download the file on another machine and put "
            f"it into {str(folder)!r}, or pass weights='path/to/{name}'. The bundled "
            "backbone 'resnet_mini' needs no network connection."
        ) from error
    except RuntimeError as error:
        # torch.hub has no type of its own for this, and has removed the file.
        raise ValueError(
            f"The sha256 of the file downloaded from {url} must begin as its name "
            f"says: {error}. The file was deleted. Try again, or download it in "
            f"another way and pass weights='path/to/{name}'."
        ) from error


_RANDOM_FILLS: set[Callable[..., Tensor]] = {
    *(Tensor.normal_, Tensor.uniform_),
    *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_),
}
_RANDOM_FACTORIES = {torch.randn, torch.rand}


class skip_weight_allocation(TorchFunctionMode):
    """Build a network without memory for its parameters inside this context.

    ``torch.empty``, with which layers create their parameters, returns tensors on the
    meta device; initializing them takes no time (otherwise 3.5 s for VGG-16 on one
    core). No random numbers are drawn, also not for the parameters that a Swin
    transformer creates with ``torch.zeros``. Unlike with ``torch.device("meta")``,
    constants that a network computes, such as the widths of a RegNet, keep their
    values.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, but without random values, and on the meta device."""
        kwargs = kwargs or {}
        if func in _RANDOM_FILLS:
            return args[0] if args else kwargs["tensor"]  # as torch.nn.init passes it
        is_random = func in _RANDOM_FACTORIES
        if (is_random or func is torch.empty) and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def load_weights_into(
    network: nn.Module, state_dict: dict[str, Tensor], origin: str
) -> None:
    """Load a state dict into a network, converted to the data types of the network.

    Parameters
    ----------
    network : Module
        Also one that was built inside `skip_weight_allocation`. The tensors of
        `state_dict` become its parameters; a parameter with several names stays one.
        After an error its state is undefined.
    state_dict : dict of str to Tensor
        All tensors of the network.
    origin : str
        Description of the state dict in the error message.

    Raises
    ------
    ValueError
        If names or shapes do not match the network.
    """
    own = network.state_dict(keep_vars=True)
    filling: Any = OrderedDict()
    shared: dict[int, nn.Parameter] = {}
    different: list[str] = []
    for name, tensor in state_dict.items():
        # Converted only if its shape is valid: the header of a small file may declare
        # a huge tensor.
        if name in own and own[name].shape == tensor.shape:
            tensor = _converted(tensor, own[name].dtype, f"{origin}: {name}")
            if isinstance(own[name], nn.Parameter):
                known = shared.get(id(own[name]))
                if known is None:
                    known = nn.Parameter(tensor, own[name].requires_grad)
                    shared[id(own[name])] = known
                elif not torch.equal(known, tensor):
                    different.append(f"{name}: not equal to another name of it")
                tensor = known
        filling[name] = tensor
    # torch.save stores the version of each layer, safetensors does not, and MNASNet
    # requires its own.
    unversioned = {"": {"version": network._version}}
    filling._metadata = getattr(state_dict, "_metadata", unversioned)
    try:
        keys = network.load_state_dict(filling, strict=False, assign=True)
        wrong = describe_mismatch(keys.missing_keys, keys.unexpected_keys, different)
    except RuntimeError as error:
        wrong = describe_mismatch(
            [name for name in own if name not in filling],
            [name for name in filling if name not in own],
            [
                f"{name}: {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
                for name, tensor in filling.items()
                if name in own and own[name].shape != tensor.shape
            ],
        )
        wrong = wrong or str(error).splitlines()[-1].strip()
    if wrong:
        raise ValueError(
            "Weights must have the names and shapes of the network. "
            f"{origin} have other tensors: {wrong}. Check that they were saved from "
            "this architecture."
        )


def changed_while_read(file: str | PathLike[str]) -> ValueError:
    """Return the error to raise if a file was replaced while it was read."""
    return ValueError(
        f"The weights {os.fspath(file)!r} must not change while they are read, but "
        "they did. Wait until the file is written, and try again."
    )


def _converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    try:
        return tensor.to(dtype)
    except RuntimeError as error:  # some types of a few bits cannot be converted
        raise ValueError(
            f"Weights must be of a data type that can be converted to {dtype}. {name} "
            f"has {tensor.dtype}. Check that they were saved from this architecture."
        ) from error


def _regular_file(path: str | PathLike[str]) -> tuple[str, os.stat_result]:
    """Return the expanded path and the status of a file; raise if it is not one."""
    name = os.path.expanduser(path)
    try:
        status = os.stat(name)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no weights file {name!r}. Check the path; a relative one starts "
            f"from {os.getcwd()!r}."
        ) from error
    # Opening a pipe would block until there is a writer.
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"Weights must be a regular file. Got {name!r}, which is "
            f"{'a folder' if stat.S_ISDIR(status.st_mode) else 'not one'}."
        )
    return name, status


def _signature(status: os.stat_result, name: str) -> tuple[str, int, int, int, int]:
    return (
        os.path.join(os.getcwd(), name),
        status.st_size,
        status.st_mtime_ns,
        # Cannot be set, unlike the modification time (but on Windows this is the
        # creation time).
        status.st_ctime_ns,
        status.st_ino,
    )


def _verified_digest(file: BufferedReader, name: str) -> str:
    signature = _signature(os.fstat(file.fileno()), name)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    name, promised = _promised_digest(name)
    if not digest.startswith(promised):
        raise ValueError(
            f"The sha256 of a weights file must begin as its name says. The name of "
            f"{name!r} says {promised}, its sha256 is {digest}: the file is "
            "damaged or was changed. If it was downloaded, delete it and it will be "
            "downloaded again; if those digits are not a hash, rename the file."
        )
    # A second change within the resolution of the clock would not change the signature,
    # so the digest of a file that was just changed is not cached.
    if time.time_ns() - max(signature[2:4]) > _TICK_NS:
        if len(_digests) >= _MAX_DIGESTS:
            _digests.clear()
        _digests[signature] = digest
    return digest


def _promised_digest(name: str) -> tuple[str, str]:
    """Return the file whose name has a sha256, and its first digits, maybe none."""
    if os.path.islink(name):
        target = os.path.join(os.path.dirname(name), os.readlink(name))
        folder, blob = os.path.split(os.path.normpath(target))
        if os.path.basename(folder) == "blobs" and _HASH.fullmatch(blob):
            return os.path.join(folder, blob), blob
    promised = _HASH_IN_NAME.search(os.path.basename(name))
    return name, promised.group(1) if promised else ""


def _read_tensors(file: BufferedReader, path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load(file.read())
        except SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} is not a valid safetensors file: {error}. Download or "
                "save it again."
            ) from error
    try:
        _check_pickles(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    # Broad on purpose: a damaged pickle can raise an exception of any type.
    except Exception as error:
        # The message of torch is long, and advises to execute the code in the file.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            reason = f"it calls {code.group(1)}, which is code"
            advice = (
                "If you trust its source, save the state dict alone, such as "
                "torch.save(torch.load('name.pth', weights_only=False)['state_dict'], "
                "'weights.pth')."
            )
        else:
            reason = f"it is damaged, or not a file of torch ({type(error).__name__})"
            advice = "Download or save it again."
        raise ValueError(
            f"A weights file must contain only weights. Got {str(path)!r}: "
            f"{reason}. Nothing in it was executed. {advice}"
        ) from error


def _check_pickles(file: BufferedReader) -> None:
    """Scan the pickles that torch will read, found in the same way as in torch."""
    zipped = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if zipped:
        scan_pickle(torch._C.PyTorchFileReader(file).get_record("data.pkl"))
    else:
        # The format before zip files: a magic number, the version, the system, the
        # saved object, and the names of the storages, whose bytes follow.
        for _ in range(5):
            scan_pickle(file)
    file.seek(0)


def _check_found(state_dicts: dict[str, StateDict], content: Any, path: Path) -> None:
    """Raise if a file has no state dict."""
    if state_dicts:
        return
    found = f"a {type(content).__name__}"
    if isinstance(content, dict):
        shown = ", ".join(repr(key) for key in [*dict.keys(content)][:5])
        found = f"{len(content)} keys: {shown or 'none'}"
    raise ValueError(
        "A weights file must contain a state dict, itself or as the value of one "
        f"of {', '.join(map(repr, CONTAINERS))}. {str(path)!r} contains {found}. Save "
        "it with torch.save(network.state_dict(), 'name.pth')."
    )
