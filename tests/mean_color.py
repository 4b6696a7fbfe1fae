"""A minimal estimator of images, and helpers for the tests of their validation."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin

from sktl._images.sequence import ImageSequence
from sktl._images.validation import validate_images

RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (3, 6, 5), dtype=np.uint8)


class MeanColor(TransformerMixin, BaseEstimator):
    """Transformer to the mean color of each image, based on `validate_images` only."""

    def __init__(self, image_shape="auto", pixel_range="auto"):
        self.image_shape = image_shape
        self.pixel_range = pixel_range

    def validate(self, X, reset=False) -> ImageSequence:
        return validate_images(
            X,
            estimator=self,
            reset=reset,
            image_shape=self.image_shape,
            pixel_range=self.pixel_range,
        )

    def fit(self, X, y=None):
        self.validate(X, reset=True)
        return self

    def transform(self, X):
        means = [pixels.mean((0, 1)) for pixels in decode_all(self.validate(X))]
        return np.array(means, dtype=np.float32)

    def get_feature_names_out(self, input_features=None):
        return np.array(["red", "green", "blue"], dtype=object)

    def __sklearn_tags__(self):  # noqa: D105
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def decode_all(images: ImageSequence) -> list[np.ndarray]:
    """Return the pixels of all images, and check that they are RGB."""
    pil_images = [images[index] for index in range(len(images))]
    assert {image.mode for image in pil_images} <= {"RGB"}
    return [np.asarray(image) for image in pil_images]


def check_images(X, expected, **params) -> None:
    """Check that `fit` and `transform` both decode the expected pixels from X."""
    for reset in (True, False):
        result = decode_all(MeanColor(**params).validate(X, reset=reset))
        assert len(result) == len(expected)
        for pixels, expected_pixels in zip(result, expected, strict=True):
            np.testing.assert_array_equal(pixels, expected_pixels)


def repeat_grey(grey: np.ndarray) -> np.ndarray:
    """Repeat grey values along a new last axis of three channels."""
    return np.repeat(np.asarray(grey)[..., np.newaxis], 3, axis=-1)


def encode_png(pixels: np.ndarray) -> bytes:
    """Return the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def save_stack(folder: Path) -> list[str]:
    """Write the images of STACK to PNG files, and return their paths."""
    paths = [str(folder / f"{i}.png") for i in range(len(STACK))]
    for path, pixels in zip(paths, STACK, strict=True):
        Path(path).write_bytes(encode_png(pixels))
    return paths
