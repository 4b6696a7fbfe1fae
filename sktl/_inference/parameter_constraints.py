"""Constraints on the parameters that the estimators share."""

import os
from numbers import Integral, Real
from typing import Any

import joblib
import torch

from sktl._images.preprocessing import RESIZE_MODES
from sktl._inference.execution import ENGINES, PRECISIONS
from sktl._store.feature_store import FeatureStore
from sktl._utils.sklearn_compat import Interval, StrOptions

SHARED_CONSTRAINTS: dict[str, list[Any]] = {
    "backbone": [str],
    "weights": [str, os.PathLike, None],
    "image_size": [Interval(Integral, 1, None, closed="left"), None],
    "resize": [StrOptions(set(RESIZE_MODES)), None],
    "image_shape": [StrOptions({"auto"}), tuple, list],
    "pixel_range": [StrOptions({"auto"}), tuple, list],
    "reducing_gap": [Interval(Real, 1, None, closed="left"), None],
    "max_image_pixels": [Interval(Integral, 1, None, closed="left")],
    "extra_formats": [tuple, list],
    "batch_size": [Interval(Integral, 1, None, closed="left")],
    "device": [str, torch.device],
    "precision": [StrOptions({*PRECISIONS, "auto"})],
    "engine": [StrOptions({*ENGINES, "auto"})],
    "n_jobs": [Integral, None],
    "memory": [str, os.PathLike, FeatureStore, joblib.Memory, None],
    "verbose": ["verbose"],
}
