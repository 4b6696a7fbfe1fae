"""Backbones of timm: ``"timm/<architecture>.<tag>"``, with weights from its hub.

The tag names the weights; without one, an architecture has those that timm has chosen
as its default. A revision of the repository of the weights may follow, as in
``"timm/resnet50.a1_in1k@v1"``. timm is imported only if a name asks for it.

Weights files are read by `sktl._backbones.weights`, never by timm. Then timm converts
the state dict as for its own files: other names of parameters, positions of another
number of patches.
"""

import contextlib
import difflib
import functools
import importlib.util
import inspect
import re
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn
from torchvision import models

from sktl._backbones.hub import fetch_hub_file
from sktl._backbones.source import BackboneDefinition, weights_path
from sktl._backbones.timm_structure import describe_network
from sktl._backbones.unwrap import StateDict
from sktl._backbones.weights import fetch_weights, skip_weight_allocation
from sktl._images.preprocessing import Preprocessing
from sktl._utils.random_state import preserve_rng_state

_PREFIX = "timm/"
_MAX_DEFINITIONS = 32
_N_TAGS = 8  # in an error message
_lock = threading.Lock()  # of the replaced function of timm


def owns(name: str) -> bool:
    """Return whether a name is one of timm; timm is not imported."""
    return isinstance(name, str) and name.startswith(_PREFIX)


def without_prefix(name: str) -> str:
    """Return a name of timm as it is in timm."""
    return name.removeprefix(_PREFIX)


def is_installed() -> bool:
    """Return whether timm is installed; timm is not imported."""
    return importlib.util.find_spec("timm") is not None


def is_imported() -> bool:
    """Return whether this process has imported timm, which takes seconds."""
    return sys.modules.get("timm") is not None


def may_match(pattern: str) -> bool:
    """Return whether names of timm may match a pattern, as far as it can be known.

    Parameters
    ----------
    pattern : str
        As in `list_backbones`. If it starts with ``"timm/"``, the result is True
        whether timm is installed or not.
    """
    start = re.split(r"[*?\[]", pattern)[0]
    return owns(start) or (_PREFIX.startswith(start) and is_installed())


def names(pretrained: bool = False) -> Collection[str]:
    """Return the architectures of timm, or its pretrained weights; see the source."""
    listed = _import_timm().list_models(pretrained=pretrained)
    return [_PREFIX + name for name in listed]


def resolve(
    name: str,
    weights: str | PathLike[str] | None,
    progress: bool,
    *,
    fetch: bool = True,
) -> BackboneDefinition:
    """Return the definition of a network of timm; see `BackboneSource`."""
    model = _find_model(name)
    file, license_ = None, None
    if weights == "DEFAULT":
        if not model.cfg.has_weights:
            architecture = model.name.partition(".")[0]
            raise ValueError(
                f"timm has no pretrained weights for {name!r}. "
                f"{_describe_tags(architecture, model.tags)} Set weights=None for "
                "random weights, or the path of a file."
            )
        license_ = model.cfg.license
        if fetch:
            file = _fetch(model, progress)
    elif weights in model.tags:
        architecture = model.name.partition(".")[0]
        raise ValueError(
            "Weights of timm are chosen by the name of the backbone. Got "
            f"{weights=}. Set backbone='{_PREFIX}{architecture}.{weights}'."
        )
    elif weights is not None:
        file = weights_path(name, weights, ["DEFAULT"])
    return _definition(model, file, license_, weights is None)


@dataclass(frozen=True, eq=False)
class _Model:
    """An architecture of timm, and one of its configurations."""

    name: str  # with the tag
    cfg: Any  # PretrainedCfg
    tags: tuple[str, ...]  # of all weights of the architecture
    revision: str | None


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"Backbones whose name starts with {_PREFIX!r} require the package timm: "
            f"{error}. Run pip install 'sktl[timm]'."
        ) from error
    return timm


@functools.lru_cache(_MAX_DEFINITIONS)  # called in each fit and transform
def _find_model(name: str) -> _Model:
    library = _import_timm()
    full, at, revision = without_prefix(name).partition("@")
    architecture, _, tag = full.partition(".")
    if architecture not in library.list_models():
        raise _unknown_architecture(name, architecture)
    if at and not revision:
        raise ValueError(
            f"A revision must follow the '@' in the name of a backbone. Got {name!r}. "
            "Write a revision, such as '@main', or remove the '@'."
        )
    cfgs = library.models.get_arch_pretrained_cfgs(architecture)
    tags = tuple(
        each.partition(".")[2] for each, cfg in cfgs.items() if cfg.has_weights
    )
    if tag and full not in cfgs:
        raise ValueError(
            f"timm has no weights {tag!r} for {_PREFIX + architecture!r}. "
            f"{_describe_tags(architecture, tags, tag)} Choose another tag, or omit it."
        )
    cfg = library.get_pretrained_cfg(full) or library.models.PretrainedCfg()
    if cfg.tag and not tag:
        full = f"{full}.{cfg.tag}"
    return _Model(full, cfg, tags, revision or None)


def _unknown_architecture(name: str, architecture: str) -> ValueError:
    library = _import_timm()
    renamed = library.models.get_deprecated_models().get(architecture)
    close = difflib.get_close_matches(architecture, library.list_models())
    close = [renamed] if renamed else close
    advice = f"Do you mean {' or '.join(_PREFIX + each for each in close)}? "
    return ValueError(
        f"There is no backbone {name!r} in timm {library.__version__}. "
        f"{advice if close else ''}list_backbones('timm/*') returns the names of "
        "timm, and filters them, as in list_backbones('timm/*resnet*')."
    )


def _describe_tags(architecture: str, tags: Collection[str], near: str = "") -> str:
    if not tags:
        return f"There are none for {_PREFIX + architecture!r}."
    shown = difflib.get_close_matches(near, tags, _N_TAGS, 0.0)
    more = ", ..." if len(tags) > _N_TAGS else ""
    return f"Its weights have the tags {', '.join(shown)}{more}."


def _fetch(model: _Model, progress: bool) -> str:
    """Return the file of the weights, downloaded if needed."""
    repository, _, pinned = (model.cfg.hf_hub_id or "").partition("@")
    if repository:
        filename = _safe_filename(model.cfg.hf_hub_filename or "pytorch_model.bin")
        revision = model.revision or pinned or None
        return str(fetch_hub_file(repository, filename, revision, progress=progress))
    if model.revision is not None:
        raise ValueError(
            f"The weights of {_PREFIX + model.name!r} are not on the Hugging Face Hub, "
            f"so they have no revisions. Got the revision {model.revision!r}. Remove "
            f"'@{model.revision}'."
        )
    return str(fetch_weights(model.cfg.url, progress=progress))


def _safe_filename(filename: str) -> str:
    """Return the name that a repository gives to the same content without a pickle."""
    if filename.endswith("pytorch_model.bin"):
        return filename.replace("pytorch_model.bin", "model.safetensors")
    return f"{filename.rpartition('.')[0]}.safetensors"


@functools.lru_cache(_MAX_DEFINITIONS)
def _definition(
    model: _Model, file: str | None, license_: str | None, is_random: bool
) -> BackboneDefinition:
    def build(num_classes: int | None) -> nn.Module:
        return _build(
            model, {} if num_classes is None else {"num_classes": num_classes}
        )

    preprocessing = Preprocessing.from_timm(model.cfg)
    return BackboneDefinition(
        build,
        functools.partial(describe_network, preprocessing=preprocessing),
        preprocessing,
        None if is_random else _categories(model.cfg.num_classes),
        # Whether a transformer supports other sizes, its class tells.
        has_fixed_image_size=None if model.cfg.fixed_input_size else False,
        weights_name=model.name,
        file=file,
        adapt_state_dict=functools.partial(_adapt_state_dict, model),
        known_weights=("DEFAULT",) if model.tags else (),
        license=license_,
        embedding_width=(model.cfg.num_classes if has_embeddings(model.name) else None),
    )


def _build(model: _Model, options: dict[str, Any]) -> Any:
    create = functools.partial(_import_timm().create_model, model.name)
    if model.cfg.fixed_input_size:
        try:
            # Positions are interpolated for the size of the images.
            return create(dynamic_img_size=True, **options)
        except TypeError:  # the class has no such parameter
            pass
    return create(**options)


def _adapt_state_dict(
    model: _Model, network: nn.Module, state_dict: StateDict
) -> StateDict:
    """Convert a state dict as timm does before it loads one into a network.

    Parameters
    ----------
    model : _Model
        Model of the network.
    network : Module
        Network that the state dict is for; only its shapes are read.
    state_dict : dict of str to Tensor
        Not modified.

    Returns
    -------
    dict of str to Tensor
        `state_dict` itself, if it has the names and shapes of `network`.
    """
    own = network.state_dict()
    if own.keys() == state_dict.keys() and all(
        own[name].shape == tensor.shape for name, tensor in state_dict.items()
    ):
        return state_dict
    arguments = _loading_arguments(model.name)
    convert = arguments["filter_fn"]
    # Resampled positions must not be rounded to the precision of the file.
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state_dict.items()
    }
    try:
        if convert is None:
            return tensors
        has_network = len(inspect.signature(convert).parameters) > 1
        tensors = convert(tensors, network) if has_network else convert(tensors)
    # Broad on purpose: a function of timm may fail in any way for a state dict of
    # another network, whose names are compared with those of the network later.
    except Exception:
        return state_dict
    if not arguments["strict"]:  # files of these networks have more than the network
        tensors = {name: tensor for name, tensor in tensors.items() if name in own}
    return tensors


class _Loading(Exception):
    """Carries the arguments of `load_pretrained` out of timm."""


@functools.lru_cache(_MAX_DEFINITIONS)
def _loading_arguments(name: str) -> dict[str, Any]:
    """Return the arguments with which timm loads weights into a network.

    They are written in the code of timm that creates a network, and are known only
    when it calls `load_pretrained`.
    """
    library = _import_timm()
    # A state dict has priority over weights that would be downloaded.
    overlay = {"state_dict": {"": torch.zeros(1)}}
    create = functools.partial(
        library.create_model, name, pretrained=True, pretrained_cfg_overlay=overlay
    )
    try:
        with contextlib.suppress(RuntimeError):  # a constant depends on the values
            with _raise_when_loading(library), skip_weight_allocation():
                create()
        with preserve_rng_state(), _raise_when_loading(library):
            create()
    except _Loading as loading:
        return dict(loading.args[0])
    raise RuntimeError(
        f"timm {library.__version__} is not supported: it does not load the weights of "
        f"{name!r} with load_pretrained. Install another version, such as 1.0.20."
    )


@contextlib.contextmanager
def _raise_when_loading(library: Any) -> Iterator[None]:
    """Raise `_Loading` where timm loads weights in this thread, inside this context."""
    namespace = library.models.build_model_with_cfg.__globals__
    thread = threading.get_ident()

    def load_pretrained(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != thread:
            return original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        raise _Loading(bound.arguments)

    with _lock:
        original = namespace["load_pretrained"]
        namespace["load_pretrained"] = load_pretrained
        try:
            yield
        finally:
            namespace["load_pretrained"] = original


def has_embeddings(name: str) -> bool:
    """Return whether the outputs of weights of timm are an embedding of the image.

    Parameters
    ----------
    name : str
        Name of an architecture with a tag, as in timm, whose weights have outputs.

    Returns
    -------
    bool
        True for networks that were trained with texts: CLIP and Perception Encoder.
        timm says so in comments only. Where such a network was fine-tuned on
        categories, its tag says that.
    """
    was_trained_with_texts = "clip" in name or "_pe_core_" in name
    return was_trained_with_texts and "_ft_in" not in name


@functools.cache
def _categories(n_outputs: int) -> tuple[str, ...] | None:
    """Return the names of the outputs, or None if timm has no table of them.

    The first of the synonyms of a category, as torchvision names those of ImageNet,
    or all synonyms if several categories have the same first one.
    """
    _import_timm()
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": n_outputs})
    if subset is None:
        return None
    if subset == "imagenet-1k":  # with two names that torchvision has made unique
        return tuple(models.ResNet18_Weights.DEFAULT.meta["categories"])
    synonyms = ImageNetInfo(subset).label_descriptions()
    first = [each.split(", ")[0] for each in synonyms]
    n_uses = Counter(first)
    return tuple(
        name if n_uses[name] == 1 else every
        for name, every in zip(first, synonyms, strict=True)
    )
