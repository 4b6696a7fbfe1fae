"""Pretrained networks as fixed feature extractors."""

import os
from numbers import Integral, Real
from typing import Any, Self
from weakref import WeakKeyDictionary

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from sktl._backbones.backbone import Backbone
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._images.pixel_values import PixelRange
from sktl._images.sequence import ImageSequence
from sktl._images.validation import ImageShape, validate_images
from sktl._inference.execution import ENGINES, PRECISIONS, ExecutionConfig
from sktl._inference.extract_features import extract_features
from sktl._inference.feature_cache import Memory
from sktl._inference.model_spec import ModelSpec
from sktl._store.feature_store import FeatureStore
from sktl._utils.sklearn_compat import (
    DocLinkMixin,
    Interval,
    StrOptions,
    check_feature_names_in,
    fit_context,
)

# The parameters that were found valid last, by class.
_valid: WeakKeyDictionary[type, list[Any]] = WeakKeyDictionary()


class PretrainedFeatures(DocLinkMixin, TransformerMixin, BaseEstimator):
    """Turn images into columns with a pretrained network.

    The network is cut open at a layer, and what the layer says about an image,
    averaged over positions, becomes a row of numbers for any scikit-learn model. The
    network itself is never trained. This is the strategy called *fixed feature
    extractor* [1]_, and with a linear model on top the one to try first. For images
    that are not photographs, try the lower stages too.

    Parameters
    ----------
    backbone : str, default="resnet18"
        A name from `list_backbones`: every classification network of torchvision, and
        whatever `register_backbone` added.
    weights : str, path-like or None, default="DEFAULT"
        Where the numbers in the network come from.

        - A name that torchvision gives to weights, such as ``"IMAGENET1K_V1"``;
          ``"DEFAULT"`` is the best of them. They are downloaded once.
        - The path of a state dict: ``.pth``, ``.pt`` or ``.safetensors``. Nothing in
          the file is executed.
        - None: random numbers, the same every time. A baseline.
    layer : str or list of str, default="penultimate"
        What to look at.

        - ``"penultimate"``: what the network's own last linear layer sees.
        - The name of a stage: ``"stem"``, ``"stage1"``, and so on. A stage ends where
          the resolution halves; lower ones suit images far from photographs.
        - The name of any module of the network, as
          ``dict(torchvision.models.get_model("resnet18").named_modules())`` has it; of
          one that runs several times, its last output.
        - A list of these: one pass, columns side by side.
    pooling : {"avg", "max", "gem", "flatten"} or int, default="avg"
        How the positions of a layer become one vector: their average, maximum or
        generalized mean [2]_; every value (``"flatten"``); or an int k: averages over
        a grid of k x k fields, which keeps where things are. Without effect on a
        layer that has no positions, such as the penultimate of most networks.
    image_size : int or None, default=None
        Side in pixels to resize and crop to, instead of what the weights were trained
        with.
    image_shape : "auto", (h, w) or (h, w, c), default="auto"
        For 2-D `X`, how a row is a flattened image. ``"auto"``: a square, else three
        squares with channels last, else a strip one pixel high, with a warning.
    pixel_range : "auto" or (low, high), default="auto"
        Values of black and white in array input. ``"auto"``: the full range of an
        integer dtype, (0, 1) for floats. It is never guessed from the values; values
        outside are clipped, with a warning.
    reducing_gap : float or None, default=None
        Large JPEG files can be decoded at a half, a quarter or an eighth of their size,
        several times as fast, as long as this many times the size that the network
        wants is left. 2 or 3 is common; it moves the features a little. None decodes
        all pixels.
    batch_size : int, default=32
        Number of images that go through the network at a time. In calls with fewer
        images they go one by one, so choose it no larger than the machine needs.
    device : str or torch.device, default="auto"
        ``"auto"`` is the accelerator of this machine if it has one, else its CPU.
    precision : {"float32", "bfloat16", "float16", "auto"}, default="float32"
        What the network computes in. ``"auto"`` is bfloat16 where the processor
        multiplies it natively, several times as fast, else float32. The features are
        float32 in any case.
    engine : {"auto", "torch", "compile", "openvino"}, default="auto"
        What computes the network.

        - ``"torch"``: torch, step by step.
        - ``"compile"``: ``torch.compile``, which takes up to a minute to make a program
          of the network, and needs a C++ compiler.
        - ``"openvino"``: OpenVINO, on a CPU. It is installed by
          ``pip install "sktl[openvino]"``.
        - ``"auto"``: OpenVINO where it is installed and the device is a CPU, else
          torch. It depends on the machine only, never on the data.

        The answers are the same up to rounding. A network that an engine cannot take is
        computed by torch, with a warning.
    n_jobs : int or None, default=None
        Number of threads that decode images ahead of the network. None means as many
        as torch computes with, unless in a :obj:`joblib.parallel_config` context; -1
        means all processors. Where that context chose a backend of processes, such as
        Dask or Ray, any number but None sends the images to its workers.
    memory : str, path-like, FeatureStore, joblib.Memory or None, default=None
        A directory in which the features of every image are remembered, so that each
        goes through the network once, whatever folds, candidates and sessions it turns
        up in; see `FeatureStore`. Of a :obj:`joblib.Memory` its location is
        used. None remembers nothing.
    verbose : int, default=0
        1 shows a progress bar on anything that takes longer than a second.

    Attributes
    ----------
    weights_digest_ : str
        SHA-256 of the weights at the time of `fit`. `transform` refuses to go on with
        a file that changed since.
    n_features_in_ : int
        Number of features seen during `fit`, for 2-D `X` and data frames.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during `fit`, for data frames.

    See Also
    --------
    FeatureStore : What `memory` keeps, and how to look after it.
    list_backbones : Names of the networks there are.
    register_backbone : Add a network of one's own.
    sklearn.datasets.load_files : Paths and labels of images sorted into folders.

    Notes
    -----
    `fit` trains nothing: it checks the parameters and the form of `X`, and reads the
    weights. So features that are computed once, before a cross-validation, leak
    nothing, and save computing them for every fold and candidate; a `memory` saves it
    inside a search too. `transform` works
    without `fit`; only the names of the features, and with them
    ``set_output(transform="pandas")``, need it.

    `X` may be a list, tuple, array, Series or data frame of one column (of pandas or
    polars) in which each element is a path (`str` or path-like), `bytes` (the content
    of a file), a PIL image, or an array or tensor of shape (h, w) or (h, w, c); or one
    array of shape (n_samples, h, w), (n_samples, h, w, c) or (n_samples, n_features).
    Channels come last; there are 1, 3 or 4 of them. Images may differ in size.

    An image is resized, cropped and normalized as the weights ask for, so that its
    features equal those of torchvision's network on ``weights.transforms()``. The same
    image has the same features as a path, as bytes, as a PIL image and as an array.

    A row does not depend on its neighbours. In calls with at least `batch_size`
    images it has the same bits whatever the order and the number of threads; between
    batch sizes, and in smaller calls, it moves by less than 1e-5 of the largest
    feature in float32.

    An estimator holds parameters and a digest, not weights: copies and saved models are
    small, and all copies in one process share one network. A saved model therefore
    needs the same weights where it is loaded; ``set_params(weights=...)`` says where.

    References
    ----------
    .. [1] Donahue et al.: *DeCAF: A Deep Convolutional Activation Feature for Generic
       Visual Recognition*, 2014.
    .. [2] Radenović, Tolias, Chum: *Fine-tuning CNN Image Retrieval with No Human
       Annotation*, 2019.

    Examples
    --------
    Two photographs, and random weights so that nothing is downloaded:

    >>> from sklearn.datasets import load_sample_images
    >>> from sktl import PretrainedFeatures
    >>> photographs = load_sample_images().images
    >>> features = PretrainedFeatures("squeezenet1_1", weights=None)
    >>> features.fit_transform(photographs).shape
    (2, 512)

    Where things are in the image, on a grid of 2 x 2:

    >>> features.set_params(layer="stage2", pooling=2).fit_transform(photographs).shape
    (2, 1024)
    >>> features.get_feature_names_out()[:2]
    array(['squeezenet1_1_stage2_0', 'squeezenet1_1_stage2_1'], dtype=object)
    """

    _parameter_constraints = {  # noqa: RUF012  (scikit-learn's own declaration)
        "backbone": [str],
        "weights": [str, os.PathLike, None],
        "layer": [str, list, tuple],
        "pooling": [
            StrOptions({"avg", "max", "gem", "flatten"}),
            Interval(Integral, 1, None, closed="left"),
        ],
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
        layer: str | list[str] = "penultimate",
        pooling: str | int = "avg",
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
        self.layer = layer
        self.pooling = pooling
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
    def fit(self, X: Any, y: Any = None) -> Self:
        """Check the parameters and the form of `X`, and read the weights.

        Parameters
        ----------
        X : array-like of images
            See the notes of the class.
        y : Ignored
            Present for API consistency by convention.

        Returns
        -------
        self : object
            The estimator itself.

        Raises
        ------
        ValueError
            If a parameter or `X` is not as it must be, or the weights do not belong
            to the backbone. Images that are files are not read yet.
        TypeError
            If `X` is a single image, or has no order.
        ConnectionError
            If weights have to be downloaded and cannot be.
        """
        self._as_images(X, reset=True)
        backbone = self._load_backbone()
        self._model_spec(backbone).compile()  # validates layer and device
        self.weights_digest_ = backbone.digest
        self._digest_of = (self.backbone, self.weights)
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Compute the features of images.

        Parameters
        ----------
        X : array-like of images
            As in `fit`.

        Returns
        -------
        X_new : ndarray of shape (n_samples, n_features_out), float32
            One row per image, in the order of `X`.

        Raises
        ------
        ValueError
            If an image cannot be read (the message names its row, its path and the
            reason), or the weights changed since `fit`.
        TypeError
            If `X` is a single image, or has no order.
        ConnectionError
            If weights have to be downloaded and cannot be.
        MemoryError
            If a batch does not fit into memory.
        """
        self._validate_params()
        images = self._as_images(X, reset=False)
        backbone = self._backbone_of_fit()
        spec = self._model_spec(backbone, len(images))
        min_decode_size = spec.preprocessing.min_decode_size(self.reducing_gap)
        images = images.with_min_decode_size(min_decode_size)
        return extract_features(spec, images, self.memory)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Get the names of the columns: backbone, layer, and index within the layer.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Only compared with the names seen in `fit`.

        Returns
        -------
        feature_names_out : ndarray of str objects
            One name per column, such as ``"resnet18_penultimate_0"``.
        """
        check_is_fitted(self, "weights_digest_")
        check_feature_names_in(self, input_features, generate_names=False)
        widths = self._model_spec(self._backbone_of_fit()).compile().widths
        assert widths is not None  # of a FeatureExtractor
        names = [
            f"{self.backbone}_{layer}_{i}"
            for layer, width in zip(self._layers(), widths, strict=True)
            for i in range(width)
        ]
        return np.asarray(names, dtype=object)

    def __sklearn_tags__(self) -> Tags:
        """Say that `transform` needs no `fit` and gives float32."""
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _validate_params(self) -> None:
        """Validate the parameters, unless they are the ones that were valid last."""
        # Of this class, for a clone has the parameters of what it was cloned from. The
        # very same objects, as True equals 1; held here, so that no other gets the id
        # of one. Of those that can be changed in place only the type is validated here;
        # what is in them is looked at in each call.
        parameters = [getattr(self, name) for name in self._parameter_constraints]
        valid = _valid.get(type(self), ())
        if list(map(id, parameters)) != list(map(id, valid)):
            super()._validate_params()
            _valid[type(self)] = parameters

    def _as_images(self, X: Any, *, reset: bool) -> ImageSequence:
        return validate_images(
            X,
            estimator=self,
            reset=reset,
            image_shape=self.image_shape,
            pixel_range=self.pixel_range,
        )

    def _layers(self) -> tuple[str, ...]:
        layers = (self.layer,) if isinstance(self.layer, str) else tuple(self.layer)
        if (
            not layers
            or not all(isinstance(layer, str) for layer in layers)
            or len(set(layers)) < len(layers)
        ):
            raise ValueError(
                "The 'layer' parameter of PretrainedFeatures must be a name or a list "
                f"of different names. Got {self.layer!r} instead."
            )
        return layers

    def _load_backbone(self) -> Backbone:
        return load_backbone(self.backbone, self.weights, progress=self.verbose > 0)

    def _backbone_of_fit(self) -> Backbone:
        backbone = self._load_backbone()
        fitted = getattr(self, "weights_digest_", backbone.digest)
        same = getattr(self, "_digest_of", None) == (self.backbone, self.weights)
        if same and fitted != backbone.digest:
            raise ValueError(
                f"The weights {str(self.weights)!r} of {self.backbone!r} must be those "
                f"seen in fit, with digest {fitted[:12]}. Got {backbone.digest[:12]} "
                "instead: they changed. Call fit again to use the new ones."
            )
        return backbone

    def _pooling(self) -> str | int:
        # NumPy's integers are integers too, and a grid may hold them.
        return self.pooling if isinstance(self.pooling, str) else int(self.pooling)

    def _model_spec(self, backbone: Backbone, n_samples: int = 1) -> ModelSpec:
        return ModelSpec(
            BackboneSpec.to(backbone, self.weights),
            self._layers(),
            self._pooling(),
            backbone.preprocessing_at(self.image_size),
            ExecutionConfig.from_estimator(self).for_n_samples(n_samples),
        )
