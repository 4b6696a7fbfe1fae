"""Specification of a model by names, so that another process can build it."""

import copy
import functools
from dataclasses import dataclass

from sktl._backbones import timm
from sktl._backbones.feature_extractor import FeatureExtractor
from sktl._backbones.new_head import NECK
from sktl._backbones.registry import BackboneSpec
from sktl._backbones.stages import is_stage_name
from sktl._backbones.timm_structure import CUT_VERSION
from sktl._images.preprocessing import Preprocessing
from sktl._inference.engines import CompiledModel, get_compiled_model
from sktl._inference.execution import ExecutionConfig

# Cached by value: formatting costs as much as looking up 50 rows.
_describe = functools.lru_cache(32)(str)


@dataclass(frozen=True)
class ModelSpec:
    """Layers of a backbone, and how to run them; small when pickled.

    Attributes
    ----------
    backbone : BackboneSpec
        Backbone and weights.
    layers : tuple of str
        As in `FeatureExtractor`. Empty: the output of the whole network.
    pooling : str or int
        As in `FeatureExtractor`.
    preprocessing : Preprocessing
        Preprocessing of the images.
    execution : ExecutionConfig
        Execution settings.
    """

    backbone: BackboneSpec
    layers: tuple[str, ...]
    pooling: str | int
    preprocessing: Preprocessing
    execution: ExecutionConfig

    def namespace(self) -> dict[str, str]:
        """Return every setting of the model that affects its rows, by name."""
        layers = {"layer": "output"}
        if self.layers:
            layers = {"layer": " + ".join(self.layers), "pooling": str(self.pooling)}
            # Of torchvision's vision transformers, whose class token was once pooled
            # together with the patches. The digest of registered ones has changed.
            has_tokens = any(name.split(".")[0] == "encoder" for name in self.layers)
            is_transformer = self.backbone.name.startswith("vit_")
            if is_transformer and has_tokens and self.pooling != "flatten":
                layers["tokens"] = "patches"
            # Where the stages of timm's networks end depends on how they are recorded.
            # Modules of a saved network have names such as "stage1.0".
            first = {layer.partition(".")[0] for layer in self.layers}
            is_cut = NECK in first or any(map(is_stage_name, first))
            if timm.owns(self.backbone.name) and is_cut:
                layers["stages"] = CUT_VERSION
        return {
            "backbone": self.backbone.name,
            "weights": self.backbone.digest,
            **layers,
            "preprocessing": _describe(self.preprocessing),
            **self.execution.cache_namespace(),
        }

    def compile(self) -> CompiledModel:
        """Load the backbone and compile the model, unless this process has it already.

        Raises
        ------
        FileNotFoundError, ConnectionError, ValueError
            As `BackboneSpec.load`, `FeatureExtractor` and `get_compiled_model`.
        """
        backbone = self.backbone.load()
        execution = self.execution.for_network(backbone.network)
        if not self.layers:
            return get_compiled_model(
                backbone,
                lambda: copy.deepcopy(backbone.network),
                self.preprocessing,
                execution,
                name=backbone.name,
            )
        return get_compiled_model(
            (backbone, self.layers, self.pooling),
            lambda: FeatureExtractor(backbone, self.layers, self.pooling),
            self.preprocessing,
            execution,
            name=f"{', '.join(self.layers)} of {backbone.name}",
        )
