"""PretrainedClassifier: classify images without training."""

import copy
import difflib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import softmax
from sklearn.base import ClassifierMixin
from sklearn.utils import Tags, check_consistent_length
from sklearn.utils.validation import check_is_fitted

from sktl._backbones.backbone import Backbone
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._backbones.source import Label
from sktl._images.file_formats import MAX_PIXELS, FileOptions
from sktl._images.flattened import ImageShape
from sktl._images.pixel_values import PixelRange
from sktl._images.sequence import ImageSequence
from sktl._images.validation import copy_feature_metadata, validate_images
from sktl._inference.execution import ExecutionConfig, warn_of_slow_precision
from sktl._inference.extract_features import extract_features
from sktl._inference.feature_cache import Memory
from sktl._inference.memory_access import MemoryAccess
from sktl._inference.model_spec import ModelSpec
from sktl._inference.parameter_constraints import SHARED_CONSTRAINTS
from sktl._utils.labels import check_labels
from sktl._utils.sklearn_compat import check_sample_weight, fit_context


class PretrainedClassifier(ClassifierMixin, MemoryAccess):
    """Classify images with a pretrained network, without training.

    The categories of the network are the class labels, or are mapped to your own
    labels: by `label_map`, or by a mapping that `fit` learns from labelled images. This
    is the first thing to try, and a baseline that shows whether training is worthwhile.

    Parameters
    ----------
    backbone : str, default="resnet18"
        Name of a network, see `list_backbones`; ``"timm/<architecture>"`` or
        ``"timm/<architecture>.<tag>"`` is one of timm, which requires
        ``pip install "sktl[timm]"``. It must have a classification head,
        whose categories have names or, to learn labels from examples, may have none.
    weights : str or path-like, default="DEFAULT"
        Pretrained weights to load: a name of torchvision such as ``"IMAGENET1K_V1"``,
        downloaded once (``"DEFAULT"``: the best ones of torchvision, or those of the
        tag of timm, which has no other names); or the path of a state dict (``.pth``,
        ``.pt``, ``.pth.tar``, ``.ckpt``, ``.bin`` or ``.safetensors``) as training
        scripts save it, with the preprocessing of the tag or, in torchvision, of the
        default weights, because a state dict has none; or the path of a file that
        `FineTunedCNNClassifier.save` wrote, which has its own network, preprocessing
        and categories: `backbone` must then be its default or the name in the file. No
        code in the file is executed.
    label_map : dict or None, default=None
        Maps names of categories to labels. The probabilities of categories with the
        same label are summed; categories that are not in the dict are ignored.
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
    batch_size : int, default=32
        Number of images per batch. For fewer images, inference uses batches of one.
    device : str or torch.device, default="auto"
        Device that runs the network. ``"auto"``: the accelerator of this machine, if
        any, else the CPU.
    precision : {"float32", "bfloat16", "float16", "auto"}, default="float32"
        Data type used inside the network. ``"auto"``: bfloat16 if the processor
        supports it natively, which is several times faster, else float32.
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
    memory : str, path-like, FeatureStore, joblib.Memory or None, default=None
        Directory of a feature cache, see `FeatureStore`: frozen layers process each
        image only once, even across folds, candidates, processes and sessions. Of a
        :obj:`joblib.Memory`, the location is used. None means no cache. A fitted
        estimator that was loaded only reads it, until `memory` is set again.
    verbose : int, default=0
        If 1, show a progress bar for anything longer than a second, and print what was
        removed from a weights file, such as a prefix of its names.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Sorted class labels: names of categories, or your own labels. Of weights that
        `FineTunedCNNClassifier` has saved, the labels of its training, of their type.
    class_proba_given_category_ : array of shape (n_categories, n_classes), maybe sparse
        Probability of each class given each category of the network, in the order of
        the network.
    weights_digest_ : str
        SHA-256 of the weights seen during `fit`.
    n_features_in_ : int
        Number of features seen during `fit`, for 2-D `X` and data frames.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during `fit`, for data frames.

    See Also
    --------
    PretrainedFeatures : Features of the same networks, for any scikit-learn model.
    list_backbones : Names of all available networks.

    Notes
    -----
    With `y` and without `label_map`, `fit` counts how often each class occurs with each
    category, where an image is distributed over the categories by the probabilities of
    the network, and adds one to each count (Laplace smoothing). The probability of a
    class is then the sum over categories of p(class | category) p(category | image).
    The categories need no names for that.

    If several categories of a network have the same name, their indices are appended:
    ``"crane (134)"`` and ``"crane (517)"``.

    Examples
    --------
    A network for small images is part of the library:

    >>> from sklearn.datasets import load_sample_images
    >>> from sktl import PretrainedClassifier
    >>> photographs = load_sample_images().images
    >>> classifier = PretrainedClassifier("resnet_mini").fit(photographs)
    >>> classifier.predict_proba(photographs).shape
    (2, 200)
    >>> names, probabilities = classifier.top_k(photographs, k=3)
    >>> names.shape
    (2, 3)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **SHARED_CONSTRAINTS,
        "label_map": [dict, None],
    }

    def __init__(
        self,
        backbone: str = "resnet18",
        *,
        weights: str | os.PathLike[str] | None = "DEFAULT",
        label_map: dict[Any, Any] | None = None,
        image_size: int | None = None,
        resize: str | None = None,
        image_shape: ImageShape = "auto",
        pixel_range: PixelRange = "auto",
        reducing_gap: float | None = None,
        max_image_pixels: int = MAX_PIXELS,
        extra_formats: Sequence[str] = (),
        batch_size: int = 32,
        device: str | torch.device = "auto",
        precision: str = "float32",
        engine: str = "auto",
        n_jobs: int | None = None,
        memory: Memory = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.label_map = label_map
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
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Determine the class labels.

        Parameters
        ----------
        X : array-like of images
            As in `PretrainedFeatures.fit`. Images are read only if labels are learned
            from `y`.
        y : array-like of shape (n_samples,), default=None
            Class labels. Without `y` and `label_map`, the labels are the names of the
            categories. With `label_map`, `y` is only validated: the map must contain
            all of its labels.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples where labels are learned. None means 1 for each.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            If the weights have no categories and `y` is None or `label_map` is given,
            the network has no classification head, `label_map` has a key that is not a
            category, or `X` or `y` is invalid.
        ConnectionError
            If weights must be downloaded and there is no connection.
        """
        validated = copy.copy(self)  # a failed fit leaves the estimator unchanged
        images = validated._validate_images(X, reset=True)
        backbone = self._load_backbone()
        if y is not None:
            y = check_labels(y, self)
            check_consistent_length(images, y)
        if self.label_map is not None:
            categories = _category_names(backbone, self.weights)
            classes, class_proba = _classes_from_map(self.label_map, categories, y)
        elif y is None:
            categories = _category_names(backbone, self.weights)
            classes, class_index = np.unique(categories, return_inverse=True)
            class_proba = _indicator_matrix(class_index, len(classes))
        else:
            _check_head(backbone, self.weights)
            sample_weight = check_sample_weight(sample_weight, y, dtype=np.float64)
            category_proba = self._category_proba(backbone, images, read_only=False)
            classes, class_proba = _learn_classes(category_proba, y, sample_weight)
        copy_feature_metadata(self, validated)
        self.classes_, self.class_proba_given_category_ = classes, class_proba
        self.weights_digest_ = backbone.digest
        self._make_memory_writable()
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict class labels.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.

        Returns
        -------
        y : ndarray of shape (n_samples,)
            The most probable class of each image.

        Raises
        ------
        ValueError
            If an image cannot be read (names the row, the path and the reason), or
            backbone or weights changed since `fit`.
        """
        proba = self.predict_proba(X)
        return self.classes_[proba.argmax(axis=1)]

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Predict class probabilities.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.

        Returns
        -------
        proba : ndarray of shape (n_samples, n_classes)
            In the order of `classes_`; the sum of each row is 1.

        Raises
        ------
        ValueError
            As in `predict`.
        """
        check_is_fitted(self)
        self._validate_params()
        images = self._validate_images(X, reset=False)
        backbone = self._load_backbone()
        if backbone.digest != self.weights_digest_:
            raise ValueError(
                "The backbone and its weights must be those seen in fit, with digest "
                f"{self.weights_digest_[:12]}. Got {self.backbone!r} with "
                f"{str(self.weights)!r} and digest {backbone.digest[:12]} instead. "
                "Call fit again."
            )
        category_proba = self._category_proba(
            backbone, images, read_only=self._is_memory_read_only()
        )
        # (n_samples, n_categories) @ (n_categories, n_classes)
        proba = category_proba @ self.class_proba_given_category_
        return proba / proba.sum(axis=1, keepdims=True)

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Compute the logarithms of the class probabilities.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.

        Returns
        -------
        scores : ndarray of shape (n_samples, n_classes) or (n_samples,)
            For two classes, as in scikit-learn, the log-odds of the second class.

        Raises
        ------
        ValueError
            As in `predict`.
        """
        tiny = np.finfo(np.float64).tiny  # avoids the logarithm of 0
        scores = np.log(np.maximum(self.predict_proba(X), tiny))
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def top_k(self, X: Any, k: int = 5) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Return the k most probable classes of each image.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.
        k : int, default=5
            Number of classes; at most the number of all classes.

        Returns
        -------
        labels : ndarray of shape (n_samples, k)
            Class labels, most probable first.
        probabilities : ndarray of shape (n_samples, k)
            Their probabilities.

        Raises
        ------
        ValueError
            If there are fewer than k classes, and as in `predict`.
        """
        check_is_fitted(self)
        if not isinstance(k, Integral) or not 1 <= k <= len(self.classes_):
            raise ValueError(
                "The 'k' parameter of top_k must be an int from 1 to the number of "
                f"classes, {len(self.classes_)}. Got {k!r} instead."
            )
        proba = self.predict_proba(X)
        best = np.argsort(-proba, axis=1, kind="stable")[:, :k]
        return self.classes_[best], np.take_along_axis(proba, best, axis=1)

    def __sklearn_tags__(self) -> Tags:
        """Return tags: `y` is optional, and points of a plane cannot be classified."""
        tags = super().__sklearn_tags__()
        tags.target_tags.required = False
        tags.input_tags.three_d_array = True
        tags.classifier_tags.poor_score = True
        return tags

    def _validate_images(self, X: Any, *, reset: bool) -> ImageSequence:
        return validate_images(
            X,
            estimator=self,
            reset=reset,
            image_shape=self.image_shape,
            pixel_range=self.pixel_range,
            file_options=FileOptions.from_estimator(self),
        )

    def _load_backbone(self) -> Backbone:
        return load_backbone(self.backbone, self.weights, progress=self.verbose > 0)

    def _category_proba(
        self, backbone: Backbone, images: ImageSequence, *, read_only: bool
    ) -> NDArray[np.float64]:
        """Run the network; return ``(n_samples, n_categories)`` in its own order."""
        warn_of_slow_precision(self.precision, self.device)
        preprocessing = backbone.preprocessing_at(self.image_size, self.resize)
        spec = ModelSpec(
            BackboneSpec.to(backbone, self.weights),
            (),
            "avg",
            preprocessing,
            ExecutionConfig.from_estimator(self).for_n_samples(len(images)),
        )
        min_decode_size = preprocessing.min_decode_size(self.reducing_gap)
        images = images.with_min_decode_size(min_decode_size)
        logits = extract_features(spec, images, self.memory, read_only=read_only)
        # float64, so that the sum over a thousand categories is exact enough.
        return softmax(logits.astype(np.float64), axis=1)


def _category_names(backbone: Backbone, weights: object) -> list[Label]:
    """Return unique names of the categories; equal names get their index appended."""
    if backbone.categories is None:
        raise ValueError(
            "PretrainedClassifier requires weights with named categories, or images "
            f"with labels. Got weights={str(weights)!r} of {backbone.name!r}, which "
            "have no names: they are random, their source has no names, or their head "
            "is missing or not the one of the named weights. Pass y to fit, or use "
            "PretrainedFeatures, or register_backbone(..., categories=...)."
        )
    n_uses = Counter(backbone.categories)
    return [
        name if n_uses[name] == 1 else f"{name} ({i})"
        for i, name in enumerate(backbone.categories)
    ]


def _check_head(backbone: Backbone, weights: object) -> None:
    """Raise if the outputs of a network are not those of a trained head."""
    if backbone.categories is not None:
        return
    if weights is None and not backbone.definition.is_registered:
        reason = "whose weights are random"
    elif backbone.missing_head:
        reason = "whose head is missing in the weights"
    elif not backbone.has_classification_head:
        reason = "which has none: its outputs are features"
    elif backbone.returns_embeddings:
        reason = "whose outputs are embeddings that were trained with texts"
    else:
        return
    raise ValueError(
        "PretrainedClassifier requires a network with a trained classification head. "
        f"Got weights={str(weights)!r} of {backbone.name!r}, {reason}. Use "
        "PretrainedFeatures with a classifier such as LogisticRegression, or "
        "FineTunedCNNClassifier."
    )


def _indicator_matrix(class_index: NDArray[np.intp], n_classes: int) -> csr_array:
    """Return ``(n_categories, n_classes)`` with a 1 at the class of each category.

    Categories with a negative index have no class.
    """
    category = np.flatnonzero(class_index >= 0)
    entries = (np.ones(len(category)), (category, class_index[category]))
    return csr_array(entries, (len(class_index), n_classes))


def _classes_from_map(
    label_map: Mapping[Label, Any], categories: Sequence[Label], y: NDArray[Any] | None
) -> tuple[NDArray[Any], csr_array]:
    """Validate a label map; return the classes and ``(n_categories, n_classes)``."""
    if not label_map:
        raise ValueError(
            "The 'label_map' parameter of PretrainedClassifier must contain at least "
            "one category. Got {} instead."
        )
    for name in label_map:
        if name not in categories:
            close = difflib.get_close_matches(str(name), map(str, categories), n=5)
            raise ValueError(
                "The 'label_map' parameter of PretrainedClassifier must map names of "
                f"categories to labels. Got {name!r}, which is not one of the "
                f"{len(categories)} categories."
                f"{' The closest ones: ' + ', '.join(close) + '.' if close else ''}"
            )
    classes = np.unique(np.asarray(list(label_map.values())))
    if y is not None and not np.isin(y, classes).all():
        missing = np.setdiff1d(y, classes).tolist()
        raise ValueError(
            f"label_map must contain every label in y. Got no category for {missing}; "
            f"its labels are {classes.tolist()}."
        )
    class_index = np.full(len(categories), -1)
    position = {name: i for i, name in enumerate(categories)}
    for name, label in label_map.items():
        class_index[position[name]] = np.searchsorted(classes, label)
    return classes, _indicator_matrix(class_index, len(classes))


def _learn_classes(
    category_proba: NDArray[np.float64],
    y: NDArray[Any],
    sample_weight: NDArray[np.float64],
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Estimate p(class | category) from labelled images, with Laplace smoothing.

    Parameters
    ----------
    category_proba : ndarray of shape (n_samples, n_categories)
        Probabilities of the network.
    y : ndarray of shape (n_samples,)
        Class labels.
    sample_weight : ndarray of shape (n_samples,)
        Weights of the samples.

    Returns
    -------
    classes : ndarray of shape (n_classes,)
        Sorted class labels.
    class_proba : ndarray of shape (n_categories, n_classes)
        The sum of each row is 1.
    """
    classes, encoded = np.unique(y, return_inverse=True)
    # (n_samples, n_classes)
    indicator = sample_weight[:, None] * (encoded[:, None] == range(len(classes)))
    # (n_categories, n_samples) @ (n_samples, n_classes)
    counts = 1 + category_proba.T @ indicator
    return classes, counts / counts.sum(axis=1, keepdims=True)
