"""`register_backbone`: a network of your own, under a name."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sktl._backbones import catalog, registered, registry
from sktl._backbones.layouts import LAYOUTS
from sktl._images.preprocessing import Preprocessing
from sktl._utils.random_state import preserve_rng_state


def register_backbone(
    name: str,
    builder: Callable[[], nn.Module],
    *,
    preprocessing: Any,
    categories: Sequence[str] | None = None,
    layout: str | None = None,
) -> None:
    """Register a network of your own under a name, in this process.

    Registering a name again replaces its network. Other processes, such as the workers
    of ``GridSearchCV(n_jobs=2)``, have the name only if they import a module that
    registers it.

    Parameters
    ----------
    name : str
        Must differ from the names of the bundled network and of torchvision, and not
        start with ``"timm/"``.

    builder : callable
        Called without arguments; returns a network that maps ``(n, 3, h, w)`` to
        ``(n, n_categories)``. With ``weights="DEFAULT"`` and ``weights=None`` the
        network is used as it is built, with torch's random number generator seeded;
        with a path, the state dict of that file is loaded into it. To have stages, the
        network must be an instance of a class of ``torchvision.models``, or have
        attributes ``stages`` (a ModuleDict, or modules in order) and ``head`` which,
        run in order, are equivalent to the network.

    preprocessing : Preprocessing or torchvision's ImageClassification
        Transform of the images before the network.

    categories : sequence of str, default=None
        Names of the outputs.

    layout : {"NCHW", "NHWC"} or None, default=None
        Axes of activations with four axes, where these cannot be determined: rows and
        columns are the axes that grow with the images. Required only for layers whose
        output always has the same number of rows and columns.

    Raises
    ------
    TypeError
        If `name` is not a str, `builder` is not callable or `preprocessing` has
        another type.
    ValueError
        If `name` is empty or reserved, or `layout` is invalid.

    Examples
    --------
    >>> from torchvision.models import ResNet
    >>> from torchvision.models.resnet import BasicBlock
    >>> from sktl import Preprocessing, register_backbone
    >>> register_backbone(
    ...     "resnet10",
    ...     lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10),
    ...     preprocessing=Preprocessing(resize_size=64, crop_size=64),
    ... )
    """
    if not isinstance(name, str):
        raise TypeError(f"The name of a backbone must be a str. Got {name!r}.")
    if not name or catalog.is_reserved(name):
        raise ValueError(
            "The name of a registered backbone must not be empty, nor the name of the "
            "bundled network or of a network of torchvision, nor start with 'timm/'. "
            f"Got {name!r}. Choose another name."
        )
    if not callable(builder) or isinstance(builder, nn.Module):
        raise TypeError(
            "builder must be a function that returns a network. Got "
            f"{type(builder).__name__}. To register a network, pass `lambda: network`."
        )
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = Preprocessing.from_torchvision(preprocessing)
    if isinstance(categories, str):
        raise TypeError(f"categories must be a list of names. Got {categories!r}.")
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout must be None, 'NCHW' or 'NHWC'. Got {layout!r}.")
    names = None if categories is None else tuple(categories)
    with preserve_rng_state():  # the lock under which registered backbones are built
        registered.add(name, builder, preprocessing, names, layout)
        registry.backbones.drop(lambda key: key[0] == name)
