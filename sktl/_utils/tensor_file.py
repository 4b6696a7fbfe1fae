"""Files of tensors and a JSON document, written atomically and verified on reading.

The format is safetensors with the document in the metadata of the header, so that
nothing in the file can be executed. safetensors detects truncated files but not flipped
bits; a sha256 of all tensors and of the document, also in the header, detects both.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sktl._utils.files import write_atomically

_MAX_HEADER = 100_000_000  # bytes, the limit of safetensors
_PARSE_ERRORS = (LookupError, RecursionError, TypeError, ValueError)

# Keys of the metadata. If one of them is damaged, the other shows whose file it is.
_DOCUMENT, _SHA256 = "sktl", "sktl_sha256"


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON document to a file atomically.

    Parameters
    ----------
    file : Path
        File to write; an existing file is replaced.
    tensors : mapping of str to Tensor
        Tensors on any device. Tensors that share memory are written separately.
    document : mapping of str
        JSON-serializable values.

    Raises
    ------
    OSError
        If the file cannot be written. An existing file is left unchanged.
    TypeError
        If the document is not JSON-serializable.
    """
    # Sorted by name, so that the file does not depend on the order of the mapping.
    cpu_tensors = {
        name: tensors[name].detach().cpu().contiguous().clone()
        for name in sorted(tensors)
    }
    text = json.dumps(document, sort_keys=True)
    metadata = {_DOCUMENT: text, _SHA256: _digest(cpu_tensors, text)}
    write_atomically(file, safetensors.torch.save(cpu_tensors, metadata=metadata))


def read_tensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify a file written by `write_tensors`.

    Parameters
    ----------
    path : str or path-like
        File to read.

    Returns
    -------
    tensors : dict of str to Tensor
        Tensors on the CPU.
    document : dict of str
        JSON document.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If the file was not written by `write_tensors`, or is damaged.
    """
    return parse_tensors(Path(path).read_bytes(), str(path))


def parse_tensors(
    content: bytes, name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the document in the content of a file; verify both.

    Parameters
    ----------
    content : bytes
        Content of a file written by `write_tensors`.
    name : str
        Name of the file, for the error message.

    Returns
    -------
    tensors, document
        As from `read_tensors`.

    Raises
    ------
    ValueError
        As in `read_tensors`.
    """
    try:
        tensors = safetensors.torch.load(content)
        (length,) = struct.unpack("<Q", content[:8])
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        text = metadata[_DOCUMENT]
        is_intact = metadata[_SHA256] == _digest(dict(sorted(tensors.items())), text)
        document = json.loads(text)
        if not is_intact or not isinstance(document, dict):
            raise ValueError("its sha256 does not match its content")
    # Deeply nested JSON raises RecursionError.
    except (SafetensorError, *_PARSE_ERRORS) as error:
        raise _invalid(name, error) from error
    return tensors, document


def read_document(path: str | PathLike[str]) -> dict[str, Any] | None:
    """Return the document in the header of a file, without reading its tensors.

    Parameters
    ----------
    path : str or path-like
        Any file.

    Returns
    -------
    dict of str or None
        JSON document, which is not verified. None if the header has none: the file was
        not written by `write_tensors`, or it is so damaged that no library can read it.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If the file was written by `write_tensors` and its document is damaged.
    """
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= _MAX_HEADER else b""
    try:
        metadata = json.loads(header)["__metadata__"]
        is_own = not {_DOCUMENT, _SHA256}.isdisjoint(metadata)
    except _PARSE_ERRORS:
        return None
    if not is_own:
        return None
    try:
        document = json.loads(metadata[_DOCUMENT])
        if not isinstance(document, dict):
            raise ValueError("its document has no names")
    except _PARSE_ERRORS as error:
        raise _invalid(str(path), error) from error
    return document


def _invalid(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"{name!r} must be an unmodified file written by sktl. Got an invalid file: "
        f"{str(error) or type(error).__name__}. Nothing in it was executed."
    )


def state_dict_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a state dict or of other named tensors on the CPU.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Tensors; the digest depends on their order.

    Returns
    -------
    str
        64 hexadecimal digits, which depend on names, dtypes, shapes and bits.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        # Not reshape: a tensor of one element may have stride 0, which `view` rejects.
        flat = tensor.detach().cpu().contiguous()
        flat = flat.as_strided((tensor.numel(),), (1,))
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    return hashlib.sha256(f"{state_dict_digest(tensors)} {text}".encode()).hexdigest()
