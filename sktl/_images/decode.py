"""Decoding of one image, in any form, to upright RGB.

Image files are decoded by Pillow, which raises on damaged files, where other decoders
have been seen to crash the process. Pillow's own ``convert("RGB")`` however clips
16-bit and float images and drops transparency, so that each mode is converted
explicitly:

==========================  ====================================================
mode of the image           conversion to RGB
==========================  ====================================================
``1``, ``L``, ``RGB``       unchanged; grey is repeated three times
``RGBA``, ``RGBa``, ``LA``, composited on white, as is any ``1``, ``L``, ``P`` or
``La``, ``PA``              ``RGB`` image with a transparent color
``P``                       palette lookup
``CMYK``, ``YCbCr``,        Pillow's conversion; embedded color profiles are
``HSV``, ``LAB``, ``RGBX``  not applied
``I;16`` and its variants   16-bit grey: scaled to 8 bits by the values of black and
                            white in `sktl._images.bit_depth`, or by an explicit
                            ``pixel_range``
``I``, ``F``                32-bit integers and floats: scaled by an explicit
                            ``pixel_range``; without one, only floats in [0, 1] and
                            files of 16 bits are supported, and all other images
                            raise
==========================  ====================================================

The orientation in EXIF or XMP metadata is applied, see `sktl._images.orientation`. The
first frame of an animation or of a file of several pages is used, and the current frame
of a PIL image.

PIL images have two limitations of Pillow. Color images of 16 bits per channel have 8
bits. The transparent color of a grey PNG of 2 or 4 bits, or of a color PNG of 16 bits
per channel, is compared with pixels that are already scaled to 8 bits, and therefore
seldom matches.
"""

import io
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from sktl._images.alpha import hides_pixels
from sktl._images.bit_depth import (
    BitDepth,
    correct_tiles,
    open_image,
    read_bit_depth,
)
from sktl._images.deep_pixels import (
    can_read_all_bits,
    has_only_small_values,
    needs_all_bits,
    read_all_bits,
)
from sktl._images.depth_scaling import reduce_to_8_bits, scale_all_bits
from sktl._images.file_formats import (
    FileOptions,
    allocate_pixels,
    count_pixels,
    explain_rejection,
    explain_size,
)
from sktl._images.orientation import load_with_transposition
from sktl._images.packed_tiff import unpack
from sktl._images.pixel_values import PixelRange, WarnOnce, to_uint8
from sktl._images.transparency import correct_transparency

_DEFAULT_OPTIONS = FileOptions()

_CONVERTIBLE_MODES = ("1", "L", "P", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")

# A PIL image opened from a file loads its pixels on first use, which modifies it; the
# same image may be decoded by several threads.
_PIL_LOCK = threading.Lock()


def decode(
    image: Any,
    *,
    index: int | str,
    pixel_range: PixelRange,
    content: bytes | None = None,
    min_decode_size: int | None = None,
    file_options: FileOptions = _DEFAULT_OPTIONS,
    warn: WarnOnce | None = None,
) -> Image.Image:
    """Decode one image to upright RGB.

    Parameters
    ----------
    image : str, os.PathLike, bytes, PIL.Image.Image or array-like
        Path of a file, content of a file, PIL image, or pixels of shape
        (height, width) or (height, width, channels) with 1, 3 or 4 channels.
    index : int or str
        Index of the image in X, or its name, for error messages.
    pixel_range : tuple of two floats or "auto"
        Values of black and white in arrays, and in files and PIL images of more than 8
        bits per channel; see `to_uint8` and `sktl._images.bit_depth`.
    content : bytes, optional
        Content of the file at the path, if it has been read already.
    min_decode_size : int, optional
        Decode JPEG files at 1/2, 1/4 or 1/8 of their size (averaging pixels), as long
        as the shorter side has at least this number of pixels. None decodes at full
        size.
    file_options : FileOptions, optional
        Formats and sizes of the files and bytes that are decoded.
    warn : WarnOnce, optional
        Warns of files of 16 bits whose values probably have fewer bits, and of files
        and PIL images whose colors are transparent everywhere.

    Returns
    -------
    PIL.Image.Image
        Image in mode "RGB", which shares no memory with `image`.

    Raises
    ------
    ValueError
        If the image cannot be read; names its index, its path and the reason.
    """
    name = describe(image, index)
    if isinstance(image, bytes):
        content = image
    is_path = isinstance(image, str | os.PathLike)
    if content is not None or is_path:
        extension = os.path.splitext(os.fsdecode(image))[1] if is_path else ""
        with (
            open_regular_file(image, name) if content is None else io.BytesIO(content)
        ) as file:
            pil_image = _read_file(
                file,
                name,
                extension,
                pixel_range,
                min_decode_size,
                file_options,
                warn,
            )
    elif isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(
                f"Image {name} has no pixels: its size is {image.size}. Remove it."
            )
        with _PIL_LOCK, reraise_read_errors(name):
            correct_tiles(image)
            depth = read_bit_depth(image)
            pil_image = _apply_orientation(image)
            pil_image = pil_image.copy() if pil_image is image else pil_image
        pil_image = reduce_to_8_bits(
            pil_image, depth, name=name, pixel_range=pixel_range, warn=warn
        )
    else:
        with reraise_read_errors(name):
            pil_image = _from_pixels(as_array(image, name), pixel_range)
        return _to_rgb(pil_image, name)  # its alpha was checked when X was validated
    if warn is not None and hides_pixels(pil_image):
        warn(
            "transparency",
            f"Image {name} is transparent everywhere, and therefore white, although "
            "its pixels have several colors. If its fourth channel is not "
            "transparency, pass Image.open(path).convert('RGB'), or an array of three "
            "channels.",
        )
    return _to_rgb(pil_image, name)


def describe(image: object, index: int | str) -> str:
    """Return the name of an image in error messages: its index and path or type."""
    name = row_name(index)
    if isinstance(image, str | os.PathLike):
        # repr() makes names that are not valid UTF-8 printable.
        return f"{name} ({str(os.fsdecode(image))!r})"
    return f"{name} ({type(image).__name__})"


def row_name(index: int | str) -> str:
    """Return the name of a row: ``"X[3]"`` for 3; other names are given as such."""
    return index if isinstance(index, str) else f"X[{index}]"


def as_array(values: Any, name: str) -> npt.NDArray[Any]:
    """Convert an array-like object to a NumPy array, without a copy where possible.

    Parameters
    ----------
    values : array-like
        Object with ``__array__``, or nested sequences of numbers.
    name : str
        Its name in error messages: "X" or "X[3]".

    Returns
    -------
    ndarray

    Raises
    ------
    ValueError
        If it is a torch tensor that cannot be converted: because of its device, its
        dtype, or because it requires gradients.
    """
    if isinstance(values, np.ndarray):
        return values
    try:
        return np.asarray(values)
    except (RuntimeError, TypeError) as error:
        if not hasattr(values, "detach"):
            raise
        raise ValueError(
            f"{name} is a tensor that cannot be converted to a NumPy array: {error} "
            "Pass tensor.detach().cpu() instead (and .float() if its dtype is "
            "bfloat16)."
        ) from error


@contextmanager
def reraise_read_errors(name: str) -> Iterator[None]:
    """Reraise any error as a ValueError that names the image."""
    try:
        yield
    except MemoryError as error:
        # Not a ValueError: the size of the image was checked, so that the cause is more
        # likely the machine than the image.
        error.add_note(f"While decoding image {name}.")
        raise
    except Exception as error:
        # All exceptions on purpose: for damaged files, Pillow's parsers raise not only
        # OSError, but SyntaxError, struct.error, KeyError, TypeError and others.
        raise ValueError(
            f"Cannot read image {name}: {_reason(error)}. Replace or remove it."
        ) from error


def _reason(error: Exception) -> str:
    """Describe an error in one printable phrase."""
    if isinstance(error, Image.DecompressionBombError):
        text = f"{str(error).rstrip('.')} (set by PIL.Image.MAX_IMAGE_PIXELS)"
    elif isinstance(error, OSError) and error.strerror:
        # The full message of an OSError repeats the path.
        text = error.strerror
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            text += _path_advice(error.filename)
    else:
        text = str(error).rstrip(".") or type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _path_advice(path: object) -> str:
    """Say where a path that leads to no file starts, if it is relative."""
    if not isinstance(path, str | bytes | os.PathLike) or os.path.isabs(path):
        return ""
    try:
        folder = repr(os.getcwd())
    except FileNotFoundError:
        folder = "the working directory, which was deleted"
    advice = f"; a relative path starts from {folder}"
    if os.fsdecode(path).startswith("~"):
        advice += ", and '~' is not expanded: use os.path.expanduser"
    return advice


def open_regular_file(path: str | os.PathLike[Any], name: str) -> IO[bytes]:
    """Open a regular file; reading a pipe or a device might block, or never end.

    Parameters
    ----------
    path : str or path-like
        Path of the file.
    name : str
        Name of the image in error messages, from `describe`.

    Returns
    -------
    binary file

    Raises
    ------
    ValueError
        If the path is not a regular file, or cannot be opened.
    """
    with reraise_read_errors(name):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise ValueError(
            f"Cannot read image {name}: its path must be that of a regular file. Got "
            f"{kind}. Replace or remove it."
        )
    with reraise_read_errors(name):
        # Not opened by Pillow, which memory-maps the files that it opens: if another
        # process truncates a mapped file, reading it ends this process by SIGBUS.
        return open(path, "rb")


def _read_file(
    file: IO[bytes],
    name: str,
    extension: str,
    pixel_range: PixelRange,
    min_decode_size: int | None,
    options: FileOptions,
    warn: WarnOnce | None,
) -> Image.Image:
    """Read the first frame of an open file, upright and with at most 8 bits."""
    image, depth = _open_file(file, name, extension, options)
    with reraise_read_errors(name):
        size = image.size if depth.packed is None else depth.packed.size
        if min_decode_size is not None:
            image.draft(None, (min_decode_size, min_decode_size))
        n_pixels = count_pixels(image, size, file, options)
    if n_pixels > options.max_pixels:
        raise ValueError(explain_size(image, size, n_pixels, name, options))
    scaling: Any = {"name": name, "pixel_range": pixel_range, "warn": warn}
    if not needs_all_bits(image, depth, pixel_range):
        is_supported = can_read_all_bits(image)
        with reraise_read_errors(name):
            upright = _load(image, depth)
        if not (is_supported and has_only_small_values(upright, depth)):
            return reduce_to_8_bits(upright, depth, **scaling)
    with reraise_read_errors(name):
        mode, values, depth = read_all_bits(
            file,
            depth,
            open_again=lambda: open_image(file, options)[0],
            load=_apply_orientation,
        )
    transparent = image.info.get("transparency")
    return scale_all_bits(mode, values, depth, transparent=transparent, **scaling)


def _open_file(
    file: IO[bytes], name: str, extension: str, options: FileOptions
) -> tuple[ImageFile, BitDepth]:
    """Open a file without loading its pixels."""
    with reraise_read_errors(name):
        is_empty = not file.read(1)
    if is_empty:
        raise ValueError(
            f"Cannot read image {name}: it is empty (0 bytes). Replace or remove it."
        )
    with reraise_read_errors(name):
        try:
            return open_image(file, options)
        except UnidentifiedImageError:
            rejection = explain_rejection(file, name, extension, options)
    raise ValueError(rejection)


def _load(image: ImageFile, depth: BitDepth) -> Image.Image:
    """Load the pixels of a file, upright."""
    if depth.packed is None:
        return _apply_orientation(image)
    allocate_pixels(image)
    return _apply_orientation(unpack(image, depth.packed))


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Load the pixels, and apply the orientation, if there is one."""
    allocate_pixels(image)
    transposition = load_with_transposition(image)
    image = correct_transparency(image)
    return image if transposition is None else image.transpose(transposition)


def _from_pixels(pixels: npt.NDArray[Any], pixel_range: PixelRange) -> Image.Image:
    """Convert an array of shape (height, width[, 1, 3 or 4]) to an image."""
    values = to_uint8(pixels, pixel_range)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]  # (height, width, 1) -> (height, width)
    return Image.fromarray(np.ascontiguousarray(values))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an image of 8 bits to RGB according to the table at the top."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    with reraise_read_errors(name):
        if image.mode in _ALPHA_MODES or image.has_transparency_data:
            return _composite_on_white(image)
        if image.mode in _CONVERTIBLE_MODES:
            return image.convert("RGB")
    raise ValueError(
        f"Image {name} has the unsupported Pillow mode {image.mode!r}. Convert it to "
        "'RGB'."
    )


def _composite_on_white(image: Image.Image) -> Image.Image:
    """Composite an image with any kind of transparency on a white background."""
    if image.mode == "La":
        image = image.convert("LA")  # Pillow drops the alpha of a direct conversion
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white
