"""Images are upright, whichever metadata contain the orientation."""

import io
import struct
import zlib

import numpy as np
import pytest
from image_files import upright_by_orientation
from PIL import Image, PngImagePlugin

from sktl._images.decode import decode

# Four different quarters, each made of whole JPEG blocks.
PATCHES = np.kron(
    np.array([[[200, 60, 60], [60, 180, 60]], [[60, 60, 200], [220, 220, 90]]]),
    np.ones((16, 32, 1)),
).astype(np.uint8)  # (32, 64, 3)
UPRIGHT = upright_by_orientation(PATCHES)
LOSSLESS = {
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "JPEG": {"subsampling": 0},
    "AVIF": {"subsampling": "4:4:4"},
}


def packet(orientation: str) -> bytes:
    """Return an XMP packet with some text in its description."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf='
        '"http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        f'rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {orientation}'
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def attribute(orientation: int) -> bytes:
    return packet(f'tiff:Orientation="{orientation}">')


def exif(orientation: int | None) -> bytes:
    data = Image.Exif()
    data[0x010E] = "a description"
    if orientation is not None:
        data[0x0112] = orientation
    return data.tobytes()


def encode(format: str, xmp: bytes | None, **options: object) -> bytes:
    options = {**LOSSLESS[format], **options}
    if format == "PNG" and xmp is not None:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options["pnginfo"] = info
    elif format == "TIFF" and xmp is not None:
        options["tiffinfo"] = {700: xmp}
    elif xmp is not None:
        options["xmp"] = xmp
    Image.fromarray(PATCHES).save(buffer := io.BytesIO(), format, **options)
    return buffer.getvalue()


def check(content: bytes, orientation: int, tolerance: int = 6) -> None:
    """Check the pixels of a file as bytes, and as a PIL image, loaded or not."""
    loaded = Image.open(io.BytesIO(content))
    loaded.load()
    for image in (content, Image.open(io.BytesIO(content)), loaded):
        got = np.asarray(decode(image, index=0, pixel_range="auto"), float)
        expected = UPRIGHT[orientation]
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_each_orientation_in_xmp(orientation):
    check(encode("PNG", attribute(orientation)), orientation, 0)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize(
    ("xmp", "orientation"),
    [
        (attribute(6), 6),
        (packet("tiff:Orientation='8'>"), 8),
        (packet('tiff:Orientation = "3">'), 3),
        (packet("><tiff:Orientation>6</tiff:Orientation>"), 6),
        (packet("><tiff:Orientation>\n 5 </tiff:Orientation>"), 5),
        (packet('tiff:Orientation="0">'), 1),
        (packet('tiff:OrientationX="6">'), 1),
        (packet('exif:Orientation="6">'), 1),
    ],
)
def test_orientation_in_xmp_only(format, xmp, orientation):
    check(encode(format, xmp), orientation)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_xmp_beside_exif_data_without_orientation(format):
    check(encode(format, attribute(6), exif=exif(None)), 6)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_xmp_beside_invalid_exif_data(format):
    check(encode(format, attribute(6), exif=b"Exif\0\0II*\0"), 6)


@pytest.mark.parametrize("in_exif", [1, 3])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("quote", ['"', "'"])
def test_exif_has_priority_over_xmp(format, in_exif, quote):
    xmp = packet(f"tiff:Orientation={quote}6{quote}>")
    check(encode(format, xmp, exif=exif(in_exif)), in_exif)


@pytest.mark.parametrize("in_tag", [1, 3])
def test_tag_of_a_tiff_file_has_priority_over_xmp(in_tag):
    info = {700: packet("tiff:Orientation='6'>"), 274: in_tag}
    content = encode("TIFF", None, tiffinfo=info)
    got = decode(content, index=0, pixel_range="auto")
    np.testing.assert_array_equal(np.asarray(got), UPRIGHT[in_tag])


def test_xmp_of_an_avif_file_is_ignored():
    # ISO/IEC 23000-22: a file contains its transformation, and no other is applied.
    check(encode("AVIF", attribute(3)), 1)
    check(encode("AVIF", attribute(3), exif=exif(6)), 6)


def test_xmp_after_the_pixels_of_a_png_file():
    content = encode("PNG", None)
    data = b"XML:com.adobe.xmp\0\0\0\0\0" + attribute(8)
    chunk = struct.pack(">I", len(data)) + b"iTXt" + data
    chunk += struct.pack(">I", zlib.crc32(b"iTXt" + data))
    end = content.index(b"IEND") - 4
    check(content[:end] + chunk + content[end:], 8, 0)


def test_xmp_that_is_no_text_is_ignored():
    check(encode("JPEG", b"\xff\xfe\x80" * 50), 1)
    image = Image.fromarray(PATCHES)
    image.info["xmp"] = 7
    got = decode(image, index=0, pixel_range="auto")
    np.testing.assert_array_equal(np.asarray(got), PATCHES)
