"""One image, whatever it is kept in, as upright RGB.

Every image file goes through Pillow: on damaged files Pillow raises, where other
decoders have been seen to crash the process. Pillow's own ``convert("RGB")`` however
clips 16-bit and float images and shows what transparency was meant to hide, so the
road from each mode to RGB is written down here:

==========================  ====================================================
mode of the image         what becomes of it
==========================  ====================================================
``1``, ``L``, ``RGB``       as it is; grey three times
``RGBA``, ``RGBa``, ``LA``, over white, as is any ``1``, ``L``, ``P`` or ``RGB``
``La``, ``PA``              image that names a transparent colour
``P``                       looked up in the palette
``CMYK``, ``YCbCr``,        Pillow's conversion; embedded colour profiles are
``HSV``, ``LAB``, ``RGBX``  not applied
``I;16`` and its variants   16-bit grey: 0 is black and 65535 white, or what an
                            explicit ``pixel_range`` says (12 bits kept in 16)
``I``, ``F``                32-bit integers and floats: by an explicit
                            ``pixel_range``; without one only floats that all
                            lie in [0, 1] are taken, anything else is refused
==========================  ====================================================

``pixel_range`` applies to arrays and to the last two rows of the table; files of 8
bits a channel say themselves what black and white are. An EXIF orientation is obeyed,
broken EXIF data is not. Of an animation or a file of many pages the first is taken, of
a PIL image the frame it stands at.

Two things are Pillow's and left so. Colour images of 16 bits a channel are read with
8. The transparent colour of a grey PNG of 2 or 4 bits, or of a colour PNG of 16 bits a
channel, is compared with pixels already scaled to 8 bits, and so is rarely found.
"""

import io
import math
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

PixelRange = tuple[float, float] | Literal["auto"]

#: Largest image read from a file or from bytes, in pixels. It is the size at which
#: Pillow begins to warn of decompression bombs, and does not move with the user's
#: ``PIL.Image.MAX_IMAGE_PIXELS``. Pillow's warning comes first, from inside
#: ``Image.open``; it cannot be kept back without changing the state of other threads.
MAX_PIXELS = 89_478_485

# The formats that may be opened; among the others are some that start a program
# (EPS) or see little use and little testing. MPO comes with JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# ImageOps.exif_transpose would do, but it also writes the EXIF data anew, and with
# broken data fails at that.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_CONVERTIBLE = ("1", "L", "P", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")

# A PIL image opened from a file reads its pixels when they are first asked for, which
# changes it; the same image may stand in several rows.
_PIL_LOCK = threading.Lock()


def decode(
    image: Any,
    *,
    row: int,
    pixel_range: PixelRange,
    content: bytes | None = None,
    min_decode_size: int | None = None,
) -> Image.Image:
    """Give one image as upright RGB.

    Parameters
    ----------
    image : str, os.PathLike, bytes, PIL.Image.Image or array-like
        The path of a file, the content of a file, an image, or its pixels, of shape
        (height, width) or (height, width, channels) with 1, 3 or 4 channels.
    row : int
        Where the image stands in X, for error messages.
    pixel_range : tuple of two floats or "auto"
        Values of black and white; see `to_uint8`.
    content : bytes, optional
        What the file at the path holds, where it has been read already.
    min_decode_size : int, optional
        Of JPEG files, decode every second, fourth or eighth pixel (averages of them)
        as long as the shorter side keeps that many. None decodes all.

    Returns
    -------
    PIL.Image.Image
        Mode "RGB", shares no memory with `image`.

    Raises
    ------
    ValueError
        If the image cannot be read, naming the row, the path and the reason.
    """
    name = describe(image, row)
    if isinstance(image, bytes):
        content = image
    if content is not None:
        pil_image = _from_file(io.BytesIO(content), name, min_decode_size)
    elif isinstance(image, str | os.PathLike):
        with open_regular(image, name) as file:
            pil_image = _from_file(file, name, min_decode_size)
    elif isinstance(image, Image.Image):
        with _PIL_LOCK, reraise_naming(name):
            pil_image = _upright(image)
            pil_image = pil_image.copy() if pil_image is image else pil_image
    else:
        with reraise_naming(name):
            pil_image = _from_pixels(as_array(image, name), pixel_range)
    return _to_rgb(pil_image, name, pixel_range)


def describe(image: object, row: int) -> str:
    """Name a row in an error message, by its path where it has one."""
    if isinstance(image, str | os.PathLike):
        # repr() makes names printable that are not valid UTF-8.
        return f"X[{row}] ({str(os.fsdecode(image))!r})"
    return f"X[{row}] ({type(image).__name__})"


def as_array(values: Any, name: str) -> npt.NDArray[Any]:
    """Give an array-like object as a NumPy array, without a copy where possible.

    Parameters
    ----------
    values : array-like
        Anything with ``__array__``, or nested sequences of numbers.
    name : str
        What to call it in an error message: "X" or "X[3]".

    Returns
    -------
    ndarray

    Raises
    ------
    ValueError
        If it is a torch tensor that NumPy cannot look into: on another device, part of
        a graph of gradients, or of a type NumPy does not have.
    """
    if isinstance(values, np.ndarray):
        return values
    try:
        return np.asarray(values)
    except (RuntimeError, TypeError) as error:
        if not hasattr(values, "detach"):
            raise
        raise ValueError(
            f"{name} is a tensor that NumPy cannot read: {error} Pass "
            "tensor.detach().cpu() instead (and .float() if its dtype is bfloat16)."
        ) from error


def black_and_white(
    dtype: np.dtype[Any], pixel_range: PixelRange
) -> tuple[float, float]:
    """Give the values of black and white in arrays of a dtype.

    Parameters
    ----------
    dtype : numpy.dtype
        Of booleans, integers or floats.
    pixel_range : tuple of two floats or "auto"
        "auto" is the full range of an integer dtype, and (0, 1) for floats. Booleans
        are black (False) and white (True) whatever it says.

    Returns
    -------
    tuple of two floats
    """
    if dtype.kind == "b" or (dtype.kind == "f" and pixel_range == "auto"):
        return 0, 1
    if pixel_range == "auto":
        limits = np.iinfo(dtype)
        return limits.min, limits.max
    return pixel_range


def to_uint8(
    values: npt.NDArray[Any], pixel_range: PixelRange
) -> npt.NDArray[np.uint8]:
    """Scale pixels so that black is 0 and white 255.

    ``round((value - black) / (white - black) * 255)``, values beyond black and white
    clipped to them. ``uint8`` with its own range is returned as it is, not copied.

    Parameters
    ----------
    values : ndarray of any shape
        Booleans, integers or finite floats.
    pixel_range : tuple of two floats or "auto"
        See `black_and_white`.

    Returns
    -------
    ndarray of the same shape, uint8
    """
    black, white = black_and_white(values.dtype, pixel_range)
    if values.dtype == np.uint8 and (black, white) == (0, 255):
        return values
    scaled = values.astype(np.float64)
    # In place: each step would need eight bytes more for each value of a large image.
    scaled -= black
    scaled /= white - black
    scaled *= 255
    return np.rint(scaled.clip(0, 255, out=scaled), out=scaled).astype(np.uint8)


@contextmanager
def reraise_naming(name: str) -> Iterator[None]:
    """Turn whatever goes wrong with an image into a ValueError that names it."""
    try:
        yield
    except MemoryError as error:
        # More likely this machine than the image, whose size was checked.
        error.add_note(f"While decoding {name}.")
        raise
    except Exception as error:
        # Broad on purpose: on damaged files Pillow raises, besides OSError, whatever
        # its parsers stumble over: SyntaxError, struct.error, KeyError, TypeError ...
        raise ValueError(
            f"{name} is not an image that can be read: {_reason(error)}. Replace or "
            "remove it."
        ) from error


def _reason(error: Exception) -> str:
    """Say in one printable phrase what an error is about."""
    if isinstance(error, UnidentifiedImageError):
        # Pillow's text is the repr of an open file.
        text = f"it is damaged, or none of {', '.join(_FORMATS)}"
    elif isinstance(error, OSError) and error.strerror:
        # The rest of an OSError's text is the path again.
        text = error.strerror
    else:
        text = str(error).rstrip(".") or type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def open_regular(path: str | os.PathLike[Any], name: str) -> IO[bytes]:
    """Open a regular file; anything else might block, or never end.

    Parameters
    ----------
    path : str or path-like
        Of the file.
    name : str
        What to call it in an error message, from `describe`.

    Returns
    -------
    binary file

    Raises
    ------
    ValueError
        If it cannot be opened.
    """
    with reraise_naming(name):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise ValueError(
            f"{name} is not an image that can be read: a path must lead to a regular "
            f"file, this one leads to {kind}. Replace or remove it."
        )
    with reraise_naming(name):
        # Opened here, not by Pillow, which maps files it opens itself into memory: a
        # file that another process then cuts short would end this one with SIGBUS.
        return open(path, "rb")


def _from_file(file: IO[bytes], name: str, min_decode_size: int | None) -> Image.Image:
    """Read the first image of an open file, upright, in the mode it is kept in."""
    with reraise_naming(name):
        is_empty = not file.read(1)
    if is_empty:
        raise ValueError(
            f"{name} is not an image that can be read: it is empty (0 bytes). "
            "Replace or remove it."
        )
    with reraise_naming(name):
        image = Image.open(file, formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{name} has {image.width} x {image.height} pixels; files of more than "
            f"{MAX_PIXELS} pixels are not decoded, as they can exhaust the memory. "
            "Shrink it, or pass it as a PIL image or an array."
        )
    with reraise_naming(name):
        if min_decode_size is not None:
            image.draft(None, (min_decode_size, min_decode_size))
        return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    """Load the pixels and turn them as EXIF says; if it is silent, no new object."""
    image.load()  # a PNG may keep its EXIF data behind the pixels
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Warning:
        raise  # of users who made warnings errors, and for whom nothing is let pass
    except Exception:
        # EXIF data is a remark on the image, often mangled by editing programs, and
        # broken in as many ways as files are. The pixels are sound; viewers show them
        # unturned, and so do we.
        orientation = None
    if orientation not in _TRANSPOSITIONS:
        return image
    return image.transpose(_TRANSPOSITIONS[orientation])


def _from_pixels(pixels: npt.NDArray[Any], pixel_range: PixelRange) -> Image.Image:
    """Make an image of an array of shape (height, width[, 1, 3 or 4])."""
    values = to_uint8(pixels, pixel_range)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]  # (height, width, 1) -> (height, width)
    return Image.fromarray(np.ascontiguousarray(values))


def _to_rgb(image: Image.Image, name: str, pixel_range: PixelRange) -> Image.Image:
    """Convert by the table at the top of this file."""
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: its size is {image.size}. Remove it.")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _DEEP_GREY:
        grey = _deep_grey(image, name, pixel_range)
        return Image.fromarray(grey).convert("RGB")
    with reraise_naming(name):
        if image.mode in _TRANSPARENT or image.has_transparency_data:
            return _over_white(image)
        if image.mode in _CONVERTIBLE:
            return image.convert("RGB")
    raise ValueError(
        f"{name} has Pillow's mode {image.mode!r}, for which no conversion to RGB is "
        "known. Convert it to 'RGB' yourself."
    )


def _over_white(image: Image.Image) -> Image.Image:
    """Lay an image with transparency of any kind on white paper."""
    if image.mode == "La":
        image = image.convert("LA")  # Pillow drops the alpha of a direct conversion
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _deep_grey(
    image: Image.Image, name: str, pixel_range: PixelRange
) -> npt.NDArray[np.uint8]:
    """Scale grey of 16 or 32 bits, given as (height, width), to 8 bits."""
    values = np.asarray(image)
    advice = "Set pixel_range=(black, white)."
    if image.mode == "F":
        least, most = float(values.min()), float(values.max())
        if not math.isfinite(least + most):
            raise ValueError(
                f"{name} has pixels that are NaN or infinite. Replace or remove it."
            )
        if pixel_range == "auto" and (least < 0 or most > 1):
            raise ValueError(
                f"{name} holds floats from {least:g} to {most:g} (mode 'F'), of which "
                f"only those in [0, 1] have a known black and white. {advice}"
            )
    elif image.mode == "I" and pixel_range == "auto":
        raise ValueError(
            f"{name} holds 32-bit integers (mode 'I'), whose black and white are not "
            f"known; its values go from {values.min()} to {values.max()}. {advice}"
        )
    grey = to_uint8(values, pixel_range)
    transparent = image.info.get("transparency")
    return grey if transparent is None else np.where(values == transparent, 255, grey)
