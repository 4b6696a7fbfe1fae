"""Transfer learning on images, with scikit-learn compatible estimators."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sktl._backbones.catalog import list_backbones
    from sktl._backbones.register import register_backbone
    from sktl._describe_backbone import describe_backbone
    from sktl._fine_tuned_cnn_classifier import FineTunedCNNClassifier
    from sktl._fine_tuned_cnn_regressor import FineTunedCNNRegressor
    from sktl._images.preprocessing import Preprocessing
    from sktl._pretrained_classifier import PretrainedClassifier
    from sktl._pretrained_features import PretrainedFeatures
    from sktl._store.feature_store import FeatureStore

__version__ = "0.1.0"

__all__ = [
    "FeatureStore",
    "FineTunedCNNClassifier",
    "FineTunedCNNRegressor",
    "Preprocessing",
    "PretrainedClassifier",
    "PretrainedFeatures",
    "describe_backbone",
    "list_backbones",
    "register_backbone",
]

# Module that defines each public name.
_MODULE_OF = {
    "FeatureStore": "sktl._store.feature_store",
    "FineTunedCNNClassifier": "sktl._fine_tuned_cnn_classifier",
    "FineTunedCNNRegressor": "sktl._fine_tuned_cnn_regressor",
    "PretrainedClassifier": "sktl._pretrained_classifier",
    "PretrainedFeatures": "sktl._pretrained_features",
    "Preprocessing": "sktl._images.preprocessing",
    "describe_backbone": "sktl._describe_backbone",
    "list_backbones": "sktl._backbones.catalog",
    "register_backbone": "sktl._backbones.register",
}


def __getattr__(name: str) -> Any:
    # Modules are imported on first use (PEP 562): torch takes seconds to import, which
    # `import sktl` and the command line of the feature store should not cost.
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sktl' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
