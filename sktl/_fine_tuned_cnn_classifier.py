"""Pretrained networks whose head, and as much below it as is wanted, is trained."""

import copy
import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Self

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted

from sktl._images.augmentation import NAMES
from sktl._images.decode import PixelRange
from sktl._images.sequence import ImageSequence
from sktl._images.validation import ImageShape, copy_feature_metadata, validate_images
from sktl._inference.engines import get_compiled_model
from sktl._inference.execution import ENGINES, ExecutionConfig
from sktl._inference.feature_cache import Memory
from sktl._inference.forward import forward
from sktl._store.feature_store import FeatureStore
from sktl._training import serialization
from sktl._training.build import (
    build_frozen_activations,
    build_initial_model,
    build_trainer,
    initialize_head,
)
from sktl._training.checkpoint import Checkpoint, checkpoint_seed, run_fingerprint
from sktl._training.initial_model import InitialModel
from sktl._training.network import network_digest
from sktl._training.optim import LR_SCHEDULES, OPTIMIZERS, load_optimizer_state
from sktl._training.targets import EncodedTargets, encode_targets, validation_mask
from sktl._training.trainer import Trainer, TrainerState
from sktl._utils.sklearn_compat import DocLinkMixin, Interval, StrOptions, fit_context


class FineTunedCNNClassifier(DocLinkMixin, ClassifierMixin, BaseEstimator):
    """Fine-tune a pretrained convolutional network.

    The network gets a new head, which starts as the logistic regression on its
    features [1]_; then the head and the stages below it, all or the higher ones, are
    trained together. It squeezes out the last few points that `PretrainedFeatures` with
    a linear model leaves, at the price of training.

    Parameters
    ----------
    backbone : str, default="resnet18"
        A name from `list_backbones`, of a network that has stages.
    weights : str, path-like or None, default="DEFAULT"
        Where the numbers in the network come from, as in `PretrainedFeatures`. None is
        random, from `random_state`: a baseline.
    trainable : {"head", "all"}, int or str, default="all"
        What is trained: the head; all; an int n, the head and the last n stages; or the
        name of a stage, that and everything above. What is not, is frozen: neither its
        parameters nor the statistics of its BatchNorm move.
    head_init : {"linear_probe", "random"}, default="linear_probe"
        How the head starts. ``"linear_probe"``: as the regularized logistic regression
        on the features of the frozen network, its strength chosen by cross-validation;
        with hidden layers, as scikit-learn's multilayer perceptron. The statistics of
        BatchNorm, which these features depend on, then stay as they are wherever they
        are pretrained.
    hidden_layer_sizes : int or sequence of int, default=()
        Widths of layers between the penultimate feature and the classes.
    dropout : float, default=0.0
        Share of values dropped before each layer of the head.
    optimizer : {"adamw", "sgd"}, default="adamw"
        AdamW, or SGD with Nesterov momentum 0.9. Norms of gradients are clipped at 5.
    lr : float, default=1e-4
        Highest learning rate of the head.
    layer_decay : float, default=1.0
        Each stage learns at this many times the rate of the one above it.
    weight_decay : float, default=1e-2
        Of matrices and kernels; biases and normalizations have none.
    lr_schedule : {"constant", "cosine", "onecycle"}, default="cosine"
        Course of the rate. ``"cosine"`` warms up in the first tenth of the steps.
    max_epochs : int, default=10
        Number of times each image is seen. 0 leaves the head as it starts.
    augmentation : {"flip", "standard", "trivial"}, callable or None, default=None
        How images vary from epoch to epoch. ``"flip"``: left and right.
        ``"standard"``: a random crop of 35 to 100 % of the area, flip, colour.
        ``"trivial"``: crop, flip and TrivialAugment [2]_. A callable turns a PIL image
        into another.
    augmentation_views : int or None, default=None
        If given, each image has so many views, the same in each epoch, and one of
        them, drawn at random, is seen. Frozen stages then see each view only once, see
        the notes; fewer views than epochs save time. None varies an image anew each
        time. Without effect without `augmentation`.
    label_smoothing : float, default=0.0
        Share of the target that is spread over all classes.
    wise_ft_alpha : float, default=0.4
        The weights that are kept lie that far on the way from the linear probe to the
        trained network [3]_: 1 is the trained network. Without effect where training
        does not begin with a linear probe on pretrained weights, and under
        `early_stopping`, which chooses an epoch, and in `partial_fit`.
    class_weight : dict, "balanced" or None, default=None
        Weights of classes, as everywhere in scikit-learn.
    unfreeze_every : int or None, default=None
        If given, training begins with the head alone, and one more stage is opened
        every so many epochs, up to `trainable`.
    early_stopping : bool, default=False
        Whether to hold out a stratified part of the data, stop when the accuracy on it
        stops rising, and keep the best epoch, which may be the linear probe.
    validation_fraction : float, default=0.1
        Share that is held out under early stopping.
    n_iter_no_change : int, default=5
        Epochs without a better one after which early stopping stops.
    warm_start : bool, default=False
        Whether `fit` goes on from the weights of the last one.
    checkpoint : str, path-like or None, default=None
        A directory where the state of the training is written after each epoch. A `fit`
        of the same data and parameters goes on from there, on the same CPU with the
        bits it would have had; any other is refused (functions are told apart by name
        only). One at a time: not for a search.
    callbacks : list of skorch callbacks or None, default=None
        Copies of them are told of each batch and epoch. One that stops by raising
        KeyboardInterrupt, as skorch's EarlyStopping does, ends `fit` with it: use
        `early_stopping`.
    image_size : int or None, default=None
        Side in pixels to resize and crop to, instead of what the weights were trained
        with.
    image_shape : "auto", (h, w) or (h, w, c), default="auto"
        For 2-D `X`, how a row is a flattened image, as in `PretrainedFeatures`.
    pixel_range : "auto" or (low, high), default="auto"
        Values of black and white in array input, as in `PretrainedFeatures`.
    reducing_gap : float or None, default=None
        How large JPEG files are decoded, as in `PretrainedFeatures`.
    batch_size : int, default=32
        Number of images of a step, and of those that go through at a time.
    device : str or torch.device, default="auto"
        ``"auto"`` is the accelerator of this machine if it has one, else its CPU.
    precision : {"float32", "bfloat16", "auto"}, default="float32"
        What the network computes in. ``"auto"`` is bfloat16 where the processor
        multiplies it natively, several times as fast, else float32. Weights and their
        updates are float32 anyway.
    engine : {"auto", "torch", "compile", "openvino"}, default="auto"
        What computes the network where it does not train: in `predict`, and the
        features for the linear probe. As in `PretrainedFeatures`.
    n_jobs : int or None, default=None
        Number of threads that decode images ahead of the network. None means as many
        as torch computes with, unless in a :obj:`joblib.parallel_config` context; -1
        means all processors. Where that context chose a backend of processes, such as
        Dask or Ray, any number but None lets its workers compute, in `fit`, what frozen
        pretrained stages say of the images.
    memory : str, path-like, FeatureStore, joblib.Memory or None, default=None
        Where it is remembered what the frozen stages give of each image, as in
        `PretrainedFeatures`, and shared with it; see the notes.
    random_state : int, RandomState instance or None, default=None
        Decides the order of the images, their variation, dropout, what is held out,
        and whatever starts at random. An int gives the same bits on the same CPU.
    verbose : int, default=0
        1 shows a progress bar on anything that takes longer than a second.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted.
    module_ : torch.nn.Sequential
        The trained network, on the CPU: from normalized ``(n, 3, h, w)`` to logits
        ``(n, n_classes)``. It needs nothing of this library. `predict` uses a copy, so
        changes have no effect there.
    net_ : skorch.NeuralNet
        What trained it, with its history and optimizer. Not in a pickle.
    preprocessing_ : Preprocessing
        What images go through before `module_`.
    n_iter_ : int
        Number of epochs trained.
    best_epoch_ : int
        The epoch whose weights were kept, or mixed with those of the linear probe:
        without early stopping the last. 0 is the state before training.
    loss_curve_ : list of float
        Mean training loss of each epoch.
    validation_scores_ : list of float or None
        Accuracy on the held-out part after each epoch, under early stopping.
    history_ : list of dict
        One row for each epoch, epoch 0 for the linear probe: ready for a data frame. It
        is about the network in training, before `wise_ft_alpha` mixes it.
    n_features_in_ : int
        Number of features seen during `fit`, for 2-D `X` and data frames.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during `fit`, for data frames.

    See Also
    --------
    PretrainedFeatures : Columns for any model, without training the network.
    PretrainedClassifier : A network as it is.

    Notes
    -----
    `X` has the forms described in the notes of `PretrainedFeatures`. Weights of samples
    and classes multiply the loss of each image; samples of weight 0 are left out.
    The accuracy of early stopping is weighted likewise.

    Without `augmentation`, the frozen stages say the same of an image in every epoch;
    with `augmentation_views`, of each of its views. It is computed once and kept in
    memory, up to a gigabyte; with a `memory` it is remembered there (of views only if
    `augmentation` is a name and `random_state` an int, which say what they show), and
    shared by all candidates and folds of a search, so that an epoch costs only what
    trains, whatever the size of the data. The weights have the same bits with and
    without. Predictions with a `memory` begin where the frozen stages end, too, and
    agree with those without up to rounding. ``verbose=1`` says how large a store may
    become; one whose `max_bytes` are less is not used for it.

    Copies in the worker processes of a search share the cores among them. They would
    also share one GPU: search with ``n_jobs=1`` there.

    References
    ----------
    .. [1] Kumar et al.: *Fine-Tuning can Distort Pretrained Features and Underperform
       Out-of-Distribution*, 2022.
    .. [2] Müller, Hutter: *TrivialAugment: Tuning-free Yet State-of-the-Art Data
       Augmentation*, 2021.
    .. [3] Wortsman et al.: *Robust Fine-tuning of Zero-shot Models*, 2022.

    Examples
    --------
    Pieces of two photographs, and the network that comes with the library:

    >>> import numpy as np
    >>> from sklearn.datasets import load_sample_images
    >>> from sktl import FineTunedCNNClassifier
    >>> china, flower = load_sample_images().images
    >>> X = [p[y : y + 60, x : x + 60] for p in (china, flower)
    ...      for y in (0, 120, 240) for x in (0, 200, 400)]
    >>> y = np.repeat(["china", "flower"], 9)
    >>> classifier = FineTunedCNNClassifier(
    ...     "resnet_mini", trainable=1, max_epochs=2, random_state=0
    ... ).fit(X, y)
    >>> classifier.predict([china[60:120, 100:160], flower[60:120, 300:360]])
    array(['china', 'flower'], dtype='<U6')
    """

    _parameter_constraints = {  # noqa: RUF012  (scikit-learn's own declaration)
        "backbone": [str],
        "weights": [str, os.PathLike, None],
        "trainable": [str, Interval(Integral, 0, None, closed="left")],
        "head_init": [StrOptions({"linear_probe", "random"})],
        "hidden_layer_sizes": [
            "array-like",
            Interval(Integral, 1, None, closed="left"),
        ],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "optimizer": [StrOptions(set(OPTIMIZERS))],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "layer_decay": [Interval(Real, 0, 1, closed="right")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "lr_schedule": [StrOptions(LR_SCHEDULES)],
        "max_epochs": [Interval(Integral, 0, None, closed="left")],
        "augmentation": [StrOptions(NAMES), callable, None],
        "augmentation_views": [Interval(Integral, 1, None, closed="left"), None],
        "label_smoothing": [Interval(Real, 0, 1, closed="left")],
        "wise_ft_alpha": [Interval(Real, 0, 1, closed="both")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "unfreeze_every": [Interval(Integral, 1, None, closed="left"), None],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "warm_start": ["boolean"],
        "checkpoint": [str, os.PathLike, None],
        "callbacks": [list, tuple, None],
        "image_size": [Interval(Integral, 1, None, closed="left"), None],
        "image_shape": [StrOptions({"auto"}), tuple, list],
        "pixel_range": [StrOptions({"auto"}), tuple, list],
        "reducing_gap": [Interval(Real, 1, None, closed="left"), None],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "device": [str, torch.device],
        "precision": [StrOptions({"float32", "bfloat16", "auto"})],
        "engine": [StrOptions({*ENGINES, "auto"})],
        "n_jobs": [Integral, None],
        "memory": [str, os.PathLike, FeatureStore, joblib.Memory, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        backbone: str = "resnet18",
        *,
        weights: str | os.PathLike[str] | None = "DEFAULT",
        trainable: str | int = "all",
        head_init: str = "linear_probe",
        hidden_layer_sizes: int | Sequence[int] = (),
        dropout: float = 0.0,
        optimizer: str = "adamw",
        lr: float = 1e-4,
        layer_decay: float = 1.0,
        weight_decay: float = 1e-2,
        lr_schedule: str = "cosine",
        max_epochs: int = 10,
        augmentation: str | Callable[[Any], Any] | None = None,
        augmentation_views: int | None = None,
        label_smoothing: float = 0.0,
        wise_ft_alpha: float = 0.4,
        class_weight: dict[Any, float] | str | None = None,
        unfreeze_every: int | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        warm_start: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        callbacks: Sequence[Any] | None = None,
        image_size: int | None = None,
        image_shape: ImageShape = "auto",
        pixel_range: PixelRange = "auto",
        reducing_gap: float | None = None,
        batch_size: int = 32,
        device: str | torch.device = "auto",
        precision: str = "float32",
        engine: str = "auto",
        n_jobs: int | None = None,
        memory: Memory = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.trainable = trainable
        self.head_init = head_init
        self.hidden_layer_sizes = hidden_layer_sizes
        self.dropout = dropout
        self.optimizer = optimizer
        self.lr = lr
        self.layer_decay = layer_decay
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.max_epochs = max_epochs
        self.augmentation = augmentation
        self.augmentation_views = augmentation_views
        self.label_smoothing = label_smoothing
        self.wise_ft_alpha = wise_ft_alpha
        self.class_weight = class_weight
        self.unfreeze_every = unfreeze_every
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.checkpoint = checkpoint
        self.callbacks = callbacks
        self.image_size = image_size
        self.image_shape = image_shape
        self.pixel_range = pixel_range
        self.reducing_gap = reducing_gap
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.engine = engine
        self.n_jobs = n_jobs
        self.memory = memory
        self.random_state = random_state
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=True)
    @torch.inference_mode(False)  # of the caller: nothing could be trained in it
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train the head, and as much below it as `trainable` says.

        Parameters
        ----------
        X : array-like of images
            See the notes of `PretrainedFeatures`.
        y : array-like of shape (n_samples,)
            Labels: str, int or bool, of at least two classes.
        sample_weight : array-like of shape (n_samples,), default=None
            How much each image counts. None is 1 for each.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            If a parameter, `X`, `y` or `sample_weight` is not as it must be, an image
            cannot be read, the checkpoint is of another run, or the loss is no number.
        KeyboardInterrupt
            On Ctrl-C. The estimator is as it was before; the last whole epoch is in
            the `checkpoint`.
        ConnectionError
            If weights have to be downloaded and cannot be.
        MemoryError
            If a batch does not fit into memory.
        """
        goes_on = self.warm_start and hasattr(self, "module_")
        checked = copy.copy(self)  # a fit that is stopped changes nothing here
        images = checked._as_images(X, reset=not goes_on)
        given = self._labelled(images, y, sample_weight).rescaled()
        images = images.subset(given.rows.tolist())
        seed = self._seed()
        if self.checkpoint is not None:
            seed = checkpoint_seed(self.checkpoint, otherwise=seed)
        if goes_on:
            self._check_classes(given.classes, "warm_start")
            start = InitialModel.from_fitted(self)
        else:
            start = build_initial_model(self, len(given.classes), seed)
        images = images.with_min_decode_size(
            start.preprocessing.min_decode_size(self.reducing_gap)
        )
        activations = build_frozen_activations(
            self, start.network, images, start.preprocessing, start.pretrained
        )
        fraction = self.validation_fraction if self.early_stopping else None
        held_out = validation_mask(given, fraction, seed)
        training = build_trainer(
            self, start, images, activations, given, held_out, TrainerState(seed)
        )
        checkpoint = None
        if self.checkpoint is not None:
            identity = run_fingerprint(self.get_params(), images, given, start.digest)
            checkpoint = Checkpoint(self.checkpoint, identity)
        if checkpoint is None or not checkpoint.resume(training):
            if self.head_init == "linear_probe" and not goes_on:
                initialize_head(training, start, activations, given, held_out)
        training.run(None if checkpoint is None else checkpoint.save)
        copy_feature_metadata(self, checked)
        return self._keep(training, start, given.classes)

    @fit_context(prefer_skip_nested_validation=True)
    @torch.inference_mode(False)
    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> Self:
        """Train for one epoch on some images, at a constant rate.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.
        y : array-like of shape (n_samples,)
            Labels.
        classes : array-like of shape (n_classes,), default=None
            All classes there will be; needed in the first call only. If all of them
            are among its labels, the head starts as `head_init` says, else at random.
        sample_weight : array-like of shape (n_samples,), default=None
            How much each image counts. None is 1 for each.

        Returns
        -------
        self : object
            The estimator, one epoch further.

        Raises
        ------
        ValueError
            As in `fit`; if `classes` are missing or others than before; and with
            ``early_stopping`` or ``class_weight="balanced"``, which need all the data.
        """
        if self.early_stopping or self.class_weight == "balanced":
            raise ValueError(
                "partial_fit sees only some of the data, so early_stopping must be "
                "False and class_weight not 'balanced'. Got "
                f"early_stopping={self.early_stopping!r} and "
                f"class_weight={self.class_weight!r}. Use fit, or a dict of weights."
            )
        first = not hasattr(self, "module_")
        if first and classes is None:
            raise ValueError(
                "classes must be passed to the first call of partial_fit. Got None. "
                "Pass all labels that there will be."
            )
        images = self._as_images(X, reset=first)
        given = self._labelled(
            images, y, sample_weight, self.classes_ if classes is None else classes
        )
        images = images.subset(given.rows.tolist())
        seed = self._seed()
        if first:
            start = build_initial_model(self, len(given.classes), seed)
            progress = TrainerState(seed)
        else:
            self._check_classes(given.classes, "partial_fit")
            start = InitialModel.from_fitted(self)
            progress = TrainerState(seed, self.n_iter_, list(self.history_))
        images = images.with_min_decode_size(
            start.preprocessing.min_decode_size(self.reducing_gap)
        )
        activations = build_frozen_activations(
            self, start.network, images, start.preprocessing, start.pretrained
        )
        held_out = validation_mask(given, None, seed)
        training = build_trainer(
            self,
            start,
            images,
            activations,
            given,
            held_out,
            progress,
            max_epochs=progress.epoch + 1,
            lr_schedule="constant",
            wise_ft_alpha=1.0,
        )
        if not first and hasattr(self, "net_"):
            before = self.net_.optimizer_
            if type(before) is type(training.net.optimizer_):
                now = training.net.optimizer_
                # Of fewer stages, if `trainable` was more: the head is first.
                n_trained = sum(len(group["params"]) for group in now.param_groups)
                state = before.state_dict()["state"].items()
                load_optimizer_state(now, {n: v for n, v in state if n < n_trained})
        complete = len(np.unique(given.label)) == len(given.classes)
        if first and complete and self.head_init == "linear_probe":
            initialize_head(training, start, activations, given, held_out)
        training.run()
        return self._keep(training, start, given.classes)

    def predict(self, X: Any) -> NDArray[Any]:
        """Name the class of images.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.

        Returns
        -------
        y : ndarray of shape (n_samples,)
            The most probable label of each.

        Raises
        ------
        ValueError
            If an image cannot be read; the message names its row, its path and the
            reason.
        """
        logits = self._logits(X)
        return self.classes_[logits.argmax(axis=1)]

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Give the probabilities of all classes.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.

        Returns
        -------
        proba : ndarray of shape (n_samples, n_classes), float32
            In the order of `classes_`; each row adds up to 1.

        Raises
        ------
        ValueError
            As in `predict`.
        """
        proba: NDArray[np.float32] = softmax(self._logits(X), axis=1)
        return proba

    def decision_function(self, X: Any) -> NDArray[np.float32]:
        """Give the logits, whose softmax the probabilities are.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.

        Returns
        -------
        scores : ndarray of shape (n_samples, n_classes) or (n_samples,), float32
            Of two classes, as everywhere in scikit-learn, the log-odds of the second.

        Raises
        ------
        ValueError
            As in `predict`.
        """
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to a file that holds no code.

        The file is safetensors, with parameters and classes as JSON in its header.

        Parameters
        ----------
        path : str or path-like
            Name of the file, such as ``"ants_and_bees.safetensors"``.

        Raises
        ------
        OSError
            If it cannot be written.
        TypeError
            If the labels are neither str, int, float nor bool.
        """
        check_is_fitted(self)
        serialization.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; nothing in the file is executed.

        Parameters
        ----------
        path : str or path-like
            Name of the file.

        Returns
        -------
        FineTunedCNNClassifier
            Fitted. Pretrained weights are not needed.

        Raises
        ------
        OSError
            If it cannot be read.
        ValueError
            If the file is anything else, is damaged, or its backbone is not known.
        """
        return serialization.load(cls, path)

    def plot_history(self, ax: Any = None) -> Any:
        """Plot loss, and accuracy under early stopping, against epochs.

        Needs matplotlib: ``pip install sktl[plot]``.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to plot. None makes a new figure.

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
        ax.set(xlabel="epoch", title=f"{self.backbone}, {self.trainable} trained")
        ax.legend()
        return ax

    def __sklearn_tags__(self) -> Tags:
        """Say that blobs are no images."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.classifier_tags.poor_score = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        """Say no where `fit` was interrupted, whatever it had set by then."""
        return hasattr(self, "module_")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the net and its optimizer."""
        state = dict(super().__getstate__())
        state.pop("net_", None)
        return state

    def _as_images(self, X: Any, *, reset: bool) -> ImageSequence:
        return validate_images(
            X,
            estimator=self,
            reset=reset,
            image_shape=self.image_shape,
            pixel_range=self.pixel_range,
        )

    def _labelled(
        self, images: ImageSequence, y: Any, sample_weight: Any, classes: Any = None
    ) -> EncodedTargets:
        return encode_targets(
            images,
            y,
            sample_weight,
            class_weight=self.class_weight,
            classes=classes,
            estimator=self,
        )

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _check_classes(self, classes: NDArray[Any], what: str) -> None:
        if not np.array_equal(classes, self.classes_):
            raise ValueError(
                f"{what} needs the classes it began with, {self.classes_.tolist()}. "
                f"Got {classes.tolist()}."
            )

    def _keep(
        self, training: Trainer, start: InitialModel, classes: NDArray[Any]
    ) -> Self:
        """Set what is left behind; until here the fitted network has not changed."""
        progress = training.progress
        rows = [row for row in progress.history if row["epoch"] > 0]
        self.classes_ = classes
        self.module_ = start.network.cpu()
        self.net_ = training.net
        self.preprocessing_ = start.preprocessing
        self.n_iter_ = progress.epoch
        self.best_epoch_ = progress.best_epoch
        self.history_ = progress.history
        self.loss_curve_ = [row["train_loss"] for row in rows]
        self.validation_scores_ = (
            [row["valid_score"] for row in rows] if self.early_stopping else None
        )
        self._model_config = start.model_config
        self._n_frozen = training.n_frozen
        n_pretrained, reference = start.pretrained
        self._pretrained = min(n_pretrained, training.n_frozen), reference
        self._digest = network_digest(start.network)
        return self

    def _logits(self, X: Any) -> NDArray[np.float32]:
        """Run the trained network: ``(n_samples, n_classes)``."""
        check_is_fitted(self)
        self._validate_params()
        images = self._as_images(X, reset=False)
        images = images.with_min_decode_size(
            self.preprocessing_.min_decode_size(self.reducing_gap)
        )
        if self._n_frozen and self.memory is not None:
            network = copy.deepcopy(self.module_)
            # What somebody has done to the network since is not to be remembered.
            if network_digest(network) == self._digest:
                activations = build_frozen_activations(
                    self,
                    network,
                    images,
                    self.preprocessing_,
                    self._pretrained,
                    spread=False,  # the network is here, its weights file perhaps not
                )
                return activations.logits(self._n_frozen)
        execution = ExecutionConfig.from_estimator(self).for_n_samples(len(images))
        whole = get_compiled_model(
            ("fine-tuned", self._digest),
            lambda: copy.deepcopy(self.module_),
            self.preprocessing_,
            execution,
            name=f"the fine-tuned {self.backbone}",
        )
        return forward(whole, images, self.preprocessing_, execution)
