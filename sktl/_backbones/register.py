"""`register_backbone`: a network of your own, under a name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from sktl._backbones import catalog, registered, registry
from sktl._backbones.layouts import LAYOUTS
from sktl._backbones.named_modules import (
    is_module_text,
    module_to_text,
    text_to_module,
)
from sktl._backbones.registration import Registration, portable_builder
from sktl._backbones.stages import check_stage_name
from sktl._images.preprocessing import Preprocessing


def register_backbone(
    name: str,
    builder: Callable[[], nn.Module],
    *,
    preprocessing: Any,
    stages: Mapping[str, Sequence[str | nn.Module]] | None = None,
    head: Sequence[str | nn.Module] | None = None,
    categories: Sequence[str] | None = None,
    layout: str | None = None,
    n_prefix_tokens: int = 0,
) -> None:
    """Register a network of your own under a name.

    Registering a name again replaces its network.

    Parameters
    ----------
    name : str
        Must differ from the names of the bundled network and of torchvision, and not
        start with ``"timm/"``.

    builder : callable
        Called without arguments; returns a network that maps ``(n, 3, h, w)``, or
        ``(n, 1, h, w)`` if `preprocessing` has the mean of one channel, to
        ``(n, n_categories)`` or, without a classifier, to features ``(n, n_features)``.
        The penultimate features are the input of its last linear layer, or the output
        of a `head` without one. Fine-tuning replaces that layer, or adds one.
        With ``weights="DEFAULT"`` and ``weights=None`` the network is used as it is
        built, with torch's random number generator seeded; with a path, the state dict
        of that file is loaded into it.

    preprocessing : Preprocessing or torchvision's ImageClassification
        Transform of the images before the network.

    stages : dict of str to list of str or Module, default=None
        For each stage, in order, the names of the modules of the network that it runs,
        as in ``network.named_modules()``. A part of ``forward`` that is not a module of
        the network is passed as a module of torch without parameters, such as
        ``nn.Flatten(1)``. The network itself and the names in its state dict do not
        change. None: an instance of a class of ``torchvision.models`` or of timm has
        the same stages as their networks; any other network has stages if it has
        attributes ``stages`` (a ModuleDict, or modules in order) and ``head``.

    head : list of str or Module, default=None
        The modules after the last stage, as in `stages`. Stages and head, run in order,
        must be equivalent to the network, which is tested when it is built. Required
        with `stages`.

    categories : sequence of str, default=None
        Names of the outputs.

    layout : {"NCHW", "NHWC"} or None, default=None
        Axes of activations with four axes, where these cannot be determined: rows and
        columns are the axes that grow with the images. Required only for layers whose
        output always has the same number of rows and columns. Activations with three
        axes are tokens, ``(n, tokens, c)``.

    n_prefix_tokens : int, default=0
        Number of tokens of a transformer before those of the patches: the class token,
        and registers after it. ``pooling="avg"`` leaves them out, and ``pooling="cls"``
        returns the first one.

    Raises
    ------
    TypeError
        If `name` is not a str, `builder` is not callable, or another parameter has
        another type.
    ValueError
        If `name` is empty or reserved, the name of a stage or a module in `stages` or
        `head` is invalid, only one of these is passed, or `layout` or `n_prefix_tokens`
        is invalid.

    Notes
    -----
    A function or class at the top level of a module is recorded by its reference, such
    as ``"my_module:build"``. Pickles of estimators and files written by ``save``
    contain this reference and the other parameters. Worker processes of joblib, Dask
    and Ray, and processes that load a pickle, import the builder from that module. They
    use their own registration if they have the same one; if they have another network
    under the name, from `register_backbone` or from another file, loading raises a
    ValueError. For files written by ``save``, see `FineTunedCNNClassifier.load`.

    A lambda, a nested function or a function of a script or notebook has no reference.
    Worker processes get a copy of it. Pickles and saved files are refused. What
    :obj:`joblib.Memory` caches, as in a pipeline with `memory`, has only the name of
    the backbone, so the process that reads it must register the backbone.

    Examples
    --------
    >>> from torch import nn
    >>> from sktl import Preprocessing, register_backbone
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv1 = nn.Conv2d(3, 8, 3, stride=2)
    ...         self.conv2 = nn.Conv2d(8, 16, 3, stride=2)
    ...         self.fc = nn.Linear(16, 10)
    ...     def forward(self, x):
    ...         x = self.conv2(self.conv1(x).relu()).relu()
    ...         return self.fc(x.mean((2, 3)))
    >>> register_backbone(
    ...     "net",
    ...     Net,
    ...     preprocessing=Preprocessing(resize_size=64, crop_size=64),
    ...     stages={"stem": ["conv1", nn.ReLU()], "stage1": ["conv2", nn.ReLU()]},
    ...     head=[nn.AdaptiveAvgPool2d(1), nn.Flatten(1), "fc"],
    ... )
    """
    if not callable(builder) or isinstance(builder, nn.Module):
        raise TypeError(
            "builder must be a function that returns a network. Got "
            f"{type(builder).__name__}. To register a network, pass `lambda: network`."
        )
    registered.add(
        create_registration(
            name,
            portable_builder(str(name), builder),
            preprocessing=preprocessing,
            stages=stages,
            head=head,
            categories=categories,
            layout=layout,
            n_prefix_tokens=n_prefix_tokens,
        )
    )
    # The module of the builder may have changed.
    registry.backbones.drop(lambda key: key[0] == name)


def create_registration(
    name: str,
    builder: Callable[[], nn.Module],
    *,
    preprocessing: Any,
    stages: Mapping[str, Sequence[str | nn.Module]] | None,
    head: Sequence[str | nn.Module] | None,
    categories: Sequence[str] | None,
    layout: str | None,
    n_prefix_tokens: int,
) -> Registration:
    """Validate arguments of `register_backbone`.

    Parameters
    ----------
    name, preprocessing, stages, head, categories, layout, n_prefix_tokens
        As in `register_backbone`.
    builder : callable
        As in `Registration`.

    Returns
    -------
    Registration

    Raises
    ------
    TypeError, ValueError
        As `register_backbone`.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"The name of a backbone must be a str. Got {name!r}. Choose a name, such "
            "as 'my_network'."
        )
    if not name or catalog.is_reserved(name):
        raise ValueError(
            "The name of a registered backbone must not be empty, nor the name of the "
            "bundled network or of a network of torchvision, nor start with 'timm/'. "
            f"Got {name!r}. Choose another name, such as 'my_network'."
        )
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = Preprocessing.from_torchvision(preprocessing)
    if isinstance(categories, str):
        raise TypeError(
            f"categories must be a list of names. Got {categories!r}. Pass a list with "
            "one name for each output."
        )
    if layout not in (None, *LAYOUTS):
        raise ValueError(
            f"layout must be None, 'NCHW' or 'NHWC'. Got {layout!r}. Choose one of "
            "these, or None if rows and columns grow with the images."
        )
    if type(n_prefix_tokens) is not int or n_prefix_tokens < 0:
        raise ValueError(
            f"n_prefix_tokens must be an int of at least 0. Got {n_prefix_tokens!r}. "
            "Pass the number of tokens before those of the patches."
        )
    if (stages is None) != (head is None):
        raise ValueError(
            "stages and head must be passed together. Got only "
            f"{'head' if stages is None else 'stages'}. Pass both, or neither."
        )
    return Registration(
        name,
        builder,
        preprocessing,
        None if categories is None else tuple(categories),
        layout,
        n_prefix_tokens,
        None if stages is None else _stage_names(stages),
        () if head is None else _module_names("head", head),
    )


def _stage_names(stages: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if not isinstance(stages, Mapping) or not stages:
        raise TypeError(
            "stages must be a dict with the names of the modules of each stage. Got "
            f"{stages!r}."
        )
    for name in stages:
        check_stage_name(name)
    return tuple((n, _module_names(f"stages[{n!r}]", m)) for n, m in stages.items())


def _module_names(part: str, modules: Any) -> tuple[str, ...]:
    is_valid = isinstance(modules, list | tuple) and len(modules) > 0
    if not is_valid or not all(isinstance(m, str | nn.Module) for m in modules):
        raise TypeError(
            f"{part} must be a list of names of modules, and of modules of torch "
            f"without parameters. Got {modules!r}."
        )
    names = [m if isinstance(m, str) else module_to_text(m) for m in modules]
    for name in names:
        if is_module_text(name):
            text_to_module(name)  # raises if it is invalid
    return tuple(names)
