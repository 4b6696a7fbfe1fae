"""What networks of timm tell about themselves, by their methods and attributes.

All have the methods ``forward_features`` and ``forward_head``, whose argument
``pre_logits`` returns the penultimate features. What depends on these methods and on
other names of timm is in this module; it does not import timm.
"""

import copy
import inspect
from typing import Any

from torch import Tensor, nn


class WholeNetwork(nn.Module):
    """A network of timm without its classifier: images to penultimate features.

    Parameters
    ----------
    network : Module
        Network; its parameters are used, not copied, and so are its modules that
        contain no classifier.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        tensors = [*network.parameters(), *network.buffers()]
        # Copied, since the classifier is removed.
        copied: Any = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
        copied.reset_classifier(0)
        for name, child in network.named_children():
            if str(getattr(copied, name, None)) == str(child):
                # It has no classifier. With the module itself, hooks are shared.
                setattr(copied, name, child)
        self.network = copied

    def forward(self, x: Tensor) -> Tensor:
        """Return the penultimate features of images."""
        pooled: Tensor = penultimate(self.network, features(self.network, x))
        return pooled


def is_timm_network(network: Any) -> bool:
    """Return whether a network is of timm, and has the methods of such networks.

    The methods alone do not tell, since other networks have methods of these names.
    """
    methods = ("forward_features", "forward_head", "reset_classifier")
    if not all(callable(getattr(network, name, None)) for name in methods):
        return False
    packages = {each.__module__.partition(".")[0] for each in type(network).__mro__}
    # Of a class of timm, or of another class that timm has created.
    is_of_timm = "timm" in packages or isinstance(
        getattr(network, "pretrained_cfg", None), dict
    )
    parameters = inspect.signature(network.forward_head).parameters
    return is_of_timm and "pre_logits" in parameters


def has_class_token(network: nn.Module) -> bool:
    """Return whether the first of the prefix tokens is a class token.

    All networks of timm that have one give the parameter this name, in some with the
    number of the stage, and put it before the registers.
    """
    names = [name.split(".")[-1] for name, _ in network.named_parameters()]
    return any(name.startswith("cls_token") for name in names)


def pools_other_tokens(network: nn.Module) -> bool:
    """Return whether the penultimate features are not those of the class token.

    In networks of timm that may pool tokens, an attribute has the name of the pooling.
    """
    pooling = getattr(network, "global_pool", None)
    return isinstance(pooling, str) and pooling not in ("", "token")


def no_weight_decay(network: Any) -> frozenset[str]:
    """Return the names of parameters to which no weight decay is applied.

    Parameters
    ----------
    network : Module
        Any network. Those of timm have a method ``no_weight_decay``.

    Returns
    -------
    frozenset of str
        With wildcards; empty if the network does not say it.
    """
    names = getattr(network, "no_weight_decay", None)
    return frozenset(names()) if callable(names) else frozenset()


def features(network: Any, x: Any) -> Any:
    """Return the output of the last layer below the head."""
    return network.forward_features(x)


def logits(network: Any, x: Any) -> Any:
    """Return the outputs for what `features` returns."""
    return network.forward_head(x)


def penultimate(network: Any, x: Any) -> Any:
    """Return the penultimate features for what `features` returns."""
    return network.forward_head(x, pre_logits=True)


def patch_size(embedding: Any) -> int:
    """Return the side of a patch, in pixels of the images."""
    if hasattr(embedding, "feat_ratio"):  # of patches of activations, too
        return int(embedding.feat_ratio())
    return int(max(embedding.patch_size))
