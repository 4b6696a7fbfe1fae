"""Which network gives the rows: by reference, so that other processes can make it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from sktl._backbones.backbone import Backbone
from sktl._backbones.feature_extractor import FeatureExtractor
from sktl._backbones.registry import BackboneSpec
from sktl._images.preprocessing import Preprocessing
from sktl._inference.engines import CompiledModel, get_compiled_model
from sktl._inference.execution import Execution


def get_feature_extractor(
    backbone: Backbone,
    layers: Sequence[str],
    pooling: str | int,
    preprocessing: Preprocessing,
    execution: Execution,
) -> CompiledModel:
    """Return the compiled `FeatureExtractor` of some layers of a backbone."""
    layers = tuple(layers)
    return get_compiled_model(
        (backbone, layers, pooling),
        lambda: FeatureExtractor(backbone, layers, pooling),
        preprocessing,
        execution,
        name=f"{', '.join(layers)} of {backbone.name}",
    )


@dataclass(frozen=True)
class ModelSpec:
    """A network that is made where it is called for: here, or in another process.

    Attributes
    ----------
    reference : BackboneSpec
        To its backbone.
    layers : tuple of str
        As `FeatureExtractor` has them. None: the output of the whole network.
    pooling : str or int
        As `FeatureExtractor` has it.
    preprocessing : Preprocessing
        As `get_compiled_model` has it.
    execution : Execution
        As `get_compiled_model` has it.
    """

    reference: BackboneSpec
    layers: tuple[str, ...]
    pooling: str | int
    preprocessing: Preprocessing
    execution: Execution

    def __call__(self) -> CompiledModel:
        """Load the backbone, unless this process has it, and make it ready.

        Raises
        ------
        FileNotFoundError, ConnectionError, ValueError
            As `BackboneSpec.load` and `get_compiled_model` do.
        """
        backbone = self.reference.load()
        if self.layers:
            return get_feature_extractor(
                backbone,
                self.layers,
                self.pooling,
                self.preprocessing,
                self.execution,
            )
        return get_compiled_model(
            backbone,
            lambda: copy.deepcopy(backbone.network),
            self.preprocessing,
            self.execution,
            name=backbone.name,
        )
