"""Features of pictures: layers of a pretrained network, pooled, each picture once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sktl._backbone import Backbone
from sktl._engines import Prepared, prepared
from sktl._execution import Execution
from sktl._images import Pictures
from sktl._layers import LayerExtractor
from sktl._memory import forward_once
from sktl._preprocessing import Preprocessing


def feature_extractor(
    backbone: Backbone,
    layers: Sequence[str],
    pooling: str | int,
    preprocessing: Preprocessing,
    execution: Execution,
) -> Prepared:
    """Give the network that computes features; see `LayerExtractor` and `prepared`."""
    layers = tuple(layers)
    return prepared(
        (backbone, layers, pooling),
        lambda: LayerExtractor(backbone, layers, pooling),
        preprocessing,
        execution,
        name=f"{', '.join(layers)} of {backbone.name}",
    )


def frozen_features(
    backbone: Backbone,
    layers: Sequence[str],
    pooling: str | int,
    pictures: Pictures,
    preprocessing: Preprocessing,
    execution: Execution,
    **options: Any,
) -> NDArray[np.float32]:
    """Compute features, or remember them.

    Parameters
    ----------
    backbone : Backbone
        Whose.
    layers, pooling
        As `LayerExtractor` has them.
    pictures, preprocessing, execution, options
        As `forward_once` has them.

    Returns
    -------
    ndarray of shape (n_samples, n_features), float32
        One row per picture.
    """
    return forward_once(
        lambda: feature_extractor(backbone, layers, pooling, preprocessing, execution),
        pictures,
        preprocessing,
        execution,
        space={
            "backbone": backbone.name,
            "weights": backbone.digest,
            "layer": " + ".join(layers),
            "pooling": str(pooling),
        },
        **options,
    )
