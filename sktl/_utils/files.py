"""Atomic file writes."""

import contextlib
import os
import uuid
from pathlib import Path


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file completely or not at all.

    The content is flushed to disk before the file is renamed into place, so that a
    killed process or a power failure leaves either the old or the new file.

    Parameters
    ----------
    file : Path
        File to write; an existing file is replaced.
    content : bytes
        New content.

    Raises
    ------
    OSError
        If the file cannot be written. An existing file is left unchanged.
    """
    partial = file.with_name(f"{file.stem}-{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(partial, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
