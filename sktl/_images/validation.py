"""Validation of X: any supported form of images as a lazy sequence of RGB images.

======================================  ==============================================
X                                       one element or row
======================================  ==============================================
list, tuple, 1-D array, pandas or       a path (``str`` or ``os.PathLike``), ``bytes``
polars Series, one-column DataFrame,    (the content of an image file), a PIL image,
(n_samples, 1) array of strings or      or an array or tensor of shape (height, width)
objects                                 or (height, width, 1, 3 or 4); types and sizes
                                        may be mixed
numbers, (n_samples, n_features)        a flattened image, see ``image_shape``
numbers, (n_samples, height, width)     grey
numbers, (n_samples, height, width, c)  grey, RGB or RGBA: c is 1, 3 or 4
======================================  ==============================================

The channels of arrays and tensors come last. X is classified by the types of its
elements and not by its number of dimensions alone, so that a vector of numbers still
raises scikit-learn's error.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from numbers import Number
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.base import BaseEstimator
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data

from sktl._images.alpha import is_nowhere_opaque, warn_of_alpha
from sktl._images.decode import as_array, describe
from sktl._images.file_formats import FileOptions
from sktl._images.flattened import (
    CHANNELS,
    ImageShape,
    check_image_shape,
    infer_flattened_shape,
    unflatten,
)
from sktl._images.pixel_values import (
    PixelRange,
    check_pixel_range,
    check_pixel_values,
)
from sktl._images.sequence import ImageSequence
from sktl._images.unsupported import check_container, check_element
from sktl._utils.labels import is_missing

_DEFAULT_OPTIONS = FileOptions()
_SINGLE_IMAGE_TYPES = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
_FILE_OR_PIL_TYPES = (str, bytes, os.PathLike, Image.Image)
_FEATURE_ATTRIBUTES = ("n_features_in_", "feature_names_in_")
# At least two letters: a single one is a drive of Windows.
_URL = re.compile(r"([a-z][a-z0-9+.-]+://|data:)", re.IGNORECASE)


def validate_images(
    X: Any,
    *,
    estimator: BaseEstimator,
    reset: bool,
    image_shape: ImageShape = "auto",
    pixel_range: PixelRange = "auto",
    file_options: FileOptions = _DEFAULT_OPTIONS,
) -> ImageSequence:
    """Validate X and convert it to a lazy sequence of images.

    No file is opened here: each image is read when it is accessed.

    Parameters
    ----------
    X : see the table at the top of this file
        Images.
    estimator : BaseEstimator
        Estimator that X is passed to. For 2-D input and one-column DataFrames its
        ``n_features_in_`` and ``feature_names_in_`` are set or checked as in
        scikit-learn. Other images have no number of features and may have any size.
    reset : bool
        Whether to set these attributes (in ``fit``) or to check them (elsewhere).
    image_shape : tuple of two or three ints, or "auto"
        For 2-D input, shape of the flattened images; see `infer_flattened_shape`.
    pixel_range : tuple of two floats or "auto"
        Values of black and white in arrays, and in files of more than 8 bits per
        channel. "auto": the range that a file defines, the full range of an integer
        dtype, and (0, 1) for floats, whatever the values are. Booleans are black and
        white. Values outside the range are clipped, with one warning.
    file_options : FileOptions, optional
        Formats and sizes of the files and bytes that are decoded.

    Returns
    -------
    ImageSequence
        Of length n_samples.

    Raises
    ------
    TypeError
        If X is a single image, a mapping, a set, an iterator or a dataset of torch, or
        if X or one of its elements is an open file.
    ValueError
        If X or one of its elements is not a supported image. Arrays of up to two
        dimensions are checked by scikit-learn and raise its errors.
    """
    check_image_shape(image_shape)
    check_pixel_range(pixel_range)
    X = _convert_array_likes(X)
    column = _get_image_column(X)
    if column is not None:
        check_pixel_values(_check_elements(column, pixel_range), pixel_range)
        if _is_dataframe(X) and (reset or hasattr(estimator, "n_features_in_")):
            validate_data(estimator, X, reset=reset, skip_check_array=True)
        elif reset:
            _delete_feature_attributes(estimator)
        return ImageSequence(column, pixel_range, file_options=file_options)
    if getattr(X, "shape", None) == (0,):
        # check_array would report the number of dimensions instead.
        raise ValueError(
            "Found array with 0 sample(s) (shape=(0,)) while a minimum of 1 is "
            f"required by {estimator.__class__.__name__}. If X comes from load_files, "
            "the images must be in one folder per class. List the images of a flat "
            "folder by sorted(Path(folder).glob('*.jpg'))."
        )
    if isinstance(X, np.ndarray) and X.ndim > 2:
        _check_stack_shape(X.shape)
        if X.dtype == object:
            # scikit-learn would convert integers to floats, which have another range.
            raise ValueError(
                f"X has shape {X.shape} and dtype object, for which the values of "
                "black and white are unknown. Pass a list of arrays, or "
                "np.stack(list_of_arrays)."
            )
        X = check_array(
            X, ensure_2d=False, allow_nd=True, estimator=estimator, input_name="X"
        )
        flattened_shape = None
        if reset:
            _delete_feature_attributes(estimator)
    else:
        X = validate_data(estimator, _convert_nullable_integers(X), reset=reset)
        flattened_shape = infer_flattened_shape(X.shape[1], image_shape)
    check_pixel_values([("X", X)], pixel_range, is_stack=True)
    stack = X if flattened_shape is None else unflatten(X, flattened_shape)
    for index, pixels in enumerate(stack):
        if is_nowhere_opaque(pixels, pixel_range):
            warn_of_alpha(f"X[{index}]")
            break  # warn only once
    return ImageSequence(X, pixel_range, flattened_shape, file_options=file_options)


def _convert_nullable_integers(X: Any) -> Any:
    """Convert nullable integer columns of a pandas DataFrame to NumPy dtypes.

    scikit-learn would convert them to floats, which have another range.
    """
    if not _is_instance(X, "pandas", "DataFrame") or not X.columns.is_unique:
        return X
    types = {name: getattr(t, "numpy_dtype", t) for name, t in X.dtypes.items()}
    kinds = {getattr(t, "kind", "O") for t in types.values()}
    return X.astype(types) if kinds <= {"i", "u"} and not X.isna().any(axis=None) else X


def _convert_array_likes(X: Any) -> Any:
    """Convert array-likes and sequences of numbers to arrays."""
    if isinstance(X, _SINGLE_IMAGE_TYPES):
        got, advice = f"a single {type(X).__name__}", "a list of one image: [X]"
        if isinstance(X, str | os.PathLike) and os.path.isdir(X):
            got = f"the folder {os.fspath(X)!r}"
            advice = "load_files(X, load_content=False).filenames of sklearn.datasets"
        raise TypeError(f"X must be a sequence of images. Got {got}. Pass {advice}.")
    if _is_dataframe(X) or _is_series(X):
        return X
    if hasattr(X, "__array__") and not isinstance(X, Sequence):
        return as_array(X, "X")
    if hasattr(X, "shape"):
        return X  # a sparse matrix, for example: scikit-learn raises the error
    X = check_container(X)
    if isinstance(X, Sequence):
        return X if _contains_images(X) else as_array(X, "X")
    return X  # unsupported: scikit-learn raises the error


def _get_image_column(X: Any) -> Any | None:
    """Return X as a one-dimensional sequence of images; None if it contains numbers."""
    if _is_dataframe(X) or (isinstance(X, np.ndarray) and X.ndim == 2):
        if X.shape[1] != 1:
            _check_no_image_column(X)
            return None
        column = X.iloc[:, 0] if hasattr(X, "iloc") else X[:, 0]
    else:
        column = X
    if isinstance(column, np.ndarray):
        if column.dtype.kind == "S":
            raise ValueError(
                "X has the NumPy dtype 'S', which strips trailing zero bytes from its "
                "elements. Pass a list of bytes, or paths as str."
            )
        if column.ndim != 1 or column.dtype.kind not in "OUT":
            return None
    elif not (isinstance(column, Sequence) or _is_series(column)):
        return None
    if not _contains_images(column):
        return None
    if isinstance(column, np.ndarray):
        return column.tolist()  # accessing single NumPy strings is slow
    # .array of a pandas Series is indexed by position, the Series itself by label.
    return column.array if hasattr(column, "iloc") else column


def _check_no_image_column(X: Any) -> None:
    """Raise ValueError if one of several columns of a table contains images."""
    head = X[:100] if isinstance(X, np.ndarray) else X.head(100).to_numpy()
    if head.dtype.kind in "OUT" and any(
        isinstance(value, _FILE_OR_PIL_TYPES) for value in head.ravel()
    ):
        raise ValueError(
            f"X must have a single column of paths or images. Got {X.shape[1]} "
            "columns, some of which contain paths or images. Select one, e.g. "
            "X[['path']], or select it in a sklearn.compose.ColumnTransformer."
        )


def _contains_images(elements: Iterable[Any]) -> bool:
    """Return whether any element of a one-dimensional container is not numeric."""
    return any(not _is_numeric(element) for element in elements)


def _is_numeric(element: Any) -> bool:
    """Return whether an element is a number or a one-dimensional sequence."""
    if isinstance(element, _SINGLE_IMAGE_TYPES):
        return False
    if isinstance(element, Number | np.generic | Sequence):
        return True
    return hasattr(element, "__array__") and getattr(element, "ndim", 1) < 2


def _check_elements(
    images: Iterable[Any], pixel_range: PixelRange
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Check each image without opening files, and yield those that are arrays."""
    without_opaque_pixel = ""
    for index, image in enumerate(images):
        if isinstance(image, str) and image:  # the most frequent case
            if ":" not in image or not _URL.match(image):
                continue
            raise ValueError(
                f"{describe(image, index)} is a URL; images are not downloaded. "
                "Download it and pass the path of the file."
            )
        if _is_missing(image):
            raise ValueError(
                f"X[{index}] is missing ({image!r}). Each element of X must be an "
                "image. Remove it from X and y, or replace it."
            )
        if isinstance(image, _FILE_OR_PIL_TYPES):
            continue
        check_element(image, index)
        if not hasattr(image, "__array__") or isinstance(image, np.generic):
            raise ValueError(
                f"X[{index}] is of type {type(image).__name__}, not an image. Pass a "
                "path, bytes (the content of an image file), a PIL image, or an "
                "array of shape (height, width) or (height, width, channels)."
            )
        pixels = as_array(image, f"X[{index}]")
        _check_image_array_shape(pixels.shape, index)
        yield f"X[{index}]", pixels
        if not without_opaque_pixel and is_nowhere_opaque(pixels, pixel_range):
            without_opaque_pixel = f"X[{index}]"
    if without_opaque_pixel:
        warn_of_alpha(without_opaque_pixel)


def _is_missing(image: Any) -> bool:
    """Return whether an element is None, NaN, pandas' NA or NaT, or an empty string."""
    if isinstance(image, str | bytes):
        return not image
    return is_missing(image)


def _check_image_array_shape(shape: tuple[int, ...], index: int) -> None:
    """Raise ValueError if an element of X does not have the shape of one image."""
    if 0 in shape:
        raise ValueError(f"X[{index}] has no pixels: its shape is {shape}. Remove it.")
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in CHANNELS):
        return
    advice = ""
    if len(shape) == 3 and shape[0] in CHANNELS:
        advice = (
            " Its channels seem to come first: pass array.transpose(1, 2, 0) or "
            "tensor.permute(1, 2, 0)."
        )
    raise ValueError(
        f"X[{index}] has shape {shape}; one image must have shape (height, width) or "
        f"(height, width, channels) with 1, 3 or 4 channels, channels last.{advice}"
    )


def _check_stack_shape(shape: tuple[int, ...]) -> None:
    """Raise ValueError if an array of 3 or more dimensions is not a stack of images."""
    if len(shape) == 3 and shape[2] in (3, 4):
        raise ValueError(
            f"X has shape {shape} and looks like one color image, not like a stack of "
            "grey images of shape (n_samples, height, width). Pass X[np.newaxis], or "
            "X[..., np.newaxis] if it is a stack of narrow grey images."
        )
    if 0 in shape[1:]:
        raise ValueError(f"X has shape {shape}; its images have no pixels.")
    if len(shape) == 3 or (len(shape) == 4 and shape[3] in CHANNELS):
        return
    advice = ""
    if len(shape) == 4 and shape[1] in CHANNELS:
        advice = (
            " Its channels seem to come first: pass X.transpose(0, 2, 3, 1) or, for a "
            "torch tensor, X.permute(0, 2, 3, 1)."
        )
    raise ValueError(
        f"X has shape {shape}; a stack of images must have shape (n_samples, height, "
        "width) or (n_samples, height, width, channels) with 1, 3 or 4 channels, "
        f"channels last.{advice}"
    )


def copy_feature_metadata(estimator: BaseEstimator, checked: BaseEstimator) -> None:
    """Copy ``n_features_in_`` and ``feature_names_in_`` from a copy of an estimator.

    An estimator validates X on a copy of itself, so that a failed ``fit`` does not
    modify it. This sets its attributes once ``fit`` has succeeded.

    Parameters
    ----------
    estimator : BaseEstimator
        Estimator to modify.
    checked : BaseEstimator
        Copy of it that was passed to `validate_images`.
    """
    _delete_feature_attributes(estimator)
    for name in _FEATURE_ATTRIBUTES:
        if hasattr(checked, name):
            setattr(estimator, name, getattr(checked, name))


def _delete_feature_attributes(estimator: BaseEstimator) -> None:
    """Delete the attributes of an earlier fit on a table; images have no features."""
    for name in _FEATURE_ATTRIBUTES:
        if hasattr(estimator, name):
            delattr(estimator, name)


def _is_dataframe(X: object) -> bool:
    return _is_instance(X, "pandas", "DataFrame") or _is_instance(
        X, "polars", "DataFrame"
    )


def _is_series(X: object) -> bool:
    return _is_instance(X, "pandas", "Series") or _is_instance(X, "polars", "Series")


def _is_instance(X: object, module: str, class_: str) -> bool:
    """Return whether X is an instance of a class of a library, without importing it."""
    return isinstance(X, getattr(sys.modules.get(module), class_, ()))
