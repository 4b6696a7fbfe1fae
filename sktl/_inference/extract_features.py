"""Features of images: layers of a pretrained network, pooled, each image once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sktl._backbones.registry import BackboneSpec
from sktl._images.preprocessing import Preprocessing
from sktl._inference.cached_forward import CacheableImages
from sktl._inference.distributed import distributed_forward
from sktl._inference.execution import Execution
from sktl._inference.model_spec import ModelSpec


def extract_features(
    reference: BackboneSpec,
    layers: Sequence[str],
    pooling: str | int,
    images: CacheableImages,
    preprocessing: Preprocessing,
    execution: Execution,
    **options: Any,
) -> NDArray[np.float32]:
    """Compute features, or remember them.

    Parameters
    ----------
    reference : BackboneSpec
        To the backbone whose.
    layers, pooling
        As `FeatureExtractor` has them. No layers: the output of the whole network.
    images, preprocessing, execution, options
        As `distributed_forward` has them.

    Returns
    -------
    ndarray of shape (n_samples, n_features), float32
        One row per image.
    """
    space = {"backbone": reference.name, "weights": reference.digest}
    if layers:
        space |= {"layer": " + ".join(layers), "pooling": str(pooling)}
    else:
        space |= {"layer": "output"}
    return distributed_forward(
        ModelSpec(reference, tuple(layers), pooling, preprocessing, execution),
        images,
        preprocessing,
        execution,
        space=space,
        **options,
    )
