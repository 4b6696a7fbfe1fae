"""The header of a TIFF file is read as tifffile writes it."""

import io

import numpy as np
import pytest
import tifffile

from sktl._images.tiff_header import (
    BITS_PER_SAMPLE,
    ORIENTATION,
    PHOTOMETRIC,
    SAMPLE_FORMAT,
    SAMPLES_PER_PIXEL,
    TiffHeader,
)


def write(values: np.ndarray, byteorder="<", bigtiff=False, **options) -> bytes:
    with tifffile.TiffWriter(
        buffer := io.BytesIO(), byteorder=byteorder, bigtiff=bigtiff
    ) as writer:
        writer.write(values, metadata=None, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", "<>")
def test_tags_are_read_and_replaced(byteorder: str, bigtiff: bool) -> None:
    values = np.ones((3, 4, 3), "f4")
    content = write(values, byteorder, bigtiff, photometric="rgb")
    header = TiffHeader(content)
    assert header.size == (4, 3)
    assert header.byteorder == byteorder
    read = [header[tag] for tag in (BITS_PER_SAMPLE, SAMPLES_PER_PIXEL, SAMPLE_FORMAT)]
    assert read == [32, 3, 3]
    assert ORIENTATION not in header
    assert header[ORIENTATION] == 1
    order = {"<": "little", ">": "big"}[byteorder]
    assert header.describe() == (
        "3 x 32 bits per pixel (floats, photometric interpretation RGB, "
        f"{order}-endian{' BigTIFF' if bigtiff else ''})"
    )
    changed = header.replace({PHOTOMETRIC: 5, BITS_PER_SAMPLE: 8, ORIENTATION: 6})
    page = tifffile.TiffFile(io.BytesIO(changed)).pages[0]
    assert page.photometric == tifffile.PHOTOMETRIC.SEPARATED
    assert page.bitspersample == 8
    assert page.tags.get("Orientation") is None
    assert header.replace({}) == content


@pytest.mark.parametrize("bigtiff", [False, True])
def test_damaged_header_raises(bigtiff: bool) -> None:
    content = write(np.ones((3, 4), "u2"), bigtiff=bigtiff)
    for end in range(30):
        with pytest.raises(ValueError, match="TIFF file"):
            TiffHeader(content[:end])
    for damaged in (b"II+\0", b"MM\0*", b"text"):
        with pytest.raises(ValueError, match="TIFF file"):
            TiffHeader(damaged + b"\xff" * 99)
