"""Orientation of an image according to its metadata.

=======================  =========================================================
file                     orientation
=======================  =========================================================
AVIF, HEIF               the transformation in the container, which is part of the
                         image; the format forbids others, so that XMP is ignored
TIFF                     tag 274, which Pillow applies when it loads the pixels;
                         otherwise ``tiff:Orientation`` in XMP
JPEG, PNG, WebP, others  EXIF; otherwise ``tiff:Orientation`` in XMP
=======================  =========================================================

EXIF has priority over XMP, as in the photo metadata policies of Windows. Invalid EXIF
data are ignored.
"""

import re
from typing import Any

from PIL import ExifTags, Image

# The values that define an orientation other than upright.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CONTAINER_FORMATS = ("AVIF", "HEIF")
# As an attribute or as an element. Pillow recognizes only some of the spellings.
_XMP = re.compile(r"""\btiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*["'<]""")


def load_with_transposition(image: Image.Image) -> Image.Transpose | None:
    """Load the pixels, and return how they must be transposed to be upright.

    Parameters
    ----------
    image : PIL.Image.Image
        Image, whose pixels may be loaded already.

    Returns
    -------
    PIL.Image.Transpose or None
        None if the pixels are upright.

    Notes
    -----
    ``ImageOps.exif_transpose`` also writes new EXIF data, which fails if the data are
    invalid.
    """
    # Pillow deletes the tag from a TIFF file when it has transposed the loaded pixels.
    is_in_tag = ExifTags.Base.Orientation in getattr(image, "tag_v2", ())
    image.load()  # the metadata of a PNG file may follow the pixels
    orientation = _from_exif(image)
    if orientation is None and not is_in_tag:
        orientation = _from_xmp(image)
    return _TRANSPOSITIONS.get(orientation)


def _from_exif(image: Image.Image) -> Any:
    """Return the orientation in the EXIF data, or None if there is none."""
    try:
        if image.format in _CONTAINER_FORMATS:
            # Not getexif(), which includes the orientation in XMP.
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
        else:
            exif = image.getexif()
        return exif.get(ExifTags.Base.Orientation)
    except Warning:
        raise  # the user turned warnings into errors
    except Exception:
        # All exceptions on purpose: EXIF data are often invalid, in as many ways as
        # files are damaged. The pixels are intact, and image viewers ignore the data.
        return None


def _from_xmp(image: Image.Image) -> int | None:
    """Return the orientation in the XMP data, or None if there is none."""
    if image.format in _CONTAINER_FORMATS:
        return None
    xmp = image.info.get("xmp")
    if not isinstance(xmp, bytes):
        return None
    match = _XMP.search(xmp.decode("utf-8", "replace"))
    return None if match is None else int(match[1])
