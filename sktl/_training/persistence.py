"""Methods of the fine-tuned estimators that write and read files."""

import os
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from sklearn.utils.validation import check_is_fitted

from sktl._inference.parallel import single_openmp_thread
from sktl._training.checkpoint_model import load_checkpoint
from sktl._training.config import TrainingRecord, parse_selection
from sktl._training.initial_model import FittedModel
from sktl._training.serialization import (
    SavedModel,
    load_model,
    save_model,
    split_parameters,
)
from sktl._training.targets import Target


class PersistenceMixin:
    """Mixin class with `save`, `load` and `from_checkpoint`, for an estimator."""

    _target_types: ClassVar[tuple[type[Target], ...]]  # kinds of target
    _fitted_model: FittedModel
    # Methods and attributes of the estimator.
    get_params: Any
    history_: list[dict[str, float]]
    best_epoch_: int
    lr_: float
    head_init_: str
    wise_ft_alpha_: float
    selection_: list[dict[str, Any]]
    n_features_in_: int
    feature_names_in_: Any

    @abstractmethod
    def _set_fitted(self, fitted: FittedModel, record: TrainingRecord) -> None:
        """Set all fitted attributes but those of the features seen."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the fitted estimator to a file that contains no code.

        The file is safetensors, with parameters, and classes or the scale of targets,
        as JSON in its header. It can also be the `weights` of any estimator, see
        `PretrainedFeatures`.

        Parameters
        ----------
        path : str or path-like
            Name of the file, such as ``"ants_and_bees.safetensors"``.

        Raises
        ------
        OSError
            If the file cannot be written.
        TypeError
            If the labels are not str, int, float or bool, or if the backbone was
            registered with a builder that other processes cannot import.
        """
        check_is_fitted(self)
        parameters, others = split_parameters(self.get_params(deep=False))
        if others:
            warnings.warn(
                "Only parameters with plain values are saved. Got other values of "
                f"{', '.join(others)}, which will have their defaults again.",
                UserWarning,
                stacklevel=2,
            )
        model = SavedModel(
            type(self).__name__,
            parameters,
            self._fitted_model,
            TrainingRecord(
                self.history_,
                self.best_epoch_,
                self.lr_,
                self.head_init_,
                self.wise_ft_alpha_,
                parse_selection(self.selection_),
            ),
            getattr(self, "n_features_in_", None),
            getattr(self, "feature_names_in_", None),
        )
        save_model(model, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trusted: Sequence[str] = ()) -> Self:
        """Load an estimator that `save` has written; nothing in the file is executed.

        Parameters
        ----------
        path : str or path-like
            Name of the file.
        trusted : list of str, default=()
            References such as ``"my_module:build"`` of builders that may be imported
            and called. Required only for a backbone that `register_backbone` added
            where the file was saved, and that is not registered in this process. The
            builder and the other arguments are then registered as they are in the file.

        Returns
        -------
        estimator : object
            Fitted, of this class. Pretrained weights are not needed.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If it is another file or damaged, or if its backbone is unknown; the message
            says which line registers or trusts it.
        TypeError
            If `trusted` is not a list of str.
        """
        # A server may load the model once, and then fork its workers.
        with single_openmp_thread():
            names = [each.__name__ for each in cls.__mro__]
            saved = load_model(path, names, trusted)
        return cls._from_saved(saved, path)

    @classmethod
    def _from_saved(cls, saved: SavedModel, path: str | os.PathLike[str]) -> Self:
        unknown = sorted(saved.parameters.keys() - cls().get_params().keys())
        if unknown:
            raise ValueError(
                f"{str(path)!r} must have parameters of {cls.__name__} only. Got "
                f"{', '.join(unknown)}. Load it with the version of sktl that saved it."
            )
        if not isinstance(saved.fitted.target, cls._target_types):
            raise ValueError(
                f"{str(path)!r} must have a target of {cls.__name__}. Got a "
                f"{type(saved.fitted.target).__name__}."
            )
        estimator = cls(**saved.parameters)
        estimator._set_fitted(saved.fitted, saved.record)
        if saved.n_features_in is not None:
            estimator.n_features_in_ = saved.n_features_in
        if saved.feature_names_in is not None:
            estimator.feature_names_in_ = saved.feature_names_in
        return estimator

    @classmethod
    def from_checkpoint(
        cls, directory: str | os.PathLike[str], *, trusted: Sequence[str] = ()
    ) -> Self:
        """Return the estimator as of the last completed epoch of a `checkpoint`.

        It is fitted as if the training had ended there: with `early_stopping` it has
        the weights of the best epoch so far, otherwise those of the last epoch,
        interpolated by `wise_ft_alpha`. To complete the run instead, with equal bits,
        call `fit` with the same data.

        Parameters
        ----------
        directory : str or path-like
            The `checkpoint` of the run.
        trusted : list of str, default=()
            As in `load`.

        Returns
        -------
        estimator : object
            Fitted, of this class, with the parameters of the run. Those without a plain
            value, such as functions, have their defaults, with a warning.

        Raises
        ------
        OSError
            If there is no checkpoint, or it cannot be read.
        ValueError
            If it has no completed epoch, is damaged or of another class, or if its
            backbone is unknown.
        TypeError
            If `trusted` is not a list of str.
        """
        with single_openmp_thread():
            names = [each.__name__ for each in cls.__mro__]
            saved, others = load_checkpoint(directory, names, trusted)
        if others:
            warnings.warn(
                f"The checkpoint has no values of {', '.join(others)}, since it "
                "contains only plain values. They have their defaults.",
                UserWarning,
                stacklevel=2,
            )
        return cls._from_saved(saved, directory)
