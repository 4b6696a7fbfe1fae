"""Plain torch and torchvision that tests compare with, and what the machine has."""

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from sktl import Preprocessing


def normalized(images, preprocessing: Preprocessing) -> Tensor:
    """Resize, crop and normalize PIL images or arrays by torchvision's transform.

    Returns
    -------
    Tensor of shape (n_images, 3, crop_size, crop_size)
    """
    transform = ImageClassification(
        crop_size=preprocessing.crop_size,
        resize_size=preprocessing.resize_size,
        interpolation=InterpolationMode(preprocessing.interpolation),
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    pil = [i if isinstance(i, Image.Image) else Image.fromarray(i) for i in images]
    if preprocessing.resize != "crop":  # squares, which the transform does not change
        transform.resize_size = [preprocessing.crop_size]
        pil = [whole_in_square(image, preprocessing) for image in pil]
    return torch.stack([transform(image) for image in pil])


def whole_in_square(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Squash or pad an image by Pillow."""
    side = preprocessing.crop_size
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    if preprocessing.resize == "squash":
        return image.resize((side, side), resample)
    part = ImageOps.contain(image, (side, side), resample)
    color = tuple(min(max(round(255 * mean), 0), 255) for mean in preprocessing.mean)
    left, top = (side - part.width) // 2, (side - part.height) // 2
    border = (left, top, side - part.width - left, side - part.height - top)
    return ImageOps.expand(part, border, color)


def has_native_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16, so that it is not slow."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


# For tests that compute more than a tiny case in bfloat16: without native support
# torch and OpenVINO take more than ten times as long as in float32.
needs_native_bfloat16 = pytest.mark.skipif(
    not has_native_bfloat16(),
    reason="this processor has no native bfloat16, which makes it too slow",
)
