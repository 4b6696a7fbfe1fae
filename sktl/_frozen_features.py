"""Features of pictures: layers of a pretrained network, pooled, each picture once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sktl._backbone import Backbone
from sktl._images import Pictures
from sktl._inference import prepared
from sktl._layers import LayerExtractor
from sktl._memory import forward_once
from sktl._preprocessing import Preprocessing


def feature_extractor(
    backbone: Backbone,
    layers: Sequence[str],
    pooling: str | int,
    *,
    side: int,
    device: torch.device,
    precision: str,
) -> LayerExtractor:
    """Give the network that computes features; see `LayerExtractor` and `prepared`."""
    layers = tuple(layers)
    return prepared(
        (backbone, layers, pooling),
        lambda: LayerExtractor(backbone, layers, pooling),
        side=side,
        device=device,
        precision=precision,
    )


def frozen_features(
    backbone: Backbone,
    layers: Sequence[str],
    pooling: str | int,
    pictures: Pictures,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    precision: str,
    **options: Any,
) -> NDArray[np.float32]:
    """Compute features, or remember them.

    Parameters
    ----------
    backbone : Backbone
        Whose.
    layers, pooling
        As `LayerExtractor` has them.
    pictures, preprocessing, device, precision, options
        As `forward_once` has them.

    Returns
    -------
    ndarray of shape (n_samples, n_features), float32
        One row per picture.
    """
    return forward_once(
        lambda: feature_extractor(
            backbone,
            layers,
            pooling,
            side=preprocessing.crop_size,
            device=device,
            precision=precision,
        ),
        pictures,
        preprocessing,
        space={
            "backbone": backbone.name,
            "weights": backbone.digest,
            "layer": " + ".join(layers),
            "pooling": str(pooling),
        },
        device=device,
        precision=precision,
        **options,
    )
