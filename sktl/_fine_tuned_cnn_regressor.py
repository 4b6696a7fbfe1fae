"""Fine-tuning of a pretrained network for regression."""

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import RegressorMixin
from sklearn.utils import Tags

from sktl._images.file_formats import MAX_PIXELS
from sktl._images.flattened import ImageShape
from sktl._images.pixel_values import PixelRange
from sktl._inference.feature_cache import Memory
from sktl._training.base_estimator import BaseFineTunedCNN
from sktl._training.regression import LOSSES, RegressionTarget, encode_regression
from sktl._training.targets import EncodedTargets, Target
from sktl._utils.sklearn_compat import StrOptions, fit_context


class FineTunedCNNRegressor(RegressorMixin, BaseFineTunedCNN):
    """Fine-tune a pretrained network for regression.

    Replaces the classification head, initializes it with a ridge regression on the
    frozen features (linear probe) [1]_, then fine-tunes the head and the stages below
    it, all or only the higher ones.

    Parameters
    ----------
    backbone : str, default="resnet18"
        Name of a network, see `list_backbones`; ``"timm/<architecture>"`` or
        ``"timm/<architecture>.<tag>"`` is one of timm, which requires
        ``pip install "sktl[timm]"``. A network without stages requires ``"head"`` or
        ``"all"`` as `trainable`.
    weights : str, path-like or None, default="DEFAULT"
        Pretrained weights to load: a name of torchvision such as ``"IMAGENET1K_V1"``,
        downloaded once (``"DEFAULT"``: the best ones of torchvision, or those of the
        tag of timm, which has no other names); or the path of a state dict (``.pth``,
        ``.pt``, ``.pth.tar``, ``.ckpt``, ``.bin`` or ``.safetensors``) as training
        scripts save it, with the preprocessing of the tag or, in torchvision, of the
        default weights, because a state dict has none; or the path of a file that
        `FineTunedCNNClassifier.save` wrote, which has its own network, preprocessing
        and categories: `backbone` must then be its default or the name in the file. No
        code in the file is executed. None: random weights, seeded by `random_state`, a
        baseline. The head may be missing in the file.
    trainable : {"head", "all"}, int or str, default="all"
        What is trained: the head; all stages; an int n, the head and the last n stages;
        or the name of a stage, that stage and all above it. All other stages are
        frozen, including their BatchNorm statistics.
    head_init : {"auto", "linear_probe", "soft_linear_probe", "random"}, default="auto"
        Initialization of the head. ``"linear_probe"``: a linear model of the frozen
        features (a classifier starts with a logistic regression, a regressor with a
        ridge regression), with the regularization strength chosen by cross-validation;
        with hidden layers, a multilayer perceptron. Pretrained BatchNorm statistics,
        which these features depend on, are then frozen in all stages.
        ``"soft_linear_probe"``: the same, and the training starts with 0.3 times its
        coefficients, so that stages below a probe that fits perfectly get a gradient.
        ``"auto"``: selected with `lr` if that is ``"auto"``, else ``"linear_probe"``.
    loss : {"squared_error", "absolute_error", "huber"}, default="squared_error"
        Loss, in units of the standardized targets; see the notes. ``"absolute_error"``
        and ``"huber"`` [4]_, which is squared up to 1.345 and linear above, are robust
        against outliers.
    hidden_layer_sizes : int or sequence of int, default=()
        Widths of the hidden layers between the penultimate features and the outputs.
    dropout : float, default=0.0
        Dropout probability before each layer of the head.
    optimizer : {"adamw", "sgd"}, default="adamw"
        AdamW, or SGD with Nesterov momentum 0.9. Gradient norms are clipped at 5.
    lr : float or "auto", default="auto"
        Maximum learning rate of the head. ``"auto"``: selected, together with what else
        is ``"auto"``, by short trainings on a part of the images, as the one with the
        least loss on the others; see the notes.
    layer_decay : float, default=1.0
        Ratio of the learning rate of a stage to that of the stage above it.
    weight_decay : float, default=1e-2
        Weight decay; not applied to biases and normalization parameters, nor to class
        tokens and positional embeddings of transformers.
    lr_schedule : {"constant", "cosine", "onecycle"}, default="onecycle"
        Learning rate schedule. ``"onecycle"`` has a warm-up of three tenths of the
        steps, ``"cosine"`` of one tenth.
    max_epochs : int, default=10
        Number of epochs. 0 keeps the head as it is initialized.
    augmentation : {"flip", "standard", "trivial"}, callable or None, default=None
        Data augmentation applied during training. ``"flip"``: horizontal flips.
        ``"standard"``: random crops of 35 to 100 % of the area, flips, color jitter.
        ``"trivial"``: crops, flips and TrivialAugment [2]_. The crops are taken from
        the squashed or padded image, if `resize` is one of these modes. A callable maps
        a PIL image to another one.
    augmentation_views : int or None, default=None
        Number of fixed augmented views per image; one is sampled per epoch. The frozen
        stages then compute each view only once. None: new random views in each epoch.
        No effect without `augmentation`.
    wise_ft_alpha : float or "auto", default="auto"
        Interpolation coefficient between the linear probe (0) and the fine-tuned
        weights (1) [3]_. ``"auto"``: selected as `lr` is. No effect if training does
        not start from a linear probe on pretrained weights, with `early_stopping`, and
        in `partial_fit`.
    unfreeze_every : int or None, default=None
        If given, only the head is trained at first, and one more stage is unfrozen
        every so many epochs, up to `trainable`.
    early_stopping : bool, default=False
        Whether to stop when the score on a validation set stops improving, and keep the
        best epoch, which may be the linear probe. The validation set is a part of `X`,
        stratified if each image has one class, or the one that is passed to `fit`.
    scoring : str, callable or None, default=None
        Score of early stopping: ``"loss"``, the negative loss; the name of a scorer of
        :obj:`sklearn.metrics.get_scorer_names`; or a callable
        ``scorer(estimator, X, y)``, which may pass `X` to methods of the estimator
        only, and must take `sample_weight` if the weights of images differ. None: the
        accuracy of a classifier, with several labels their mean, and R² of a regressor.
        Equal scores are ordered by the loss.
    validation_fraction : float, default=0.1
        Fraction of the images in the validation set of early stopping. No effect if one
        is passed to `fit`.
    n_iter_no_change : int, default=5
        Epochs without improvement after which early stopping stops.
    warm_start : bool, default=False
        Whether `fit` continues from the weights of the previous fit: up to `max_epochs`
        epochs in total, or if these are completed, for as many epochs more. Nothing is
        selected or interpolated then.
    checkpoint : str, path-like or None, default=None
        Directory of a checkpoint that is written after each epoch. A `fit` with the
        same data and parameters resumes from it, on the same CPU with equal bits; any
        other fit is refused (functions are compared by name only). `from_checkpoint`
        returns the estimator as of the last epoch. For one fit at a time, not for a
        search.
    callbacks : list of skorch callbacks or None, default=None
        Copies of them, which `fit` leaves in ``net_.callbacks_``, are called during
        training, with the targets in the form of `y`. Those that the training would
        ignore, such as ``LRScheduler``, are refused; the user guide lists them.
    image_size : int or None, default=None
        Side in pixels of the square image that the network gets. An int: the image is
        resized to this size and no margin is cropped. None: size and margin that the
        weights were trained with.
    resize : {"crop", "squash", "pad"} or None, default=None
        How an image becomes square. ``"crop"``: by its center; the ends of long images
        are lost. ``"squash"``: by resizing it whatever its aspect ratio. ``"pad"``: by
        filling the space beside it with the mean color of the weights' training data.
        None: as the weights were trained: ``"crop"``, except for some weights of timm,
        registered backbones and saved networks.
    image_shape : "auto", (h, w), (h, w, c) or (c, h, w), default="auto"
        For 2-D `X`, shape of a flattened image. Channels come last if the last number
        is 1, 3 or 4, else first. ``"auto"``: a square with one channel; else, with a
        warning, a square with three channels (last), or a strip one pixel high.
    pixel_range : "auto" or (low, high), default="auto"
        Values of black and white in arrays, and in files of more than 8 bits per
        channel, such as (0, 4095) for 12 bits stored in 16. ``"auto"``: in arrays, the
        full range of integers, and (0, 1) for floats; in files, the range that the file
        defines. Values outside the range are clipped. Warns if values of arrays are
        clipped, and if those of integers reach less than an eighth of the range.
    reducing_gap : float or None, default=None
        Decode large JPEG files at 1/2, 1/4 or 1/8 of their size if at least this
        multiple of the required size remains: several times faster, with slightly
        different features. 2 and 3 are common values. None decodes all pixels.
    max_image_pixels : int, default=89478485
        Number of pixels of the largest image that is decoded from a file or bytes, a
        protection against decompression bombs. With `reducing_gap`, the pixels that
        remain are counted. PIL images and arrays of any size are accepted.
    extra_formats : tuple or list of str, default=()
        File formats of Pillow that are decoded besides JPEG, PNG, WebP, GIF, BMP, TIFF,
        PPM and AVIF, by the names of Pillow, such as ``("JPEG2000", "TGA")``. A plugin,
        as for ``"HEIF"``, must be registered before, in all worker processes. Formats
        that start other programs, such as EPS, are refused.
    batch_size : int or "auto", default="auto"
        Number of images per batch. For fewer images, inference uses batches of one.
        ``"auto"``: 32, and down to 8 in a training with less than 300 steps of 32.
    device : str or torch.device, default="auto"
        Device that runs the network. ``"auto"``: the accelerator of this machine, if
        any, else the CPU.
    precision : {"float32", "bfloat16", "auto"}, default="float32"
        Data type used inside the network. ``"auto"``: bfloat16 if the processor
        supports it natively, which is several times faster, else float32.
        Weights are updated in float32.
    engine : {"auto", "torch", "compile", "openvino"}, default="auto"
        Library that runs inference: torch; ``torch.compile``, which needs a C++
        compiler and up to a minute; or OpenVINO, which needs a CPU and
        ``pip install "sktl[openvino]"``. ``"auto"``: OpenVINO if it is installed and
        the device is a CPU, else torch; torch also for fewer than `batch_size` images
        on a large network, which would take longer to compile. Results agree up to
        rounding. Unsupported networks fall back to torch with a warning.
    n_jobs : int or None, default=None
        Number of threads that decode images. None: as many as torch uses, unless in a
        :obj:`joblib.parallel_config` context; -1: all processors. With a process-based
        joblib backend (loky, Dask, Ray), any `n_jobs` other than None distributes the
        images over its workers.
        Workers compute only the frozen pretrained stages, in `fit`.
    memory : str, path-like, FeatureStore, joblib.Memory or None, default=None
        Directory of a feature cache, see `FeatureStore`: frozen layers process each
        image only once, even across folds, candidates, processes and sessions. Of a
        :obj:`joblib.Memory`, the location is used. None means no cache. A fitted
        estimator that was loaded only reads it, until `memory` is set again.
    random_state : int, RandomState instance or None, default=None
        Decides the order of the images, their variation, dropout, what is held out,
        and whatever starts at random. An int gives the same bits on the same CPU.
    verbose : int, default=0
        If 1, show a progress bar for anything longer than a second, and print what was
        removed from a weights file, such as a prefix of its names. If 2, print a line
        per epoch in place of the progress bar of the training.

    Attributes
    ----------
    module_ : torch.nn.Sequential
        A copy of the trained network, on the CPU: from normalized ``(n, 3, h, w)`` to
        standardized targets ``(n, n_outputs)``. It does not depend on sktl. Changes to
        it do not affect predictions and are not pickled.
    net_ : skorch.NeuralNet
        The net that was trained, with its history and optimizer. Not pickled.
    target_center_, target_scale_ : ndarray of shape (n_outputs,)
        A prediction is an output of `module_`, times the scale, plus the center.
    preprocessing_ : Preprocessing
        Preprocessing of the images for `module_`.
    n_iter_ : int
        Number of epochs trained.
    lr_, head_init_, wise_ft_alpha_ : float, str, float
        Settings of the training, also if they were not selected.
    selection_ : list of dict
        One row for each setting that was tried, with its loss and score on the held-out
        images; empty if nothing was selected. ``pandas.DataFrame(selection_)`` makes it
        a table.
    best_epoch_ : int
        Epoch of the fine-tuned weights: without early stopping the last. 0 is the
        state before training.
    loss_curve_ : list of float
        Mean training loss of each epoch.
    validation_scores_ : list of float or None
        Validation score after each epoch from the first on, with early stopping. That
        of epoch 0, which may be the best, is in `history_`.
    history_ : list of dict
        One row per epoch, and one for epoch 0, the linear probe, before interpolation
        by `wise_ft_alpha`. ``pandas.DataFrame(history_)`` makes it a table.
    n_features_in_ : int
        Number of features seen during `fit`, for 2-D `X` and data frames.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during `fit`, for data frames.

    See Also
    --------
    FineTunedCNNClassifier : Fine-tune a network to predict classes.
    PretrainedFeatures : Extract image features without training the network.

    Notes
    -----
    `X` has the forms described in the notes of `PretrainedFeatures`. Sample weights
    multiply the loss and the score; samples of weight 0 are dropped.

    The network is trained on standardized targets, separately for each output. With
    the squared error, their (weighted) mean becomes 0 and their standard deviation 1:
    a loss of 1 is that of the mean, and an outlier reduces the weight of all other
    images. With the other losses, their median becomes 0, and the median absolute
    deviation 0.67, as of a normal distribution; an outlier then counts at most in
    proportion to its distance, and the ridge regression, at the start, is fitted on
    targets that are clipped to 4 standard deviations. The ridge regression predicts
    constant targets as they are, and training does not change that. A training that
    continues, with `warm_start` or in `partial_fit`, keeps the standardization of the
    first fit.

    Without `augmentation`, the output of the frozen stages does not change between
    epochs, so it is computed once and cached: in memory up to a gigabyte, and in
    `memory`, if it is given, for all candidates and folds of a search. The same holds
    for each view with `augmentation_views`, where `memory` is used only if
    `augmentation` is a name and `random_state` an int. An epoch then costs only the
    trainable stages. The weights have equal bits with and without `memory`; predictions
    agree up to rounding. ``verbose=1`` reports the size on disk; a store with smaller
    `max_bytes` is not used for activations.

    With ``lr="auto"``, `fit` holds out 15 % of the images (of few images, up to a third
    or 100), at random, or with `early_stopping` uses its validation set. On the others
    it trains three combinations of a learning rate and an initialization of the head,
    for about 40 % of `max_epochs` each, and interpolates each with the linear probe at
    five coefficients. They and the probe itself are compared by `loss` on the held-out
    images. The probe (with early stopping the first combination) is kept unless another
    one is better by half a standard error. Then all images are trained on, with the
    same bits as if the selected settings had been passed. A fit takes up to 2.5 times
    as long as with fixed settings. With less than four images, or in `partial_fit`,
    ``"auto"`` means ``lr=1e-4`` and ``wise_ft_alpha=0.4``; a fitted estimator that
    continues keeps `lr_` and `head_init_`.

    The worker processes of a search share the cores. They would also share a GPU:
    search with ``n_jobs=1`` there.

    References
    ----------
    .. [1] Kumar et al.: *Fine-Tuning can Distort Pretrained Features and Underperform
       Out-of-Distribution*, 2022.
    .. [2] Müller, Hutter: *TrivialAugment: Tuning-free Yet State-of-the-Art Data
       Augmentation*, 2021.
    .. [3] Wortsman et al.: *Robust Fine-tuning of Zero-shot Models*, 2022.
    .. [4] Huber: *Robust Statistics*, 1981.

    Examples
    --------
    The brightness of tiles of a photograph, with the backbone that is bundled with
    sktl:

    >>> from sklearn.datasets import load_sample_images
    >>> from sktl import FineTunedCNNRegressor
    >>> china = load_sample_images().images[0]
    >>> X = [china[y : y + 60, x : x + 60] for y in range(0, 420, 60)
    ...      for x in range(0, 640, 80)]
    >>> y = [tile.mean() for tile in X]
    >>> regressor = FineTunedCNNRegressor(
    ...     "resnet_mini", trainable=1, max_epochs=2, random_state=0
    ... ).fit(X[::2], y[::2])
    >>> regressor.score(X[1::2], y[1::2]) > 0.9
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseFineTunedCNN._parameter_constraints,
        "loss": [StrOptions(set(LOSSES))],
    }

    _target_types = (RegressionTarget,)

    def __init__(
        self,
        backbone: str = "resnet18",
        *,
        weights: str | os.PathLike[str] | None = "DEFAULT",
        trainable: str | int = "all",
        head_init: str = "auto",
        loss: str = "squared_error",
        hidden_layer_sizes: int | Sequence[int] = (),
        dropout: float = 0.0,
        optimizer: str = "adamw",
        lr: float | str = "auto",
        layer_decay: float = 1.0,
        weight_decay: float = 1e-2,
        lr_schedule: str = "onecycle",
        max_epochs: int = 10,
        augmentation: str | Callable[[Any], Any] | None = None,
        augmentation_views: int | None = None,
        wise_ft_alpha: float | str = "auto",
        unfreeze_every: int | None = None,
        early_stopping: bool = False,
        scoring: str | Callable[..., float] | None = None,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        warm_start: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        callbacks: Sequence[Any] | None = None,
        image_size: int | None = None,
        resize: str | None = None,
        image_shape: ImageShape = "auto",
        pixel_range: PixelRange = "auto",
        reducing_gap: float | None = None,
        max_image_pixels: int = MAX_PIXELS,
        extra_formats: Sequence[str] = (),
        batch_size: int | str = "auto",
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
        self.loss = loss
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
        self.wise_ft_alpha = wise_ft_alpha
        self.unfreeze_every = unfreeze_every
        self.early_stopping = early_stopping
        self.scoring = scoring
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.checkpoint = checkpoint
        self.callbacks = callbacks
        self.image_size = image_size
        self.resize = resize
        self.image_shape = image_shape
        self.pixel_range = pixel_range
        self.reducing_gap = reducing_gap
        self.max_image_pixels = max_image_pixels
        self.extra_formats = extra_formats
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.engine = engine
        self.n_jobs = n_jobs
        self.memory = memory
        self.random_state = random_state
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=True)
    @torch.inference_mode(False)  # even if the caller is in inference mode
    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
        groups: Any = None,
    ) -> Self:
        """Train the head and the stages that `trainable` selects.

        Parameters
        ----------
        X : array-like of images
            See the notes of `PretrainedFeatures`.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Numbers. `predict` returns the shape of `y`: a column has a column as its
            prediction.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples. None: 1 for each.
        X_val : array-like of images, default=None
            Validation set of early stopping, in place of a part of `X`. Requires
            ``early_stopping=True``.
        y_val : array-like of shape (n_val,) or (n_val, n_outputs), default=None
            Numbers of `X_val`.
        sample_weight_val : array-like of shape (n_val,), default=None
            Weights of `X_val`. None: 1 for each.
        groups : array-like of shape (n_samples,), default=None
            Group of each image of `X`, such as the patient or the film that it is from:
            names or numbers. Images of one group are held out together, by early
            stopping, by the selection of settings and in the cross-validation of the
            linear probe.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            If a parameter or an argument is invalid, if an image cannot be read, if the
            checkpoint belongs to another run, if a callback is not supported, or if the
            loss is not finite.
        TypeError
            If an item of `callbacks` is no callback of skorch, or if a scorer does not
            take weights that differ.
        KeyboardInterrupt
            On Ctrl-C. The estimator is unchanged; the last completed epoch is in the
            `checkpoint`, see `from_checkpoint`.
        ConnectionError
            If weights must be downloaded and cannot be.
        MemoryError
            If a batch does not fit into memory.
        """
        return self._fit(
            X,
            y,
            sample_weight,
            X_val=X_val,
            y_val=y_val,
            sample_weight_val=sample_weight_val,
            groups=groups,
        )

    @fit_context(prefer_skip_nested_validation=True)
    @torch.inference_mode(False)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train for one epoch on some images, at a constant learning rate.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Numbers. Those of the first call define the standardization, so they should
            be representative.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples. None: 1 for each.

        Returns
        -------
        self : object
            The estimator, trained for one more epoch.

        Raises
        ------
        ValueError
            As in `fit`; if the number of outputs changes; and with ``early_stopping``,
            which needs all data.
        """
        if self.early_stopping:
            raise ValueError(
                "partial_fit gets only a part of the data, so early_stopping must be "
                f"False. Got early_stopping={self.early_stopping!r}. Use fit."
            )
        return self._fit(X, y, sample_weight, partial=True)

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Predict the numbers of images.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_outputs), float64
            In the units of the targets. Of two dimensions if `y` had two in `fit`.

        Raises
        ------
        ValueError
            If an image cannot be read; the message contains its row, its path and the
            reason.
        """
        outputs = self._predict_outputs(X)
        return self._fitted_model.target.decode(outputs)

    def __sklearn_tags__(self) -> Tags:
        """Return the tags: several outputs; no score is expected without images."""
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True
        tags.target_tags.multi_output = True
        return tags

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
        return encode_regression(
            n_samples,
            y,
            sample_weight,
            loss=self.loss,
            n_least=1 if partial else 2,
            previous=previous,
            estimator=self,
        )

    def _set_target(self, target: Target) -> None:
        target = cast(RegressionTarget, target)
        self.target_center_ = target.center.copy()
        self.target_scale_ = target.scale.copy()
