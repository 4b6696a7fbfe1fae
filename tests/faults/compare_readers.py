"""Compare the pixels that sktl decodes from image files with those of ImageMagick.

``python tests/faults/compare_readers.py FOLDER`` compares all files below a folder: the
first frame, upright, on a white background. The files of Pillow's own tests are a good
folder. ``docs/user_guide/images.md`` lists the known differences with their reasons.
"""

import enum
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sktl._images.decode import decode
from sktl._images.file_formats import FileOptions

# Decoders of lossy formats differ in the rounding of the color conversion and in the
# interpolation of the chroma. A wrong inversion, rotation or background changes more.
MAX_DIFFERENCE = 24  # of 255
MIN_FRACTION = 0.98  # of the values
TIMEOUT = 60  # seconds per file


class Outcome(enum.Enum):
    """Result of the comparison of one file."""

    AGREES = "agrees"
    DIFFERS = "differs"
    REFUSED = "refused by sktl only"
    OTHER_FAILED = "read by sktl only"
    NEITHER = "read by neither"
    CRASHED = "not a ValueError"


@dataclass(frozen=True)
class Comparison:
    """Outcome of one file, and details for a person."""

    outcome: Outcome
    details: str


def find_imagemagick() -> list[str] | None:
    """Return the command of ImageMagick's convert, or None if it is not installed.

    Other programs have the same name: a tool of Windows, and parts of GraphicsMagick.
    """
    for command in (["magick"], ["convert"]):
        path = shutil.which(command[0])
        if path is None:
            continue
        run = subprocess.run([path, "-version"], capture_output=True, timeout=TIMEOUT)
        if run.returncode == 0 and run.stdout.startswith(b"Version: ImageMagick"):
            return [path]
    return None


def decode_with_imagemagick(command: list[str], path: Path) -> np.ndarray | None:
    """Return pixels of shape (height, width, 3), or None if the file is not read.

    The file is passed as standard input, since ImageMagick interprets characters of
    names. Formats without characteristic first bytes are tried by their extension.
    """
    content = path.read_bytes()
    is_gif = content.startswith(b"GIF8")
    for prefix in ("", f"{path.suffix[1:].lower()}:"):
        arguments = [
            *command,
            f"{prefix}-[0]",
            *("-background", "white"),
            # The canvas of a GIF may be larger than its frame; others are not shown.
            "-flatten" if is_gif else "+repage",
            *("-auto-orient", "-alpha", "remove", "-alpha", "off"),
            *("-colorspace", "sRGB", "-type", "TrueColor", "-depth", "8", "PPM:-"),
        ]
        try:
            run = subprocess.run(
                arguments, input=content, capture_output=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return None
        if run.returncode == 0 and run.stdout.startswith(b"P6"):
            with Image.open(io.BytesIO(run.stdout), formats=["PPM"]) as image:
                return np.asarray(image)
    return None


def compare_pixels(ours: np.ndarray, others: np.ndarray) -> tuple[bool, str]:
    """Return whether two images agree up to the rounding of decoders, and details."""
    if ours.shape != others.shape:
        return False, f"size {ours.shape[1::-1]} instead of {others.shape[1::-1]}"
    difference = np.abs(ours.astype(int) - others)
    fraction = (difference <= MAX_DIFFERENCE).mean()
    details = (
        f"{fraction:.1%} of the values within {MAX_DIFFERENCE}, mean difference "
        f"{difference.mean():.2f}"
    )
    return bool(fraction >= MIN_FRACTION), details


def compare_file(
    path: Path, command: list[str], options: FileOptions | None = None
) -> Comparison:
    """Decode one file with sktl and with ImageMagick, and compare the pixels."""
    others = decode_with_imagemagick(command, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = decode(
                path,
                index=0,
                pixel_range="auto",
                file_options=options or FileOptions(),
            )
    except ValueError as error:
        outcome = Outcome.NEITHER if others is None else Outcome.REFUSED
        return Comparison(outcome, str(error))
    except Exception as error:
        return Comparison(Outcome.CRASHED, repr(error))
    if others is None:
        return Comparison(Outcome.OTHER_FAILED, "")
    agrees, details = compare_pixels(np.asarray(image), others)
    return Comparison(Outcome.AGREES if agrees else Outcome.DIFFERS, details)


def compare_folder(folder: Path, command: list[str]) -> dict[str, Comparison]:
    """Compare all files below a folder; return the results by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        os.fspath(path.relative_to(folder)): compare_file(path, command)
        for path in paths
    }


def main() -> None:
    """Print the files that differ or are refused, and the number of each outcome."""
    command = find_imagemagick()
    if command is None:
        sys.exit("ImageMagick is not installed: there is no convert or magick.")
    results = compare_folder(Path(sys.argv[1]), command)
    for name, result in results.items():
        if result.outcome is not Outcome.AGREES:
            print(f"{result.outcome.value}: {name!r}: {result.details}")
    for outcome, n_files in Counter(r.outcome for r in results.values()).items():
        print(f"{n_files:5} {outcome.value}")


if __name__ == "__main__":
    main()
