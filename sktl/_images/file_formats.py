"""Formats and sizes of the image files that are decoded.

By default, eight formats are decoded, and no file of more than `MAX_PIXELS` pixels. The
estimators widen both by their parameters ``extra_formats`` and ``max_image_pixels``.
These are parameters and not global settings, so that clones, pickles and workers in
other processes have them, and threads do not affect each other.

A file is opened by the plugins that Pillow registers for the supported formats, in this
order, and not by ``PIL.Image.open``. That function compares the size with the global
variable ``PIL.Image.MAX_IMAGE_PIXELS``, which cannot be changed for one thread only.
"""

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, Self

from PIL import Image, UnidentifiedImageError
from PIL.IcoImagePlugin import IcoFile
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

#: Default of ``max_image_pixels``. It equals the size at which Pillow warns of
#: decompression bombs, but does not depend on the user's ``MAX_IMAGE_PIXELS``.
MAX_PIXELS = 89_478_485

# MPO is opened by Pillow's JPEG plugin.
DEFAULT_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

#: Formats that are never decoded, even if they are in ``extra_formats``, and why.
EXCLUDED_FORMATS = {
    "EPS": "Pillow starts another program, Ghostscript, to read it",
    "WMF": "it contains drawing commands that only Windows can execute",
    "BUFR": "Pillow cannot decode it",
    "GRIB": "Pillow cannot decode it",
    "HDF5": "Pillow cannot decode it",
    "MPEG": "Pillow cannot decode it",
}

# Formats of which Pillow has no plugin: the package that has one, and the code that
# registers it.
_PLUGINS = {
    "HEIF": "pillow-heif",
    "JXL": "pillow-jxl-plugin",
}
_REGISTRATION = {
    "HEIF": "import pillow_heif; pillow_heif.register_heif_opener()",
    "JXL": "import pillow_jxl",
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_JXL_PREFIXES = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")

_PREFIX_SIZE = 16  # as in Pillow
_TGA_FOOTER = b"TRUEVISION-XFILE.\0"
_IMAGE_WIDTH, _IMAGE_HEIGHT = 256, 257  # tags of TIFF files

# What Pillow's plugins raise for a file of another format.
_REJECTIONS = (SyntaxError, IndexError, TypeError, struct.error)

# Markers of JPEG files. The coefficients of these sequential files are decoded row by
# row, if they are in one scan; those of the others are stored for the whole image.
_SEQUENTIAL_FRAMES = {0xC0, 0xC1, 0xC9}
_OTHER_FRAMES = set(range(0xC0, 0xD0)) - _SEQUENTIAL_FRAMES - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN = 0xDA


@dataclass(frozen=True)
class FileOptions:
    """Which image files are decoded; the pixels of a file do not depend on it.

    Parameters
    ----------
    max_pixels : int
        Number of pixels of the largest image that is decoded.
    extra_formats : tuple of str
        Pillow's names of formats that are decoded besides `DEFAULT_FORMATS`.
    """

    max_pixels: int = MAX_PIXELS
    extra_formats: tuple[str, ...] = ()

    @classmethod
    def from_estimator(cls, estimator: Any) -> Self:
        """Read and check the parameters of an estimator.

        Parameters
        ----------
        estimator : object
            Has the parameters ``max_image_pixels`` and ``extra_formats``.

        Returns
        -------
        FileOptions

        Raises
        ------
        ValueError
            If Pillow has no such format, or if it is in `EXCLUDED_FORMATS`.
        """
        formats = _check_extra_formats(estimator.extra_formats, estimator)
        return cls(int(estimator.max_image_pixels), formats)

    @property
    def formats(self) -> tuple[str, ...]:
        """All formats that are decoded, in the order in which they are tried."""
        return DEFAULT_FORMATS + self.extra_formats


def _check_extra_formats(names: Sequence[Any], estimator: object) -> tuple[str, ...]:
    """Return the names in upper case, without those of `DEFAULT_FORMATS`."""
    if not names:  # Pillow's plugins take a tenth of a second to import
        return ()
    subject = f"The 'extra_formats' parameter of {type(estimator).__name__}"
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{subject} must contain names of formats, such as 'JPEG2000'. Got "
            f"{names!r}."
        )
    formats = tuple(dict.fromkeys(name.upper() for name in names))
    Image.init()
    for name in formats:
        if name in EXCLUDED_FORMATS:
            raise ValueError(
                f"{subject} must not contain {name!r}, because "
                f"{EXCLUDED_FORMATS[name]}. Convert these files to PNG."
            )
        if name not in Image.OPEN:
            known = sorted(Image.OPEN.keys() - EXCLUDED_FORMATS - {*DEFAULT_FORMATS})
            raise ValueError(
                f"{subject} must contain formats that Pillow can open: "
                f"{', '.join(known)}. Got {name!r}. {_plugin_advice(name)}"
            )
    return tuple(name for name in formats if name not in DEFAULT_FORMATS)


def _plugin_advice(name: str) -> str:
    """Say how a plugin is registered that adds a format to Pillow."""
    example = name if name in _PLUGINS else "HEIF"
    return (
        "Other formats require a plugin, which must be registered in each process, "
        f"including workers; for {example!r} install {_PLUGINS[example]} and run: "
        f"{_REGISTRATION[example]}."
    )


def open_image_file(file: IO[bytes], options: FileOptions) -> ImageFile:
    """Identify an image file and read its header, but not its pixels.

    Parameters
    ----------
    file : binary file
        The file; must remain open until the pixels are loaded.
    options : FileOptions
        Formats that are tried.

    Returns
    -------
    PIL.ImageFile.ImageFile

    Raises
    ------
    PIL.UnidentifiedImageError
        If no format accepts the file; see `explain_rejection`.
    Exception
        Any exception that Pillow's plugins raise for damaged files.
    """
    file.seek(0)
    prefix = file.read(_PREFIX_SIZE)
    for format in options.formats:
        if format not in Image.OPEN:
            Image.init()
        # Missing if Pillow was built without it, or its plugin is not registered.
        factory, accept = Image.OPEN.get(format, (None, None))
        if factory is None or not _accepts(accept, prefix):
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except _REJECTIONS:
            continue
    raise UnidentifiedImageError(f"none of {', '.join(options.formats)}")


def _accepts(accept: Callable[[bytes], bool | str] | None, prefix: bytes) -> bool:
    """Return whether a plugin recognizes the first bytes of a file.

    A plugin without such a function reads the header of any file.
    """
    if accept is None:
        return True
    result = accept(prefix)
    # A str is the reason why this build of Pillow cannot open the format.
    return bool(result) and not isinstance(result, str)


def explain_rejection(
    file: IO[bytes], name: str, extension: str, options: FileOptions
) -> str:
    """Return an error message for a file that no supported format accepts.

    Parameters
    ----------
    file : binary file
        The file.
    name : str
        Name of the image in error messages, from `sktl._images.decode.describe`.
    extension : str
        Extension of the name of the file, such as ``".tga"``, or an empty string.
    options : FileOptions
        Supported formats.

    Returns
    -------
    str
        Names the format of the file, if it is known, and says what to do.
    """
    Image.init()
    found = _identify(file, extension, options)
    supported = ", ".join(options.formats)
    if found in EXCLUDED_FORMATS:
        return (
            f"Cannot read image {name}: its format is {found}, which is not supported, "
            f"because {EXCLUDED_FORMATS[found]}. Convert it to PNG."
        )
    unregistered = [f for f in options.extra_formats if f not in Image.OPEN]
    if unregistered:
        return (
            f"Cannot read image {name}: extra_formats contains {unregistered[0]!r}, "
            f"which is not registered with Pillow in this process. "
            f"{_plugin_advice(unregistered[0])}"
        )
    if found is None:
        return (
            f"Cannot read image {name}: it is damaged, or its format is not one of "
            f"{supported}. Replace or remove it, or, if Pillow can open it, add its "
            "format to extra_formats."
        )
    plugin = "" if found in Image.OPEN else f" {_plugin_advice(found)}"
    return (
        f"Cannot read image {name}: its format is {found}, which is not one of the "
        f"formats that are decoded: {supported}.{plugin} Set extra_formats={(found,)!r}"
        ", or open it with PIL.Image.open and pass the PIL image."
    )


def _identify(file: IO[bytes], extension: str, options: FileOptions) -> str | None:
    """Return the format of a file, of those that are not decoded; None if unknown.

    The plugins of other formats must not only recognize the first bytes of the file,
    but also read its header, unless they are of other packages. For those that
    recognize no first bytes, such as TGA, the file must have the extension or the last
    bytes of the format.
    """
    file.seek(0)
    head = file.read(64)
    is_heif = head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS
    if is_heif and not any(brand in head for brand in (b"avif", b"avis")):
        return "HEIF"
    if head.startswith(_JXL_PREFIXES):
        return "JXL"
    likely = Image.EXTENSION.get(extension.lower())
    if file.seek(0, os.SEEK_END) > len(_TGA_FOOTER):
        file.seek(-len(_TGA_FOOTER), os.SEEK_END)
        likely = "TGA" if file.read() == _TGA_FOOTER else likely
    candidates = [format for format in Image.ID if format not in options.formats]
    for format in sorted(candidates, key=lambda format: format != likely):
        factory, accept = Image.OPEN[format]
        if accept is None and format != likely:
            continue
        try:
            if not _accepts(accept, head[:_PREFIX_SIZE]):
                continue
            file.seek(0)
            if format == "ICO":  # its plugin decodes the pixels when it opens a file
                IcoFile(file)
            elif format not in EXCLUDED_FORMATS and _is_of_pillow(factory):
                factory(file, "")
        except Exception:
            # All exceptions on purpose: whatever this plugin raises, the file does not
            # have its format.
            continue
        return format
    return None


def _is_of_pillow(factory: Any) -> bool:
    # Plugins of other packages only read files whose format is in `extra_formats`.
    return str(factory.__module__).startswith("PIL.")


def allocate_pixels(image: Image.Image) -> None:
    """Allocate the pixels of a TIFF file whose size is above the limit of Pillow.

    Pillow's plugin compares the size with the global ``MAX_IMAGE_PIXELS`` once more
    when it allocates the pixels, unless they are allocated already.

    Parameters
    ----------
    image : PIL.Image.Image
        Image whose size has been checked. Nothing is done for other images.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if (
        isinstance(image, TiffImageFile)
        and image.tile
        and limit is not None
        and image.width * image.height > limit
    ):
        # Not image.size, which is that of the upright image.
        size = (image.tag_v2[_IMAGE_WIDTH], image.tag_v2[_IMAGE_HEIGHT])
        image.im = Image.new(image.mode, size).im


def count_pixels(
    image: ImageFile, size: tuple[int, int], file: IO[bytes], options: FileOptions
) -> int:
    """Return the number of pixels that are stored to decode an image.

    Parameters
    ----------
    image : PIL.ImageFile.ImageFile
        Image whose pixels are not loaded yet; of a JPEG file maybe at reduced size.
    size : tuple of two ints
        Width and height in the file.
    file : binary file
        The file.
    options : FileOptions
        Contains the limit. Below it, the file is not read.

    Returns
    -------
    int
        Those at reduced size, unless the file is one that can only be reduced after
        all coefficients have been stored, such as a progressive JPEG file.
    """
    n_pixels = size[0] * size[1]
    if n_pixels <= options.max_pixels or image.size == size:
        return n_pixels
    return image.width * image.height if _has_single_scan(file) else n_pixels


def explain_size(
    image: ImageFile,
    size: tuple[int, int],
    n_pixels: int,
    name: str,
    options: FileOptions,
) -> str:
    """Return an error message for an image above the limit.

    Parameters
    ----------
    image, size, options
        As in `count_pixels`.
    n_pixels : int
        From `count_pixels`.
    name : str
        Name of the image in error messages.

    Returns
    -------
    str
        Contains the size and the limit, and says what to do.
    """
    details, advice = "", ""
    if image.size != size and n_pixels < size[0] * size[1]:
        details = f", decoded as {image.width} x {image.height}"
    elif image.size != size and image.format in ("JPEG", "MPO"):
        details = (
            ", all of which are stored to decode this progressive JPEG file at reduced "
            "size"
        )
    elif image.format in ("JPEG", "MPO"):
        advice = ", set reducing_gap=2 to decode it at reduced size"
    return (
        f"Cannot read image {name}: it has {size[0]} x {size[1]} pixels{details}; "
        f"files of more than max_image_pixels={options.max_pixels} are not decoded, "
        "because they can exhaust the memory. If you trust the file, set "
        f"max_image_pixels={n_pixels}{advice}, or shrink it with Pillow and pass the "
        "PIL image."
    )


def _has_single_scan(file: IO[bytes]) -> bool:
    """Return whether a JPEG file is sequential and has all components in one scan."""
    file.seek(2)  # after the start of the image
    n_components = None
    while len(header := file.read(4)) == 4 and header[0] == 0xFF:
        if header[1] == 0xFF:  # a fill byte
            file.seek(-3, os.SEEK_CUR)
            continue
        marker, length = header[1], int.from_bytes(header[2:])
        segment = file.read(max(length - 2, 0))
        if marker in _OTHER_FRAMES or not segment or len(segment) < length - 2:
            return False
        if marker in _SEQUENTIAL_FRAMES:
            # 8-bit precision, 16-bit height and width, number of components
            n_components = segment[5] if len(segment) > 5 else None
        elif marker == _START_OF_SCAN:
            return segment[0] == n_components
    return False
