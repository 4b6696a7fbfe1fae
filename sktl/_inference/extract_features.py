"""Feature extraction: outputs of a model, cached and distributed as configured."""

from sktl._inference.cached_forward import CacheableImages
from sktl._inference.distributed import distributed_forward
from sktl._inference.engines import Rows
from sktl._inference.feature_cache import Memory, open_cache
from sktl._inference.model_spec import ModelSpec


def extract_features(
    spec: ModelSpec,
    images: CacheableImages,
    memory: Memory,
    *,
    read_only: bool = False,
) -> Rows:
    """Return the features of images: outputs of a model, cached in `memory`.

    Parameters
    ----------
    spec : ModelSpec
        Model to run.
    images : CacheableImages
        At least one image.
    memory : str, path-like, FeatureStore, joblib.Memory or None
        Location of the cache; None caches nothing.
    read_only : bool, default=False
        Whether cached rows are read, and no rows are written.

    Returns
    -------
    ndarray of shape (n_images, n_features), float32
        One row per image.

    Raises
    ------
    ValueError, MemoryError, FileNotFoundError
        As `distributed_forward`.
    """
    cache = open_cache(
        memory, spec.namespace(), images.decode_fingerprint(), read_only=read_only
    )
    return distributed_forward(spec, images, cache)
