"""Weights: fetched, verified, read without running them, and put into a network.

A pickle can run any code, so ``.pth`` files are read by torch's restricted unpickler
and by nothing else; ``.safetensors`` files hold no code at all. torchvision writes the
first digits of a file's sha256 into its name, and checks them once, on download; here
they are checked whenever the file is read, which also finds a file that was damaged
or exchanged on the disk.
"""

import hashlib
import os
import re
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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

SUFFIXES = (".pth", ".pt", ".safetensors")

# What a name promises: torchvision's resnet18-f37072fd.pth begins with f37072fd.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")

# Where training scripts put the state dict, what wrappers of a network put before each
# of its keys (DataParallel, torch.compile, AveragedModel), and what else is no part of
# it.
_KEYS_AROUND = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_N_AVERAGED = "n_averaged"

# Heads that only help training and that are left out of the networks here.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# Names that torchvision's DenseNets had before a dot in a name was forbidden.
_OLD_DENSE = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")

# Longer than the steps in which Linux, macOS and Windows stamp changes.
_TICK_NS = 100_000_000
# Digests by path, size, times and inode: reading a gigabyte to learn that it has not
# changed takes a second.
_digests: dict[tuple[str, int, int, int, int], str] = {}
_MOST_DIGESTS = 1024


@dataclass(frozen=True, eq=False)
class Weights:
    """The content of a weights file.

    Attributes
    ----------
    state_dict : dict of str to Tensor
        The tensors, on the CPU, under the names that the network gives them.
    digest : str
        sha256 of the file, 64 hexadecimal digits.
    """

    state_dict: dict[str, Tensor]
    digest: str


def load_weights(path: str | PathLike[str]) -> Weights:
    """Read a state dict from a file, executing nothing that the file holds.

    Parameters
    ----------
    path : str or path-like
        A ``.pth`` or ``.pt`` file of ``torch.save(network.state_dict(), path)``, or a
        ``.safetensors`` file. The state dict may lie under a key ``"state_dict"``,
        ``"model_state_dict"`` or ``"model"``, and all of its keys may begin with
        ``"module."``, as those of an ``AveragedModel`` do.

    Returns
    -------
    Weights
        The tensors and the digest of the bytes they were read from.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a regular file, has another suffix, is not what its name
        promises, cannot be read without executing code, or holds no state dict.
    """
    path = Path(_regular_file(path)[0])
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"Weights must be a file that ends in {', '.join(SUFFIXES)}. Got "
            f"{str(path)!r}. Save a network with torch.save(network.state_dict(), "
            "'name.pth')."
        )
    # One handle for both, so that what is loaded is what was verified.
    with path.open("rb") as file:
        digest = _verified_digest(file, str(path))
        file.seek(0)
        loaded = _read_tensors(file, path)
    return Weights(_state_dict_in(loaded, path), digest)


def file_digest(path: str | PathLike[str]) -> str:
    """Give the sha256 of a weights file, cheaply if it has not changed since.

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
        If it is not a regular file or not what its name promises.
    """
    name, status = _regular_file(path)
    known = _digests.get(_signature(status, name))
    if known is not None:
        return known
    with open(name, "rb") as file:
        return _verified_digest(file, name)


def fetch_weights(url: str, *, progress: bool) -> Path:
    """Give the local copy of a weights file, downloading it the first time.

    The copy lies where torchvision looks for it too, in the folder ``checkpoints`` of
    ``torch.hub.get_dir()``. It gets its name when it is complete and verified.

    Parameters
    ----------
    url : str
        Where the file is; its name carries the first digits of its sha256.
    progress : bool
        Whether to show a progress bar of the download.

    Returns
    -------
    Path
        The file on this machine.

    Raises
    ------
    ConnectionError
        If the file is not here and cannot be fetched.
    ValueError
        If what was fetched is not what its name promises.
    """
    name = Path(urlparse(url).path).name
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / name
    if path.exists():
        return path
    promised = _HASH_IN_NAME.search(name)
    prefix = promised.group(1) if promised else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), prefix, progress=progress)
    except (OSError, HTTPException) as error:  # of the network, or of the folder
        raise ConnectionError(
            f"The weights {name!r} are not on this machine and could not be fetched "
            f"from {url}: {error}. Fetch the file on a machine with a network and put "
            f"it into {str(folder)!r}, or pass weights='path/to/{name}'. The bundled "
            "backbone 'resnet_mini' needs no network connection."
        ) from error
    except RuntimeError as error:
        # torch.hub has no type of its own for this, and has removed the file.
        raise ValueError(
            f"What came from {url} is not the file that its name promises: {error}. "
            "Nothing was kept. Try again, or fetch the file in another way and pass "
            f"weights='path/to/{name}'."
        ) from error
    return path


class skip_weight_allocation(TorchFunctionMode):
    """Context in which a network is built without memory for its parameters.

    ``torch.empty``, with which layers make their parameters, gives tensors on the meta
    device; initializing those costs nothing (3.5 s for VGG-16 on one core otherwise).
    Unlike under ``torch.device("meta")`` the constants that a network computes for
    itself, such as the widths of a RegNet, stay real.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, on the meta device if it is ``torch.empty``."""
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def load_weights_into(
    network: nn.Module, state_dict: dict[str, Tensor], origin: str
) -> None:
    """Put a state dict into a network, in the data types of the network.

    Parameters
    ----------
    network : Module
        Built in any way, also under `skip_weight_allocation`. Its parameters become
        the tensors of `state_dict` themselves; when this raises, it is of no
        further use.
    state_dict : dict of str to Tensor
        All of the tensors of the network. Those of torchvision's auxiliary heads are
        left out, where the network has none.
    origin : str
        What the error message calls the state dict.

    Raises
    ------
    ValueError
        If names or shapes are not those of the network.
    """
    own = network.state_dict()
    filling: Any = OrderedDict()
    for name, tensor in state_dict.items():
        name = _OLD_DENSE.sub(r"\1\2", name)
        # Of the right shape only: a tensor of one number may say that it is a billion.
        if name in own and own[name].shape == tensor.shape:
            filling[name] = _converted(tensor, own[name].dtype, f"{origin}: {name}")
        elif not name.startswith(_AUXILIARY):
            filling[name] = tensor
    # torch.save keeps the version of each layer, safetensors does not, and MNASNet
    # insists on its own.
    unversioned = {"": {"version": network._version}}
    filling._metadata = getattr(state_dict, "_metadata", unversioned)
    try:
        keys = network.load_state_dict(filling, strict=False, assign=True)
    except RuntimeError as error:
        wrong = [line.strip() for line in str(error).splitlines()[1:]]
    else:
        wrong = [f"{name} is missing" for name in keys.missing_keys]
        wrong += [f"{name} is not known" for name in keys.unexpected_keys]
    if wrong:
        raise ValueError(
            f"Weights must have the names and shapes of the network they are for. "
            f"{origin} differ in {len(wrong)}: {'; '.join(wrong[:4])}"
            f"{' …' if len(wrong) > 4 else ''}. Check that they were saved from this "
            "architecture."
        )


def _converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    try:
        return tensor.to(dtype)
    except RuntimeError as error:  # of some types of a few bits there is no way
        raise ValueError(
            f"Weights must have the names and shapes of the network they are for, and "
            f"numbers. {name} has {tensor.dtype}. Check that they were saved from "
            "this architecture."
        ) from error


def _regular_file(path: str | PathLike[str]) -> tuple[str, os.stat_result]:
    """Give the name of a file, and its status; asked for in each fit and transform."""
    name = os.path.expanduser(path)
    try:
        status = os.stat(name)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no weights file {name!r}. Check the path; a relative one starts "
            f"from {os.getcwd()!r}."
        ) from error
    # Opening a pipe would wait for a writer, for ever.
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
        # Cannot be set back, unlike the time of modification (except on Windows, where
        # it is the time of creation).
        status.st_ctime_ns,
        status.st_ino,
    )


def _verified_digest(file: BufferedReader, name: str) -> str:
    signature = _signature(os.fstat(file.fileno()), name)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    promised = _HASH_IN_NAME.search(os.path.basename(name))
    if promised and not digest.startswith(promised.group(1)):
        raise ValueError(
            f"The sha256 of a weights file must begin as its name says. The name of "
            f"{name!r} says {promised.group(1)}, its content is {digest}: the "
            "file is damaged or was changed. If it was downloaded, delete it and it "
            "will be fetched again; if those digits are not a hash, rename the file."
        )
    # A file changed again within a tick of the clock would keep its signature, so one
    # that was changed just now is not remembered.
    if time.time_ns() - max(signature[2:4]) > _TICK_NS:
        if len(_digests) >= _MOST_DIGESTS:
            _digests.clear()
        _digests[signature] = digest
    return digest


def _read_tensors(file: BufferedReader, path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load(file.read())
        except SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} is not a safetensors file that can be read: {error}. "
                "Fetch or save it again."
            ) from error
    try:
        _check_pickles(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    # A damaged pickle can end in any exception at all; there is no second attempt.
    except Exception as error:
        # torch's own text is long, and advises to execute what is in the file.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            reason = f"it asks for {code.group(1)}, which is code"
            advice = (
                "If you trust where it comes from, load the network there and save "
                "torch.save(network.state_dict(), 'name.pth'), without optimizer and "
                "settings."
            )
        else:
            reason = f"it is damaged, or no file of torch ({type(error).__name__})"
            advice = "Fetch or save it again."
        raise ValueError(
            f"A weights file must hold nothing but weights. Got {str(path)!r}: "
            f"{reason}. Nothing in it was executed. {advice}"
        ) from error


def _check_pickles(file: BufferedReader) -> None:
    """Check what torch is going to unpickle, found in the way torch finds it."""
    zipped = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if zipped:
        scan_pickle(torch._C.PyTorchFileReader(file).get_record("data.pkl"))
    else:
        # Before there were zip files: a magic number, the version, the system, what was
        # saved, and the names of the storages, whose bytes follow.
        for _ in range(5):
            scan_pickle(file)
    file.seek(0)


def _state_dict_in(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in _KEYS_AROUND:
        if isinstance(loaded, dict) and isinstance(dict.get(loaded, key), dict):
            loaded = dict.get(loaded, key)
    if not isinstance(loaded, dict) or not _is_state_dict(loaded):
        found = f"a {type(loaded).__name__}"
        if isinstance(loaded, dict):
            shown = ", ".join(repr(key) for key in [*dict.keys(loaded)][:5])
            found = f"{len(loaded)} keys: {shown or 'none'}"
        raise ValueError(
            f"A weights file must hold a state dict: names with tensors, itself or "
            f"under one of {', '.join(map(repr, _KEYS_AROUND))}. {str(path)!r} holds "
            f"{found}. Save it with torch.save(network.state_dict(), 'name.pth')."
        )
    # A pickle may give an OrderedDict or a parameter attributes of any name, "items" or
    # "to" as well; what comes out here has none.
    plain: Any = OrderedDict((k, Tensor.detach(v)) for k, v in dict.items(loaded))
    versions = _versions_in(loaded)
    if all(key.startswith("module.") for key in plain.keys() - {_N_AVERAGED}):
        plain.pop(_N_AVERAGED, None)
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in plain):
            plain = OrderedDict((k[len(prefix) :], v) for k, v in plain.items())
            versions = None
    if versions is not None:
        plain._metadata = versions
    return plain


def _versions_in(loaded: dict[str, Any]) -> dict[str, dict[str, int]] | None:
    """Give the versions of layers that ``state_dict()`` keeps beside the tensors."""
    metadata = getattr(loaded, "__dict__", {}).get("_metadata")
    if not isinstance(metadata, dict):
        return None
    return {
        name: {"version": value["version"]}
        for name, value in dict.items(metadata)
        if type(value) is dict and isinstance(value.get("version"), int)
    }


def _is_state_dict(loaded: dict[Any, Any]) -> bool:
    return bool(loaded) and all(
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_meta
        for key, value in dict.items(loaded)
    )
