"""What counts as images: X, in any of its forms, as a sequence of RGB images.

======================================  ==============================================
X                                       one row is
======================================  ==============================================
list, tuple, 1-D array, pandas or       a path (``str`` or ``os.PathLike``), ``bytes``
polars Series, one-column DataFrame,    (the content of an image file), a PIL image,
(n_samples, 1) array of strings or      or an array or tensor of shape (height, width)
objects                                 or (height, width, 1, 3 or 4); kinds and sizes
                                        may be mixed
numbers, (n_samples, n_features)        a flattened image, see ``image_shape``
numbers, (n_samples, height, width)     grey
numbers, (n_samples, height, width, c)  grey, RGB or RGBA: c is 1, 3 or 4
======================================  ==============================================

Colour channels come last, in arrays and tensors alike. What X is, is told by what its
elements are and never by its number of dimensions alone, so that a vector of numbers
still gets scikit-learn's error for it.
"""

import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from numbers import Integral, Number, Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.base import BaseEstimator
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data

from sktl._images.decode import PixelRange, as_array, black_and_white, describe
from sktl._images.sequence import ImageSequence

ImageShape = tuple[int, int] | tuple[int, int, int] | Literal["auto"]

_ONE_IMAGE = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
_FILE_OR_IMAGE = (str, bytes, os.PathLike, Image.Image)
_CHANNELS = (1, 3, 4)
_FEATURES = ("n_features_in_", "feature_names_in_")
# Two letters at least, for a drive of Windows has one.
_URL = re.compile(r"([a-z][a-z0-9+.-]+://|data:)", re.IGNORECASE)


def validate_images(
    X: Any,
    *,
    estimator: BaseEstimator,
    reset: bool,
    image_shape: ImageShape = "auto",
    pixel_range: PixelRange = "auto",
) -> ImageSequence:
    """Check what a user gave as X and make it a sequence of images.

    No file is opened here: each is read when its row is asked for.

    Parameters
    ----------
    X : see the table at the top of this file
        ImageSequence.
    estimator : BaseEstimator
        On behalf of which X is checked. Of 2-D input and one-column DataFrames its
        ``n_features_in_`` and ``feature_names_in_`` are set or checked as everywhere
        in scikit-learn; other images have no such number, of them any size is fine.
    reset : bool
        True in ``fit``, False elsewhere.
    image_shape : tuple of two or three ints, or "auto"
        For 2-D input, the (height, width) or (height, width, channels) that a row is
        flattened from. "auto": a square of grey pixels; else a square of RGB pixels,
        channels last; else a strip one pixel high, with a warning.
    pixel_range : tuple of two floats or "auto"
        Values of black and white in arrays. "auto": the full range of an integer
        dtype, (0, 1) for floats; never guessed from the values. Booleans are black
        and white. Values beyond it are clipped, with one warning for all.

    Returns
    -------
    ImageSequence
        Of length n_samples.

    Raises
    ------
    TypeError
        If X is one image, or a mapping, a set or an iterator, which have no rows.
    ValueError
        If X or one of its rows is not something that can be an image. Numbers in two
        dimensions, and in too few, meet scikit-learn's own checks and messages.
    """
    _check_image_shape(image_shape)
    _check_pixel_range(pixel_range)
    X = _normalised(X)
    column = _column_of_images(X)
    if column is not None:
        _check_values(_arrays_among(column), pixel_range)
        if _is_frame(X) and (reset or hasattr(estimator, "n_features_in_")):
            validate_data(estimator, X, reset=reset, skip_check_array=True)
        elif reset:
            _forget_features(estimator)
        return ImageSequence(column, pixel_range)
    if getattr(X, "shape", None) == (0,):
        # check_array would complain of the dimension, which is not what is wrong.
        raise ValueError(
            "Found array with 0 sample(s) (shape=(0,)) while a minimum of 1 is "
            f"required by {estimator.__class__.__name__}."
        )
    if isinstance(X, np.ndarray) and X.ndim > 2:
        _check_stack_shape(X.shape)
        if X.dtype == object:
            # scikit-learn would make floats of integers, whose white is another one.
            raise ValueError(
                f"X has shape {X.shape} and dtype object, so black and white are not "
                "known. Pass a list of arrays, or np.stack(list_of_arrays)."
            )
        X = check_array(
            X, ensure_2d=False, allow_nd=True, estimator=estimator, input_name="X"
        )
        row_shape = None
        if reset:
            _forget_features(estimator)
    else:
        X = validate_data(estimator, _plain_integers(X), reset=reset)
        row_shape = _flattened_shape(X.shape[1], image_shape)
    _check_values([("X", X)], pixel_range)
    return ImageSequence(X, pixel_range, row_shape)


def _plain_integers(X: Any) -> Any:
    """Give integer columns of pandas that allow for missing values NumPy's own type.

    scikit-learn would make floats of them, whose white is another one.
    """
    if not _is_instance(X, "pandas", "DataFrame") or not X.columns.is_unique:
        return X
    types = {name: getattr(t, "numpy_dtype", t) for name, t in X.dtypes.items()}
    kinds = {getattr(t, "kind", "O") for t in types.values()}
    return X.astype(types) if kinds <= {"i", "u"} and not X.isna().any(axis=None) else X


def _check_image_shape(image_shape: object) -> None:
    """Refuse an image_shape that is no shape of an image."""
    if isinstance(image_shape, str) and image_shape == "auto":
        return
    if (
        isinstance(image_shape, tuple | list)
        and len(image_shape) in (2, 3)
        and all(isinstance(side, Integral) and int(side) > 0 for side in image_shape)
        and (len(image_shape) == 2 or image_shape[2] in _CHANNELS)
    ):
        return
    raise ValueError(
        "image_shape must be 'auto', (height, width) or (height, width, channels) in "
        f"pixels, with 1, 3 or 4 channels; got {image_shape!r}."
    )


def _check_pixel_range(pixel_range: object) -> None:
    """Refuse a pixel_range that does not span anything."""
    if isinstance(pixel_range, str) and pixel_range == "auto":
        return
    if (
        isinstance(pixel_range, tuple | list)
        and len(pixel_range) == 2
        and all(isinstance(value, Real) for value in pixel_range)
        and 0 < float(pixel_range[1]) - float(pixel_range[0]) < math.inf
    ):
        return
    raise ValueError(
        "pixel_range must be 'auto' or the finite values (black, white), black less "
        f"than white; got {pixel_range!r}."
    )


def _normalised(X: Any) -> Any:
    """Give sequences of numbers and array-likes as arrays, the rest as it is."""
    if isinstance(X, _ONE_IMAGE):
        got, instead = f"a single {type(X).__name__}", "a list of one: [X]"
        if isinstance(X, str | os.PathLike) and os.path.isdir(X):
            got = f"the folder {os.fspath(X)!r}"
            instead = "load_files(X, load_content=False).filenames of sklearn.datasets"
        raise TypeError(f"X must be a sequence of images, got {got}. Pass {instead}.")
    # A sparse matrix of the DOK kind is a mapping too; scikit-learn has words for it.
    if isinstance(X, Mapping | Set | Iterator) and not hasattr(X, "shape"):
        raise TypeError(
            "X must be a sequence of images with an order and a length, got "
            f"{type(X).__name__}. Pass a list, e.g. list(X) or list(X.values())."
        )
    if _is_frame(X) or _is_series(X):
        return X
    if isinstance(X, Sequence):
        return X if _holds_images(X) else as_array(X, "X")
    if hasattr(X, "__array__"):
        return as_array(X, "X")
    return X  # nothing useful: for scikit-learn to say


def _column_of_images(X: Any) -> Any | None:
    """Give X as a sequence of paths, images and the like; None if it is numbers."""
    if _is_frame(X) or (isinstance(X, np.ndarray) and X.ndim == 2):
        if X.shape[1] != 1:
            _refuse_choice_of_columns(X)
            return None
        column = X.iloc[:, 0] if hasattr(X, "iloc") else X[:, 0]
    else:
        column = X
    if isinstance(column, np.ndarray):
        if column.dtype.kind == "S":
            raise ValueError(
                "X has the NumPy dtype 'S', which cuts zero bytes off the end of its "
                "elements. Pass a list of bytes, or paths as str."
            )
        if column.ndim != 1 or column.dtype.kind not in "OUT":
            return None
    elif not (isinstance(column, Sequence) or _is_series(column)):
        return None
    if not _holds_images(column):
        return None
    if isinstance(column, np.ndarray):
        return column.tolist()  # NumPy's strings are slow to take out one by one
    # .array of a pandas Series counts positions where the Series counts labels.
    return column.array if hasattr(column, "iloc") else column


def _refuse_choice_of_columns(X: Any) -> None:
    """Raise if one of several columns of a table holds images."""
    head = X[:100] if isinstance(X, np.ndarray) else X.head(100).to_numpy()
    if head.dtype.kind in "OUT" and any(
        isinstance(value, _FILE_OR_IMAGE) for value in head.ravel()
    ):
        raise ValueError(
            f"X has {X.shape[1]} columns, and paths or images in some of them; one "
            "column can be used at a time. Choose it, e.g. X[['path']], or list it in "
            "a sklearn.compose.ColumnTransformer."
        )


def _holds_images(rows: Iterable[Any]) -> bool:
    """Tell whether a one-dimensional container is more than numbers."""
    return any(not _is_number_or_numbers(row) for row in rows)


def _is_number_or_numbers(row: Any) -> bool:
    if isinstance(row, _ONE_IMAGE):
        return False
    if isinstance(row, Number | np.generic | Sequence):
        return True
    return hasattr(row, "__array__") and getattr(row, "ndim", 1) < 2


def _arrays_among(rows: Iterable[Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Check each row without opening it, and give the arrays among them."""
    for row, image in enumerate(rows):
        if isinstance(image, str) and image:  # most are: no further checks
            if ":" not in image or not _URL.match(image):
                continue
            raise ValueError(
                f"{describe(image, row)} is a URL: images are not fetched from a "
                "network. Download it and pass the path of the file."
            )
        if _is_missing(image):
            raise ValueError(
                f"X[{row}] is missing ({image!r}): each row must hold an image. "
                "Remove the row, here and in y, or fill it in."
            )
        if isinstance(image, _FILE_OR_IMAGE):
            continue
        if not hasattr(image, "__array__") or isinstance(image, np.generic):
            raise ValueError(
                f"X[{row}] is of type {type(image).__name__}, not an image. Pass a "
                "path, bytes (the content of an image file), a PIL image, or an "
                "array of shape (height, width) or (height, width, channels)."
            )
        pixels = as_array(image, f"X[{row}]")
        _check_shape_of_image(pixels.shape, row)
        yield f"X[{row}]", pixels


def _is_missing(image: Any) -> bool:
    """Recognise None, NaN, the NA and NaT of pandas, and the empty string."""
    if isinstance(image, str | bytes):
        return not image
    return (
        image is None
        or (isinstance(image, float | np.floating) and bool(np.isnan(image)))
        or type(image).__name__ in ("NAType", "NaTType")
    )


def _check_shape_of_image(shape: tuple[int, ...], row: int) -> None:
    """Refuse a row that is an array, but not in the shape of one image."""
    if 0 in shape:
        raise ValueError(f"X[{row}] has no pixels: its shape is {shape}. Remove it.")
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in _CHANNELS):
        return
    advice = ""
    if len(shape) == 3 and shape[0] in _CHANNELS:
        advice = (
            " Its channels seem to come first: pass array.transpose(1, 2, 0) or "
            "tensor.permute(1, 2, 0)."
        )
    raise ValueError(
        f"X[{row}] has shape {shape}; one image must have shape (height, width) or "
        f"(height, width, channels) with 1, 3 or 4 channels, channels last.{advice}"
    )


def _check_stack_shape(shape: tuple[int, ...]) -> None:
    """Refuse shapes of three or more dimensions that are no stack of images."""
    if len(shape) == 3 and shape[2] in (3, 4):
        raise ValueError(
            f"X has shape {shape} and looks like one colour image, not like grey "
            "images of shape (n_samples, height, width). Pass X[np.newaxis], or for "
            "grey images that narrow X[..., np.newaxis]."
        )
    if 0 in shape[1:]:
        raise ValueError(f"X has shape {shape}, so its images have no pixels.")
    if len(shape) == 3 or (len(shape) == 4 and shape[3] in _CHANNELS):
        return
    advice = ""
    if len(shape) == 4 and shape[1] in _CHANNELS:
        advice = (
            " Its channels seem to come first: pass X.transpose(0, 2, 3, 1) or, of a "
            "torch tensor, X.permute(0, 2, 3, 1)."
        )
    raise ValueError(
        f"X has shape {shape}; a stack of images must have shape (n_samples, height, "
        "width) or (n_samples, height, width, channels) with 1, 3 or 4 channels, "
        f"channels last.{advice}"
    )


def _flattened_shape(n_features: int, image_shape: ImageShape) -> tuple[int, ...]:
    """Say what shape a row of n_features numbers is flattened from."""
    if image_shape != "auto":
        if math.prod(image_shape) != n_features:
            product = " x ".join(str(side) for side in image_shape)
            raise ValueError(
                f"X has {n_features} features, but image_shape={image_shape} makes "
                f"{product} = {math.prod(image_shape)}. Set image_shape to the shape "
                "that the rows of X were flattened from."
            )
        return tuple(image_shape)
    side = math.isqrt(n_features)
    if side**2 == n_features:
        return side, side
    side = math.isqrt(n_features // 3)
    if 3 * side**2 == n_features:
        return side, side, 3
    warnings.warn(
        f"X has {n_features} features, which is neither a square nor three squares of "
        "pixels: each row is taken as a strip one pixel high. Set "
        "image_shape=(height, width) or (height, width, channels).",
        UserWarning,
        stacklevel=3,
    )
    return 1, n_features


def _check_values(
    arrays: Iterable[tuple[str, npt.NDArray[Any]]], pixel_range: PixelRange
) -> None:
    """Check the values of arrays before any is decoded; warn once, and from here.

    A pass over memory for floats and with an explicit `pixel_range`; else only the
    dtype is looked at.
    """
    too_wide = clipped = ""
    for name, pixels in arrays:
        kind = pixels.dtype.kind
        if kind not in "biuf":
            raise ValueError(
                f"{name} has dtype {pixels.dtype}; pixels must be booleans, integers "
                "or floats."
            )
        if kind == "b" or (kind in "iu" and pixel_range == "auto"):
            if pixels.dtype.itemsize > 2 and not too_wide:
                too_wide = f"{name} has dtype {pixels.dtype}"
            continue
        least, most = float(pixels.min()), float(pixels.max())
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ValueError(
                f"{name} contains NaN or infinity. Replace the values, or the image."
            )
        black, white = black_and_white(pixels.dtype, pixel_range)
        if (least < black or most > white) and not clipped:
            clipped = f"{name} has values from {least:g} to {most:g}"
    if too_wide:
        warnings.warn(
            f"{too_wide}, and pixel_range='auto' takes its full range from black to "
            "white, in which small numbers are all the same grey. Set "
            "pixel_range=(black, white), e.g. (0, 255).",
            UserWarning,
            stacklevel=3,
        )
    if clipped:
        warnings.warn(
            f"{clipped}; what is beyond the values of black and white is clipped "
            f"(pixel_range={pixel_range!r}"
            f"{', for floats (0, 1)' if pixel_range == 'auto' else ''}). Set "
            "pixel_range=(black, white).",
            UserWarning,
            stacklevel=3,
        )


def copy_feature_metadata(estimator: BaseEstimator, checked: BaseEstimator) -> None:
    """Give an estimator what a check found on behalf of a copy of it.

    Parameters
    ----------
    estimator : BaseEstimator
        Whose `fit` went well.
    checked : BaseEstimator
        The copy that `validate_images` was given.
    """
    _forget_features(estimator)
    for name in _FEATURES:
        if hasattr(checked, name):
            setattr(estimator, name, getattr(checked, name))


def _forget_features(estimator: BaseEstimator) -> None:
    """Remove what an earlier fit on a table left: these images have no features."""
    for name in _FEATURES:
        if hasattr(estimator, name):
            delattr(estimator, name)


def _is_frame(X: object) -> bool:
    return _is_instance(X, "pandas", "DataFrame") or _is_instance(
        X, "polars", "DataFrame"
    )


def _is_series(X: object) -> bool:
    return _is_instance(X, "pandas", "Series") or _is_instance(X, "polars", "Series")


def _is_instance(X: object, module: str, class_: str) -> bool:
    """Recognise a class of a library without importing it: X cannot be one before."""
    return isinstance(X, getattr(sys.modules.get(module), class_, ()))
