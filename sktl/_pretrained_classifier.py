"""Pretrained networks as they are."""

import copy
import difflib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Self

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_consistent_length
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from sktl._backbones.backbone import Backbone
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._images.pixel_values import PixelRange
from sktl._images.sequence import ImageSequence
from sktl._images.validation import ImageShape, copy_feature_metadata, validate_images
from sktl._inference.execution import ENGINES, PRECISIONS, ExecutionConfig
from sktl._inference.extract_features import extract_features
from sktl._inference.feature_cache import Memory
from sktl._inference.model_spec import ModelSpec
from sktl._store.feature_store import FeatureStore
from sktl._utils.sklearn_compat import (
    DocLinkMixin,
    Interval,
    StrOptions,
    check_sample_weight,
    check_y,
    fit_context,
)


class PretrainedClassifier(DocLinkMixin, ClassifierMixin, BaseEstimator):
    """Say what is in images with a pretrained network, as it is.

    Nothing in the network is trained. Its categories are the labels, or are led to
    labels of your own: by a `label_map` that you write down, or by one that `fit`
    learns from examples. That makes it the first thing to try, and the baseline that
    shows when nothing needs training.

    Parameters
    ----------
    backbone : str, default="resnet18"
        A name from `list_backbones`, of a network with weights that have categories.
    weights : str or path-like, default="DEFAULT"
        Where the numbers in the network come from: a name that torchvision gives to
        weights, or the path of a state dict (``.pth``, ``.pt`` or ``.safetensors``).
    label_map : dict or None, default=None
        From names of categories to labels. Probabilities of categories with the same
        label are added up, and those of categories that are not named left out.
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
        Number of images that go through the network at a time. In calls with fewer
        images they go one by one.
    device : str or torch.device, default="auto"
        ``"auto"`` is the accelerator of this machine if it has one, else its CPU.
    precision : {"float32", "bfloat16", "float16", "auto"}, default="float32"
        What the network computes in. ``"auto"`` is bfloat16 where the processor
        multiplies it natively, several times as fast, else float32.
    engine : {"auto", "torch", "compile", "openvino"}, default="auto"
        What computes the network, as in `PretrainedFeatures`.
    n_jobs : int or None, default=None
        Number of threads that decode images ahead of the network. None means as many
        as torch computes with, unless in a :obj:`joblib.parallel_config` context; -1
        means all processors. Where that context chose a backend of processes, such as
        Dask or Ray, any number but None sends the images to its workers.
    memory : str, path-like, FeatureStore, joblib.Memory or None, default=None
        A directory in which the output for every image is remembered, so that each
        goes through the network once, whatever folds, candidates and sessions it
        turns up in; see `FeatureStore`. Of a :obj:`joblib.Memory` its location is
        used. None remembers nothing.
    verbose : int, default=0
        1 shows a progress bar on anything that takes longer than a second.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted: names of categories, or labels of your own.
    class_proba_given_category_ : array of shape (n_categories, n_classes), maybe sparse
        Probability of each label in each category of the network, in its own order.
    weights_digest_ : str
        SHA-256 of the weights at the time of `fit`.
    n_features_in_ : int
        Number of features seen during `fit`, for 2-D `X` and data frames.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during `fit`, for data frames.

    See Also
    --------
    PretrainedFeatures : Columns for any model of scikit-learn, from the same networks.
    list_backbones : Names of the networks there are.

    Notes
    -----
    With labels `y` and without a `label_map`, `fit` counts how often each label comes
    with each category, every image spread over the categories as the network's
    probabilities are, and adds one to each count (Laplace). The probability of a label
    is then the sum over categories of p(label | category) p(category | image).

    Where a network has two categories of one name, their numbers are added to the
    names, such as ``"crane (134)"`` and ``"crane (517)"``.

    Examples
    --------
    A network for small images comes with the library:

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

    _parameter_constraints = {  # noqa: RUF012  (scikit-learn's own declaration)
        "backbone": [str],
        "weights": [str, os.PathLike, None],
        "label_map": [dict, None],
        "image_size": [Interval(Integral, 1, None, closed="left"), None],
        "image_shape": [StrOptions({"auto"}), tuple, list],
        "pixel_range": [StrOptions({"auto"}), tuple, list],
        "reducing_gap": [Interval(Real, 1, None, closed="left"), None],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "device": [str, torch.device],
        "precision": [StrOptions({*PRECISIONS, "auto"})],
        "engine": [StrOptions({*ENGINES, "auto"})],
        "n_jobs": [Integral, None],
        "memory": [str, os.PathLike, FeatureStore, joblib.Memory, None],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        backbone: str = "resnet18",
        *,
        weights: str | os.PathLike[str] | None = "DEFAULT",
        label_map: dict[str, Any] | None = None,
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
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.label_map = label_map
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
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Settle what the labels are.

        Parameters
        ----------
        X : array-like of images
            As in `PretrainedFeatures.fit`. They are looked at only where labels are
            learned from `y`.
        y : array-like of shape (n_samples,), default=None
            Labels. Without them, and without a `label_map`, the names of the
            categories are the labels. With a `label_map` it is only checked that it
            leads to all of them.
        sample_weight : array-like of shape (n_samples,), default=None
            How much each image counts where labels are learned. None is 1 for each.

        Returns
        -------
        self : object
            The estimator itself.

        Raises
        ------
        ValueError
            If the weights have no categories, the `label_map` names one that they do
            not have, or `X` or `y` is not as it must be.
        ConnectionError
            If weights have to be downloaded and cannot be.
        """
        checked = copy.copy(self)
        images = checked._as_images(X, reset=True)
        backbone = self._load_backbone()
        categories = _categories(backbone, self.weights)
        if y is not None:
            y = check_y(y, estimator=self)
            check_classification_targets(y)
            check_consistent_length(images, y)
        if self.label_map is not None:
            classes, given = _mapped(self.label_map, categories, y)
        elif y is None:
            classes, order = np.unique(categories, return_inverse=True)
            given = _one_label_each(order)
        else:
            weight = check_sample_weight(sample_weight, y, dtype=np.float64)
            classes, label = np.unique(y, return_inverse=True)
            indicator = weight[:, None] * (label[:, None] == range(len(classes)))
            # (n_categories, n_samples) @ (n_samples, n_classes)
            counts = 1 + self._category_proba(backbone, images).T @ indicator
            given = counts / counts.sum(axis=1, keepdims=True)
        # At the end: what a bad image or Ctrl-C stops leaves the last fit whole.
        copy_feature_metadata(self, checked)
        self.classes_, self.class_proba_given_category_ = classes, given
        self.weights_digest_ = backbone.digest
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """Name what is in images.

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
            If an image cannot be read (the message names its row, its path and the
            reason), or backbone or weights changed since `fit`.
        """
        proba = self.predict_proba(X)
        return self.classes_[proba.argmax(axis=1)]

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Give the probabilities of all labels.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.

        Returns
        -------
        proba : ndarray of shape (n_samples, n_classes)
            In the order of `classes_`; each row adds up to 1.

        Raises
        ------
        ValueError
            As in `predict`.
        """
        check_is_fitted(self)
        self._validate_params()
        images = self._as_images(X, reset=False)
        backbone = self._load_backbone()
        if backbone.digest != self.weights_digest_:
            raise ValueError(
                "The backbone and its weights must be those seen in fit, with digest "
                f"{self.weights_digest_[:12]}. Got {self.backbone!r} with "
                f"{str(self.weights)!r} and digest {backbone.digest[:12]} instead. "
                "Call fit again."
            )
        # (n_samples, n_categories) @ (n_categories, n_classes)
        proba = (
            self._category_proba(backbone, images) @ self.class_proba_given_category_
        )
        return proba / proba.sum(axis=1, keepdims=True)

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Give the logarithms of the probabilities.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.

        Returns
        -------
        scores : ndarray of shape (n_samples, n_classes) or (n_samples,)
            Of two labels, as everywhere in scikit-learn, the log-odds of the second.

        Raises
        ------
        ValueError
            As in `predict`.
        """
        tiny = np.finfo(np.float64).tiny  # instead of a logarithm of 0
        scores = np.log(np.maximum(self.predict_proba(X), tiny))
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def top_k(self, X: Any, k: int = 5) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Give the k most probable labels of each image.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.
        k : int, default=5
            How many, at most the number of labels.

        Returns
        -------
        labels : ndarray of shape (n_samples, k)
            The most probable first.
        probabilities : ndarray of shape (n_samples, k)
            Theirs.

        Raises
        ------
        ValueError
            If there are fewer than k labels, and as in `predict`.
        """
        check_is_fitted(self)
        if not isinstance(k, Integral) or not 1 <= k <= len(self.classes_):
            raise ValueError(
                "The 'k' parameter of top_k must be an int from 1 to the number of "
                f"labels, {len(self.classes_)}. Got {k!r} instead."
            )
        proba = self.predict_proba(X)
        best = np.argsort(-proba, axis=1, kind="stable")[:, :k]
        return self.classes_[best], np.take_along_axis(proba, best, axis=1)

    def __sklearn_tags__(self) -> Tags:
        """Say that labels are not required, and that blobs are no images."""
        tags = super().__sklearn_tags__()
        tags.target_tags.required = False
        tags.input_tags.three_d_array = True
        tags.classifier_tags.poor_score = True
        return tags

    def _as_images(self, X: Any, *, reset: bool) -> ImageSequence:
        return validate_images(
            X,
            estimator=self,
            reset=reset,
            image_shape=self.image_shape,
            pixel_range=self.pixel_range,
        )

    def _load_backbone(self) -> Backbone:
        return load_backbone(self.backbone, self.weights, progress=self.verbose > 0)

    def _category_proba(
        self, backbone: Backbone, images: ImageSequence
    ) -> NDArray[np.float64]:
        """Run the network: ``(n_samples, n_categories)``, in its own order."""
        preprocessing = backbone.preprocessing_at(self.image_size)
        spec = ModelSpec(
            BackboneSpec.to(backbone, self.weights),
            (),
            "avg",
            preprocessing,
            ExecutionConfig.from_estimator(self).for_n_samples(len(images)),
        )
        min_decode_size = preprocessing.min_decode_size(self.reducing_gap)
        images = images.with_min_decode_size(min_decode_size)
        logits = extract_features(spec, images, self.memory)
        # In float64, so that adding up a thousand of them rounds nothing away.
        return softmax(logits.astype(np.float64), axis=1)


def _categories(backbone: Backbone, weights: object) -> list[str]:
    """Give the names of the categories, with numbers added to those of one name."""
    if backbone.categories is None:
        raise ValueError(
            "PretrainedClassifier needs weights whose categories have names. Got "
            f"weights={str(weights)!r} of {backbone.name!r}, which have none: they are "
            "random, or their head is another than that of the weights with names. Use "
            "PretrainedFeatures, or register_backbone(..., categories=...)."
        )
    times = Counter(backbone.categories)
    return [
        name if times[name] == 1 else f"{name} ({i})"
        for i, name in enumerate(backbone.categories)
    ]


def _one_label_each(label: NDArray[np.intp], n_labels: int | None = None) -> csr_array:
    """Give the matrix ``(n_categories, n_labels)`` with a 1 for each category's label.

    A negative label is none.
    """
    category = np.flatnonzero(label >= 0)
    shape = (len(label), n_labels or len(label))
    return csr_array((np.ones(len(category)), (category, label[category])), shape)


def _mapped(
    label_map: Mapping[str, Any], categories: Sequence[str], y: NDArray[Any] | None
) -> tuple[NDArray[Any], csr_array]:
    """Check a map from categories to labels, and give labels and matrix."""
    if not label_map:
        raise ValueError(
            "The 'label_map' parameter of PretrainedClassifier must name at least one "
            "category. Got {} instead."
        )
    for name in label_map:
        if name not in categories:
            close = difflib.get_close_matches(str(name), categories, n=5)
            raise ValueError(
                "The 'label_map' parameter of PretrainedClassifier must lead from "
                f"names of categories to labels. Got {name!r}, which is none of the "
                f"{len(categories)} categories."
                f"{' The closest: ' + ', '.join(close) + '.' if close else ''}"
            )
    classes = np.unique(np.asarray(list(label_map.values())))
    if y is not None and not np.isin(y, classes).all():
        missing = np.setdiff1d(y, classes).tolist()
        raise ValueError(
            f"label_map must lead to every label in y. Got no category for {missing}; "
            f"it leads to {classes.tolist()}."
        )
    label = np.full(len(categories), -1)
    index = {name: i for i, name in enumerate(categories)}
    for name, value in label_map.items():
        label[index[name]] = np.searchsorted(classes, value)
    return classes, _one_label_each(label, len(classes))
