"""Features of pictures: layers of a pretrained network, pooled, each picture once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sktl._backbones import Reference
from sktl._execution import Execution
from sktl._extractors import Extractor
from sktl._memory import KeyedPictures
from sktl._preprocessing import Preprocessing
from sktl._spreading import forward_spread


def frozen_features(
    reference: Reference,
    layers: Sequence[str],
    pooling: str | int,
    pictures: KeyedPictures,
    preprocessing: Preprocessing,
    execution: Execution,
    **options: Any,
) -> NDArray[np.float32]:
    """Compute features, or remember them.

    Parameters
    ----------
    reference : Reference
        To the backbone whose.
    layers, pooling
        As `LayerExtractor` has them. No layers: the output of the whole network.
    pictures, preprocessing, execution, options
        As `forward_spread` has them.

    Returns
    -------
    ndarray of shape (n_samples, n_features), float32
        One row per picture.
    """
    space = {"backbone": reference.name, "weights": reference.digest}
    if layers:
        space |= {"layer": " + ".join(layers), "pooling": str(pooling)}
    else:
        space |= {"layer": "output"}
    return forward_spread(
        Extractor(reference, tuple(layers), pooling, preprocessing, execution),
        pictures,
        preprocessing,
        execution,
        space=space,
        **options,
    )
