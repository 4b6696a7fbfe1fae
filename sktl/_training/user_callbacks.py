"""Callbacks of the user: which are supported, and what they are called with.

A batch of the trainer has a pair as its target: the encoded target and the sample
weight. Callbacks of the user get what skorch documents: the labels that were passed to
`fit`, datasets with these labels, and a net that predicts labels.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from skorch.callbacks import (
    BatchScoring,
    Callback,
    Checkpoint,
    EarlyStopping,
    EpochScoring,
    Freezer,
    Initializer,
    InputShapeSetter,
    LoadInitState,
    LRScheduler,
    ParamMapper,
    PassthroughScoring,
    TrainEndCheckpoint,
    Unfreezer,
    WandbLogger,
)
from skorch.dataset import Dataset
from tqdm.auto import tqdm

from sktl._training.datasets import TrainingDataset
from sktl._training.targets import Target

# Callbacks that the training would ignore or that would break it, and what to use
# instead. The first class that matches counts.
_UNSUPPORTED: dict[type, str] = {
    LRScheduler: "Set lr_schedule, which defines the learning rate of each step.",
    torch.optim.lr_scheduler.LRScheduler: (
        "Set lr_schedule, which defines the learning rate of each step."
    ),
    EarlyStopping: "Set early_stopping=True and n_iter_no_change.",
    Freezer: "Set trainable, which selects the stages that are trained.",
    Unfreezer: "Set trainable and unfreeze_every.",
    Initializer: "Set head_init and weights, which define the initial weights.",
    ParamMapper: "Set trainable, unfreeze_every, head_init and weights.",
    InputShapeSetter: "Set image_size.",
    LoadInitState: "Set checkpoint or warm_start, which continue a training.",
    TrainEndCheckpoint: "Call save after fit.",
}
_HOOKS = ("initialize", "on_train_begin", "on_batch_end", "on_epoch_end")


def check_callbacks(
    callbacks: Sequence[Any] | None, *, early_stopping: bool, estimator: str
) -> None:
    """Raise an error if the training would ignore a callback, or fail because of it.

    Parameters
    ----------
    callbacks : sequence of skorch callbacks or None
        Instances, classes, or pairs of a name and one of them, as in skorch.
    early_stopping : bool
        Whether there is a validation set.
    estimator : str
        Name of the estimator, for the message.

    Raises
    ------
    TypeError
        If an item is not a callback.
    ValueError
        If a callback is not supported.
    """
    subject = f"The 'callbacks' parameter of {estimator} must"
    for item in callbacks or ():
        callback = _without_name(item)
        cls = callback if isinstance(callback, type) else type(callback)
        for unsupported, advice in _UNSUPPORTED.items():
            if issubclass(cls, unsupported):
                raise ValueError(
                    f"{subject} not contain {unsupported.__name__}, which is not "
                    f"supported. Got {cls.__name__}. {advice}"
                )
        if not all(hasattr(cls, hook) for hook in _HOOKS):
            raise TypeError(
                f"{subject} contain callbacks of skorch. Got {callback!r}. Derive a "
                "class from skorch.callbacks.Callback."
            )
        if getattr(callback, "load_best", False):
            raise ValueError(
                f"{subject} not contain {cls.__name__} with load_best=True, which is "
                "not supported. Set early_stopping=True, which keeps the best epoch."
            )
        if not early_stopping and _needs_validation_set(callback):
            raise ValueError(
                f"{subject} not contain {cls.__name__} for the validation set if there "
                f"is none. Got early_stopping={early_stopping!r}. Set "
                "early_stopping=True, or let the callback use the training set, for "
                "example by on_train=True or monitor='train_loss_best'."
            )


def copy_callbacks(callbacks: Sequence[Any] | None) -> list[Any]:
    """Return copies of callbacks, and instances of classes.

    Attributes that cannot be copied, such as the writer of a log file, are shared.
    """
    items = list(callbacks or ())
    try:
        copies = copy.deepcopy(items)
    except TypeError:  # one of them holds a lock, a file or a connection
        copies = [_copy_item(item) for item in items]
    return [_with_instance(item) for item in copies]


def adapt_callbacks(
    initialized: Sequence[tuple[str, Any]],
    callbacks: Sequence[Any],
    target: Target,
    verbose: int,
) -> list[tuple[str, Any]]:
    """Return the callbacks of a net, where those of the user get labels.

    Parameters
    ----------
    initialized : sequence of (str, skorch callback)
        All callbacks of the net, by name.
    callbacks : sequence of skorch callbacks
        Those of the user among them, from `copy_callbacks`.
    target, verbose
        As in `UserCallback`.
    """
    ids = {id(_without_name(item)) for item in callbacks}
    return [
        (name, UserCallback(each, target, verbose) if id(each) in ids else each)
        for name, each in initialized
    ]


class UserCallback(Callback):
    """Call a callback of the user with labels in place of encoded targets.

    Parameters
    ----------
    callback : skorch callback
        The callback, initialized.
    target : Target
        Decodes the targets, and provides the net as scorers expect it.
    verbose : int
        If greater than 0, a progress bar is hidden while the callback prints.
    """

    def __init__(self, callback: Any, target: Target, verbose: int) -> None:
        self.callback = callback
        self.target = target
        self.verbose = verbose

    def on_train_begin(
        self, net: Any, X: Any = None, y: Any = None, **rest: Any
    ) -> None:
        """Call the callback with the training set and its labels."""
        self._call("on_train_begin", net, X, **rest)

    def on_train_end(self, net: Any, X: Any = None, y: Any = None, **rest: Any) -> None:
        """Call the callback with the training set and its labels."""
        self._call("on_train_end", net, X, **rest)

    def on_epoch_begin(
        self,
        net: Any,
        dataset_train: Any = None,
        dataset_valid: Any = None,
        **rest: Any,
    ) -> None:
        """Call the callback with datasets that have labels."""
        self._call_epoch("on_epoch_begin", net, dataset_train, dataset_valid, **rest)

    def on_epoch_end(
        self,
        net: Any,
        dataset_train: Any = None,
        dataset_valid: Any = None,
        **rest: Any,
    ) -> None:
        """Call the callback with datasets that have labels."""
        self._call_epoch("on_epoch_end", net, dataset_train, dataset_valid, **rest)

    def on_batch_begin(
        self, net: Any, batch: Any = None, training: bool = False, **rest: Any
    ) -> None:
        """Call the callback with the input and the labels of a batch."""
        batch = self._with_labels(batch)
        net = self.target.scoring_net(net)
        self.callback.on_batch_begin(net, batch=batch, training=training, **rest)

    def on_batch_end(
        self, net: Any, batch: Any = None, training: bool = False, **rest: Any
    ) -> None:
        """Call the callback with the input and the labels of a batch."""
        batch = self._with_labels(batch)
        net = self.target.scoring_net(net)
        self.callback.on_batch_end(net, batch=batch, training=training, **rest)

    def on_grad_computed(
        self,
        net: Any,
        named_parameters: Any,
        X: Any = None,
        y: Any = None,
        batch: Any = None,
        training: bool = False,
        **rest: Any,
    ) -> None:
        """Call the callback with the input and the labels of a batch."""
        if batch is not None:
            rest["batch"] = self._with_labels(batch)
        net = self.target.scoring_net(net)
        self.callback.on_grad_computed(net, named_parameters, training=training, **rest)

    def _call(self, hook: str, net: Any, train: TrainingDataset, **rest: Any) -> None:
        dataset = self._labelled(train)
        net = self.target.scoring_net(net)
        with self._hidden_bar():
            getattr(self.callback, hook)(net, X=dataset, y=dataset.y, **rest)

    def _call_epoch(
        self,
        hook: str,
        net: Any,
        train: TrainingDataset,
        valid: TrainingDataset | None,
        **rest: Any,
    ) -> None:
        with self._hidden_bar():
            getattr(self.callback, hook)(
                self.target.scoring_net(net),
                dataset_train=self._labelled(train),
                dataset_valid=None if valid is None else self._labelled(valid),
                **rest,
            )

    def _labelled(self, dataset: TrainingDataset) -> Any:
        """Return a dataset of skorch, with the labels as its y."""
        y, _ = dataset.targets(np.arange(len(dataset)))
        return Dataset(dataset, self.target.labels(y.numpy()))

    def _with_labels(self, batch: Any) -> Any:
        x, (y, _) = batch
        return x, self.target.labels(y.cpu().numpy())

    @contextlib.contextmanager
    def _hidden_bar(self) -> Iterator[None]:
        if not self.verbose:  # no bar is shown
            yield
            return
        with tqdm.external_write_mode():
            yield


def _without_name(item: Any) -> Any:
    """Return the callback of an item, which may be a pair of a name and a callback."""
    return item[1] if isinstance(item, tuple | list) and len(item) == 2 else item


def _with_instance(item: Any) -> Any:
    """Return an item with an instance in place of a class."""
    callback = _without_name(item)
    if not isinstance(callback, type):
        return item
    return callback() if callback is item else (item[0], callback())


def _copy_item(item: Any) -> Any:
    callback = _without_name(item)
    if isinstance(callback, type):
        return item
    copied = copy.copy(callback)
    for name, value in vars(callback).items():
        with contextlib.suppress(TypeError):
            setattr(copied, name, copy.deepcopy(value))
    return copied if callback is item else (item[0], copied)


def _needs_validation_set(callback: Any) -> bool:
    if isinstance(callback, EpochScoring | BatchScoring | PassthroughScoring):
        return not callback.on_train
    if isinstance(callback, Checkpoint):
        return str(callback.monitor).startswith("valid_")
    return isinstance(callback, WandbLogger) and bool(callback.save_model)
