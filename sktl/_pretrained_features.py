"""PretrainedFeatures: a transformer that extracts image features."""

import copy
import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from sktl._backbones.backbone import Backbone
from sktl._backbones.feature_extractor import layer_widths
from sktl._backbones.registry import BackboneSpec, load_backbone
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
from sktl._utils.sklearn_compat import (
    Interval,
    StrOptions,
    check_feature_names_in,
    fit_context,
)

# The parameters that passed validation last, by class; see `_validate_params`.
_last_valid: WeakKeyDictionary[type, list[Any]] = WeakKeyDictionary()


class PretrainedFeatures(TransformerMixin, MemoryAccess):
    """Extract image features with a pretrained network.

    The activations of one or more layers are pooled over positions, and become the
    columns for any scikit-learn model. The network itself is not trained. This strategy
    is called *fixed feature extractor* [1]_; with a linear model it is the first one to
    try. For images that are not photographs, try lower stages as well.

    Parameters
    ----------
    backbone : str, default="resnet18"
        Name of a network, see `list_backbones`; ``"timm/<architecture>"`` or
        ``"timm/<architecture>.<tag>"`` is one of timm, which requires
        ``pip install "sktl[timm]"``.
    weights : str, path-like or None, default="DEFAULT"
        Pretrained weights to load: a name of torchvision such as ``"IMAGENET1K_V1"``,
        downloaded once (``"DEFAULT"``: the best ones of torchvision, or those of the
        tag of timm, which has no other names); or the path of a state dict (``.pth``,
        ``.pt``, ``.pth.tar``, ``.ckpt``, ``.bin`` or ``.safetensors``) as training
        scripts save it, with the preprocessing of the tag or, in torchvision, of the
        default weights, because a state dict has none; or the path of a file that
        `FineTunedCNNClassifier.save` wrote, which has its own network, preprocessing
        and categories: `backbone` must then be its default or the name in the file. No
        code in the file is executed. None: random weights, the same in every call, a
        baseline. The head may be missing in the file.
    layer : str or list of str, default="penultimate"
        Layer or layers whose activations are returned.

        - ``"penultimate"``: the features that the network's last linear layer
          classifies; for timm, those of ``forward_head(x, pre_logits=True)``. Without
          such a layer, the output of the network.
        - The name of a stage: ``"stem"``, ``"stage1"``, and so on. A stage ends where
          the resolution halves, in a vision transformer after a quarter of the blocks.
          Lower stages suit images unlike photographs.
        - The name of any module of the network, as in
          ``dict(torchvision.models.get_model("resnet18").named_modules())``. For a
          module that is called several times, its last output. Of a saved fine-tuned
          network, as in `FineTunedCNNClassifier.module_`.
        - A list of these: one forward pass, columns side by side.
    pooling : {"avg", "max", "gem", "cls", "flatten"} or int, default="avg"
        How the positions of a layer are reduced to one vector: by the average, the
        maximum or the generalized mean [2]_; not at all (``"flatten"``); or, for an int
        k, by averages over a k x k grid, which preserve the spatial layout. In a vision
        transformer these are the positions of the patches, without class and register
        tokens, except for ``"flatten"``; ``"cls"`` returns its class token. No effect
        on a layer without positions, such as the penultimate layer of most networks.
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
    weights_digest_ : str
        SHA-256 of the weights seen during `fit`. `transform` raises an error if the
        file changed since.
    n_features_in_ : int
        Number of features seen during `fit`, for 2-D `X` and data frames.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during `fit`, for data frames.

    See Also
    --------
    FeatureStore : The cache behind `memory`.
    list_backbones : Names of all available networks.
    register_backbone : Add your own network.
    sklearn.datasets.load_files : Paths and labels of images sorted into folders.

    Notes
    -----
    `fit` trains nothing: it validates the parameters and the form of `X`, and reads the
    weights. So features that are computed once, before a cross-validation, leak no
    information and save the computation for every fold and candidate; `memory` saves it
    inside a search as well. `transform` works without `fit`; only the names of the
    features, and with them ``set_output(transform="pandas")``, require it.

    `X` may be a list, tuple, array, Series or data frame of one column (of pandas or
    polars) in which each element is a path (`str` or path-like), `bytes` (the content
    of a file), a PIL image, or an array or tensor of shape (h, w) or (h, w, c); or one
    array of shape (n_samples, h, w), (n_samples, h, w, c) or (n_samples, n_features).
    Channels come last; there are 1, 3 or 4 of them, and the fourth one is transparency
    (on white). Images may differ in size. Datasets of torch and open files are refused.

    Images are resized, cropped and normalized as the weights require, so that the
    features equal those of torchvision's network on ``weights.transforms()``, and those
    of timm's on ``timm.data.create_transform``. The same image has the same features as
    a path, as bytes, as a PIL image and as an array.

    A row does not depend on the other images. In calls with at least `batch_size`
    images, it has the same bits for any order and number of threads; between batch
    sizes, and in smaller calls, it differs by less than 1e-5 of the largest feature in
    float32. The features are float32 for any `precision`.

    An estimator holds parameters and a digest, not weights: copies and saved models are
    small, and all copies in a process share one network. A saved model therefore
    requires the same weights where it is loaded; their location may be changed by
    ``set_params(weights=...)``.

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

    Averages over a grid of 2 x 2 preserve the spatial layout:

    >>> features.set_params(layer="stage2", pooling=2).fit_transform(photographs).shape
    (2, 1024)
    >>> features.get_feature_names_out()[:2]
    array(['squeezenet1_1_stage2_0', 'squeezenet1_1_stage2_1'], dtype=object)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **SHARED_CONSTRAINTS,
        "layer": [str, list, tuple],
        "pooling": [
            StrOptions({"avg", "max", "gem", "cls", "flatten"}),
            Interval(Integral, 1, None, closed="left"),
        ],
    }

    def __init__(
        self,
        backbone: str = "resnet18",
        *,
        weights: str | os.PathLike[str] | None = "DEFAULT",
        layer: str | list[str] = "penultimate",
        pooling: str | int = "avg",
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
        self.layer = layer
        self.pooling = pooling
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
    def fit(self, X: Any, y: Any = None) -> Self:
        """Validate the parameters and the form of `X`, and read the weights.

        Parameters
        ----------
        X : array-like of images
            See the notes of the class.
        y : Ignored
            Present for API consistency by convention.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            If a parameter or `X` is invalid, or the weights do not belong to the
            backbone. Image files are not read yet.
        TypeError
            If `X` is a single image, a dataset of torch or an open file, or has no
            order.
        ConnectionError
            If weights must be downloaded and there is no connection.
        """
        validated = copy.copy(self)  # a failed fit leaves the estimator unchanged
        validated._validate_images(X, reset=True)
        ExecutionConfig.from_estimator(self)  # raises an error for an invalid device
        backbone = self._load_backbone()
        self._layer_widths = self._compute_layer_widths(backbone)
        self._backbone_name = backbone.name
        self._fit_settings = self._column_settings()
        copy_feature_metadata(self, validated)
        self.weights_digest_ = backbone.digest
        self._make_memory_writable()
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
            If an image cannot be read (names the row, the path and the reason), or the
            weights changed since `fit`.
        TypeError
            If `X` is a single image, a dataset of torch or an open file, or has no
            order.
        ConnectionError
            If weights must be downloaded and there is no connection.
        MemoryError
            If a batch does not fit into memory.
        """
        self._validate_params()
        warn_of_slow_precision(self.precision, self.device)
        images = self._validate_images(X, reset=False)
        backbone = self._load_backbone()
        self._check_weights_unchanged(backbone)
        preprocessing = backbone.preprocessing_at(self.image_size, self.resize)
        spec = ModelSpec(
            BackboneSpec.to(backbone, self.weights),
            self._layers(),
            self._pooling(),
            preprocessing,
            ExecutionConfig.from_estimator(self).for_n_samples(len(images)),
        )
        min_decode_size = preprocessing.min_decode_size(self.reducing_gap)
        images = images.with_min_decode_size(min_decode_size)
        read_only = self._is_memory_read_only()
        return extract_features(spec, images, self.memory, read_only=read_only)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Return the column names: backbone, layer, and index within the layer.

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
        widths, name = self._layer_widths, self._backbone_name
        if self._fit_settings != self._column_settings():  # set_params after fit
            backbone = self._load_backbone()
            widths, name = self._compute_layer_widths(backbone), backbone.name
        names = [
            f"{name}_{layer}_{i}"
            for layer, width in zip(self._layers(), widths, strict=True)
            for i in range(width)
        ]
        return np.asarray(names, dtype=object)

    def __sklearn_tags__(self) -> Tags:
        """Return tags: no `fit` required, float32 output."""
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _validate_params(self) -> None:
        """Validate the parameters, unless they were validated before.

        Validation takes 0.1 ms, half as long as a `transform` of 20 cached rows. The
        parameters are compared by identity (True equals 1) with those of this class
        that were valid last, maybe in another instance: each fold of a search clones
        the estimator. They are kept alive here, so that their ids remain unique. Of
        mutable parameters only the type is validated here; `fit` and `transform` check
        the values in each call.
        """
        parameters = [getattr(self, name) for name in self._parameter_constraints]
        last_valid = _last_valid.get(type(self), ())
        if list(map(id, parameters)) != list(map(id, last_valid)):
            super()._validate_params()
            _last_valid[type(self)] = parameters

    def _validate_images(self, X: Any, *, reset: bool) -> ImageSequence:
        return validate_images(
            X,
            estimator=self,
            reset=reset,
            image_shape=self.image_shape,
            pixel_range=self.pixel_range,
            file_options=FileOptions.from_estimator(self),
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
                f"of distinct names. Got {self.layer!r} instead."
            )
        return layers

    def _pooling(self) -> str | int:
        # An integer of NumPy, for example from a grid, becomes an int.
        return self.pooling if isinstance(self.pooling, str) else int(self.pooling)

    def _load_backbone(self) -> Backbone:
        return load_backbone(self.backbone, self.weights, progress=self.verbose > 0)

    def _check_weights_unchanged(self, backbone: Backbone) -> None:
        """Raise an error if the weights file changed since `fit`."""
        fitted = getattr(self, "_fit_settings", None)
        if fitted is None or fitted[:2] != (self.backbone, self.weights):
            return  # not fitted, or other weights chosen by set_params
        if self.weights_digest_ != backbone.digest:
            raise ValueError(
                f"The weights {str(self.weights)!r} of {self.backbone!r} must be those "
                f"seen in fit, with digest {self.weights_digest_[:12]}. Got "
                f"{backbone.digest[:12]} instead: they changed. Call fit again to use "
                "the new ones."
            )

    def _column_settings(self) -> tuple[Any, ...]:
        """Return the parameters that determine the columns; the first two, weights."""
        layers, pooling = self._layers(), self._pooling()
        return self.backbone, self.weights, layers, pooling, self.image_size

    def _compute_layer_widths(self, backbone: Backbone) -> tuple[int, ...]:
        """Return the number of columns of each layer; validates layers and pooling."""
        preprocessing = backbone.preprocessing_at(self.image_size, self.resize)
        return layer_widths(backbone, self._layers(), self._pooling(), preprocessing)
