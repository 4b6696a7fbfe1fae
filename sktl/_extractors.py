"""Which network gives the rows: by reference, so that other processes can make it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from sktl._backbone import Backbone
from sktl._backbones import Reference
from sktl._engines import Prepared, prepared
from sktl._execution import Execution
from sktl._layers import LayerExtractor
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


@dataclass(frozen=True)
class Extractor:
    """A network that is made where it is called for: here, or in another process.

    Attributes
    ----------
    reference : Reference
        To its backbone.
    layers : tuple of str
        As `LayerExtractor` has them. None: the output of the whole network.
    pooling : str or int
        As `LayerExtractor` has it.
    preprocessing : Preprocessing
        As `prepared` has it.
    execution : Execution
        As `prepared` has it.
    """

    reference: Reference
    layers: tuple[str, ...]
    pooling: str | int
    preprocessing: Preprocessing
    execution: Execution

    def __call__(self) -> Prepared:
        """Load the backbone, unless this process has it, and make it ready.

        Raises
        ------
        FileNotFoundError, ConnectionError, ValueError
            As `Reference.load` and `prepared` do.
        """
        backbone = self.reference.load()
        if self.layers:
            return feature_extractor(
                backbone,
                self.layers,
                self.pooling,
                self.preprocessing,
                self.execution,
            )
        return prepared(
            backbone,
            lambda: copy.deepcopy(backbone.network),
            self.preprocessing,
            self.execution,
            name=backbone.name,
        )
