"""Tensors and a document in one file: there whole or not at all, checked when read.

The file is safetensors, and the document is JSON in its header, so nothing in it can
be executed. safetensors notices a file that is cut short, but not a flipped bit; a
sha256 of all of it, in the header too, does.
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

# What it may end in to make sense of a document that somebody else wrote, with a right
# sha256. Whoever reads one turns these into a ValueError that names the file.
PARSE_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> None:
    """Write a file, or leave the one that is there as it was.

    Parameters
    ----------
    file : Path
        Its name.
    tensors : mapping of str to Tensor
        On any device. What shares memory is written twice.
    document : mapping of str
        Anything that JSON can hold.

    Raises
    ------
    OSError
        If it cannot be written.
    TypeError
        If JSON cannot hold the document.
    """
    # As a mapping has no order, by name.
    plain = {
        name: tensors[name].detach().cpu().contiguous().clone()
        for name in sorted(tensors)
    }
    text = json.dumps(document, sort_keys=True)
    metadata = {"sktl": text, "sha256": _digest(plain, text)}
    write_atomically(file, safetensors.torch.save(plain, metadata=metadata))


def read_tensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `write_tensors` wrote.

    Parameters
    ----------
    path : str or path-like
        Its name.

    Returns
    -------
    tensors : dict of str to Tensor
        On the CPU.
    document : dict of str
        What was written beside them.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is anything else, or was damaged since.
    """
    content = Path(path).read_bytes()
    try:
        tensors = safetensors.torch.load(content)
        (length,) = struct.unpack("<Q", content[:8])
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        text = metadata["sktl"]
        whole = metadata["sha256"] == _digest(dict(sorted(tensors.items())), text)
        document = json.loads(text)
        if not whole or not isinstance(document, dict):
            raise ValueError("its content is not what its sha256 says")
    # A RecursionError is what JSON of a thousand brackets makes.
    except (
        SafetensorError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{str(path)!r} must be a file that sktl wrote, whole and unchanged. It is "
            f"not, or not any more: {str(error) or type(error).__name__}. Nothing in "
            "it was executed."
        ) from error
    return tensors, document


def state_dict_digest(tensors: Mapping[str, Tensor]) -> str:
    """Give the sha256 of a state dict, or of any tensors with names, on the CPU.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        In this order.

    Returns
    -------
    str
        64 hexadecimal digits. Equal if names, types, shapes and bits are.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        # Not reshape: a tensor of one number may have a stride of 0, and no view then.
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    return hashlib.sha256(f"{state_dict_digest(tensors)} {text}".encode()).hexdigest()
