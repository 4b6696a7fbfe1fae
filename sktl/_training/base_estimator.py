"""Base class of the fine-tuned estimators."""

import copy
import functools
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import get_scorer_names
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sktl._images.augmentation import AUGMENTATIONS
from sktl._images.file_formats import FileOptions
from sktl._images.sequence import ImageSequence
from sktl._images.validation import copy_feature_metadata, validate_images
from sktl._inference.execution import warn_of_slow_precision
from sktl._inference.memory_access import MemoryAccess
from sktl._inference.parameter_constraints import SHARED_CONSTRAINTS
from sktl._training.config import HEAD_INITS, TrainingRecord
from sktl._training.fit import fit_model
from sktl._training.fit_tasks import FitTasks
from sktl._training.group_splits import encode_groups
from sktl._training.initial_model import FittedModel
from sktl._training.optim import LR_SCHEDULES, OPTIMIZERS
from sktl._training.persistence import PersistenceMixin
from sktl._training.prediction import predict_outputs
from sktl._training.targets import EncodedTargets, Target
from sktl._training.user_callbacks import check_callbacks
from sktl._training.validation_set import (
    append_validation_set,
    errors_of,
    has_validation_set,
)
from sktl._utils.sklearn_compat import CallbackSupportMixin, Interval, StrOptions


class BaseFineTunedCNN(PersistenceMixin, CallbackSupportMixin, MemoryAccess):
    """What all fine-tuned estimators share, whatever the kind of their target.

    A subclass declares its parameters, encodes the target, and predicts from the
    outputs of the network.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **SHARED_CONSTRAINTS,
        "trainable": [str, Interval(Integral, 0, None, closed="left")],
        "head_init": [StrOptions({"auto", *HEAD_INITS})],
        "hidden_layer_sizes": [
            "array-like",
            Interval(Integral, 1, None, closed="left"),
        ],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "optimizer": [StrOptions(set(OPTIMIZERS))],
        "lr": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
        "layer_decay": [Interval(Real, 0, 1, closed="right")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "lr_schedule": [StrOptions(LR_SCHEDULES)],
        "max_epochs": [Interval(Integral, 0, None, closed="left")],
        "augmentation": [StrOptions(AUGMENTATIONS), callable, None],
        "augmentation_views": [Interval(Integral, 1, None, closed="left"), None],
        "wise_ft_alpha": [Interval(Real, 0, 1, closed="both"), StrOptions({"auto"})],
        "unfreeze_every": [Interval(Integral, 1, None, closed="left"), None],
        "early_stopping": ["boolean"],
        "scoring": [StrOptions({"loss", *get_scorer_names()}), callable, None],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "warm_start": ["boolean"],
        "checkpoint": [str, os.PathLike, None],
        "callbacks": [list, tuple, None],
        "batch_size": [
            Interval(Integral, 1, None, closed="left"),
            StrOptions({"auto"}),
        ],
        "precision": [StrOptions({"float32", "bfloat16", "auto"})],
        "random_state": ["random_state"],
    }

    # As the splitters of scikit-learn, so that groups of a search reach each fit.
    __metadata_request__fit: ClassVar = {"groups": True}
    # Parameters that are read here; each subclass has them in its ``__init__``.
    callbacks: Any
    device: str | torch.device
    early_stopping: bool
    image_shape: Any
    pixel_range: Any
    precision: str
    reducing_gap: float | None
    max_image_pixels: int
    extra_formats: Sequence[str]
    warm_start: bool

    @abstractmethod
    def _encode_targets(
        self,
        n_samples: int,
        y: Any,
        sample_weight: Any,
        *,
        classes: Any,
        previous: Target | None,
        partial: bool,
    ) -> EncodedTargets:
        """Validate and encode targets and weights.

        `previous` is the target of the model that the training continues with, and
        `partial` says whether there are further data, as in `partial_fit`.
        """

    @abstractmethod
    def _set_target(self, target: Target) -> None:
        """Set the fitted attributes that depend on the kind of target."""

    def _fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        *,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
        groups: Any = None,
        classes: Any = None,
        partial: bool = False,
    ) -> Self:
        has_validation = has_validation_set(
            X_val, y_val, sample_weight_val, early_stopping=self.early_stopping
        )
        check_callbacks(
            self.callbacks,
            early_stopping=self.early_stopping,
            estimator=type(self).__name__,
        )
        warn_of_slow_precision(self.precision, self.device)
        fitted: FittedModel | None = None
        if partial or self.warm_start:
            fitted = getattr(self, "_fitted_model", None)
        checked = copy.copy(self)  # so that a fit that fails leaves nothing behind
        images = checked._validate_images(X, reset=fitted is None)
        previous = None if fitted is None else fitted.target
        targets = self._validate_targets(
            len(images),
            y,
            sample_weight,
            groups,
            classes=classes,
            previous=previous,
            partial=partial,
        )
        if has_validation:
            with errors_of("X_val"):
                images_val = checked._validate_images(X_val, reset=False)
            targets = append_validation_set(
                targets, len(images), len(images_val), y_val, sample_weight_val, self
            )
            images = images.concatenate(images_val, "X_val")
        tasks = None
        if not partial:
            tasks = FitTasks(self, X, y, sample_weight, checked._attributes)
        fitted, record, net = fit_model(
            checked,
            images,
            targets,
            fitted,
            partial=partial,
            previous_net=getattr(self, "net_", None),  # none after unpickling
            tasks=tasks,
        )
        copy_feature_metadata(self, checked)
        self._set_fitted(fitted, record)
        self.net_ = net
        self._make_memory_writable()
        if tasks is not None:
            tasks.end()
        return self

    def _validate_targets(
        self,
        n_samples: int,
        y: Any,
        sample_weight: Any,
        groups: Any,
        *,
        classes: Any,
        previous: Target | None,
        partial: bool,
    ) -> EncodedTargets:
        """Return encoded targets with their groups, and of `fit` weights of mean 1.

        The arguments are those of `_encode_targets`, and `groups` of `fit`.
        """
        targets = self._encode_targets(
            n_samples,
            y,
            sample_weight,
            classes=classes,
            previous=previous,
            partial=partial,
        )
        if groups is not None:
            numbers = encode_groups(groups, n_samples)
            targets = replace(targets, groups=numbers[targets.rows])
        if previous is not None:
            caller = "partial_fit" if partial else "warm_start"
            targets.target.check_unchanged(previous, caller)
        return targets if partial else targets.with_normalized_weights()

    def _attributes(
        self, fitted: FittedModel, record: TrainingRecord
    ) -> dict[str, Any]:
        """Return the attributes of a copy that is fitted, for a single use."""
        copied = copy.copy(self)
        copied._set_fitted(fitted, record)
        # To compile a network for each epoch would take longer than the epoch.
        return {**vars(copied), "engine": "torch"}

    def _set_fitted(self, fitted: FittedModel, record: TrainingRecord) -> None:
        history = record.history
        rows = [row for row in history if row["epoch"] > 0]
        self._fitted_model = fitted
        self.__dict__.pop("module_", None)  # the copy of the previous network
        self._set_target(fitted.target)
        self.preprocessing_ = fitted.preprocessing
        self.history_ = history
        self.n_iter_ = int(rows[-1]["epoch"]) if rows else 0
        self.best_epoch_ = record.best_epoch
        self.lr_ = record.lr
        self.head_init_ = record.head_init
        self.wise_ft_alpha_ = record.wise_ft_alpha
        self.selection_ = [row.to_dict() for row in record.selection]
        self.loss_curve_ = [row["train_loss"] for row in rows]
        self.validation_scores_ = None
        # Epochs of partial_fit have no validation score.
        if history and all("valid_score" in row for row in history):
            self.validation_scores_ = [row["valid_score"] for row in rows]

    def _predict_outputs(self, X: Any) -> NDArray[np.float32]:
        """Return the outputs of the network: ``(n_samples, n_outputs)``."""
        check_is_fitted(self)
        self._validate_params()
        warn_of_slow_precision(self.precision, self.device)
        images = self._validate_images(X, reset=False)
        min_size = self.preprocessing_.min_decode_size(self.reducing_gap)
        images = images.with_min_decode_size(min_size)
        read_only = self._is_memory_read_only()
        return predict_outputs(self, self._fitted_model, images, read_only=read_only)

    def plot_history(self, ax: Any = None) -> Any:
        """Plot loss, and validation score under early stopping, against epochs.

        Requires matplotlib: ``pip install sktl[plot]``.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to plot on. None: those of a new figure.

        Returns
        -------
        matplotlib Axes
            With the plot.
        """
        check_is_fitted(self)
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        for name in ("train_loss", "valid_loss", "valid_score"):
            rows = [row for row in self.history_ if name in row]
            if rows:
                epochs = [row["epoch"] for row in rows]
                ax.plot(epochs, [row[name] for row in rows], label=name)
        ax.axvline(self.best_epoch_, color="0.8", zorder=0, label="best")
        backbone = self._fitted_model.architecture.backbone
        ax.set(xlabel="epoch", title=f"{backbone}, {self.trainable} trained")
        ax.legend()
        return ax

    @functools.cached_property
    def module_(self) -> nn.Sequential:
        """A copy of the trained network; see the attributes of the class."""
        check_is_fitted(self)
        with torch.inference_mode(False):  # so that it can be trained
            return copy.deepcopy(self._fitted_model.network)

    def __sklearn_tags__(self) -> Tags:
        """Return the tags: arrays of images are valid input."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        """Return whether a fit was completed."""
        return hasattr(self, "_fitted_model")

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without `net_` and the copy of the network."""
        state = dict(super().__getstate__())
        state.pop("net_", None)
        state.pop("module_", None)
        return state

    def _validate_images(self, X: Any, *, reset: bool) -> ImageSequence:
        return validate_images(
            X,
            estimator=self,
            reset=reset,
            image_shape=self.image_shape,
            pixel_range=self.pixel_range,
            file_options=FileOptions.from_estimator(self),
        )
