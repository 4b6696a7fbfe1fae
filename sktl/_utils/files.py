"""Writing files atomically."""

import contextlib
import os
import uuid
from pathlib import Path


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, after a power cut too."""
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
