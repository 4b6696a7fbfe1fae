"""Find the state dict of a network in the content of a weights file.

Training scripts save more than the weights of one network: they nest the state dict in
a dict, wrap the network in other modules, whose names then precede the names of its
tensors, and put other layers in place of its classification layer. All rules about this
are here. They only remove what does not belong to the network; no tensor is renamed
beyond the removal of a prefix, or changed.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]

SUFFIXES = (".pth", ".pt", ".safetensors", ".pth.tar", ".ckpt", ".bin")
# Keys under which a dict holds a state dict, or another such dict.
CONTAINERS = (
    *("state_dict", "model_state_dict", "model", "network", "net"),
    *("backbone", "encoder", "teacher", "student"),
)
# Modules that contain the network: DataParallel, torch.compile, AveragedModel,
# Lightning, and the trained network of a self-supervised method.
WRAPPERS = {
    *("module", "_orig_mod", "model", "network", "net", "backbone", "encoder"),
    *("encoder_q", "base_encoder", "teacher", "student"),
}
# Layers that a training adds to the network for its loss.
TRAINING_HEADS = {
    *("head", "heads", "fc", "classifier", "projector", "projection"),
    *("projection_head", "predictor", "prediction_head", "prototypes"),
    *("queue", "queue_ptr"),
}
_MAX_DEPTH = 3  # of nested dicts
_MAX_WRAPPERS = 8  # modules around a network
_MAX_PREFIXES = 16  # the most frequent ones of a state dict
_N_SHOWN = 3  # names of each kind in a message
_COUNTER = "num_batches_tracked"  # of BatchNorm; files of old versions have none


@dataclass(frozen=True)
class Head:
    """Names of the tensors at the end of a network.

    Attributes
    ----------
    name : str
        Largest module that contains the last linear layer and nothing below the head.
    tensors : frozenset of str
        All tensors above the last stage; without stages, those of `last`.
    last : frozenset of str
        Tensors of the last linear layer.
    """

    name: str = ""
    tensors: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Selection:
    """The state dict of a network, chosen from the content of a file.

    Attributes
    ----------
    state_dict : dict of str to Tensor
        Under the names of the network. It may have missing or unexpected tensors.
    missing_head : tuple of str
        Names of tensors of the head, if the file has the network without its head.
    removed : str
        Description of what was removed, empty if nothing was.
    """

    state_dict: StateDict
    missing_head: tuple[str, ...]
    removed: str


def find_state_dicts(content: Any) -> dict[str, StateDict]:
    """Find the state dicts in the content of a file.

    Parameters
    ----------
    content : object
        A dict of tensors, or a dict that has one under a key of `CONTAINERS`.

    Returns
    -------
    dict of str to dict of str to Tensor
        By their place in the file, such as ``"['model']"``. Values that are not
        tensors, such as the number of an epoch, are omitted.
    """
    return dict(_find(content, "", _MAX_DEPTH, set()))


def select_state_dict(
    found: Mapping[str, StateDict],
    network: nn.Module,
    head: Head,
    adapt: Callable[[nn.Module, StateDict], StateDict],
    origin: str,
) -> Selection:
    """Select the state dict of a network and remove what surrounds it.

    A prefix of modules of `WRAPPERS` is removed if all names of the network below its
    head then exist. Tensors without the prefix belong to other parts of the training
    and are removed.

    Parameters
    ----------
    found : mapping of str to dict
        From `find_state_dicts`; at least one.
    network : Module
        Network that the weights are for; only names and shapes are read.
    head : Head
        Its head.
    adapt : callable
        As in `BackboneDefinition`.
    origin : str
        Description of the file in the error message.

    Returns
    -------
    Selection
        If none fits, the one with the most names of the network.

    Raises
    ------
    ValueError
        If several state dicts fit and differ.
    """
    own = network.state_dict()
    candidates = [
        _Candidate.of(place, prefix, tensors, adapt(network, inside), own, head)
        for place, tensors in found.items()
        for prefix, inside in _without_prefix(tensors)
    ]
    fitting = [each for each in candidates if each.fits]
    # Only with several networks of the same names, such as two widths.
    fitting = [each for each in fitting if each.has_shapes] or fitting
    best = max(fitting or candidates, key=lambda each: each.n_names)
    others = [each for each in fitting if not each.equals(best, own)]
    if others:
        raise ValueError(
            "A weights file must contain one set of weights for the network. "
            f"{origin} have several that differ: "
            f"{', and '.join(map(str, [best, *others]))}. Save the state dict to use "
            "in a file of its own."
        )
    return best.selection(head, own)


def fill_missing_head(
    state_dict: StateDict, network: nn.Module, missing: Iterable[str]
) -> None:
    """Add the tensors that a head lacks, with values from which nothing is computed.

    Parameters
    ----------
    state_dict : dict of str to Tensor
        It is changed.
    network : Module
        Its names, shapes and data types are read.
    missing : iterable of str
        Names of the tensors.
    """
    own = network.state_dict()
    for name in missing:
        # NaN, so that no output can be mistaken for one of trained weights.
        value = math.nan if own[name].is_floating_point() else 0
        dtype = own[name].dtype
        state_dict[name] = torch.full(own[name].shape, value, dtype=dtype)


def describe_mismatch(
    missing: Iterable[str], unexpected: Iterable[str], other_shape: Iterable[str]
) -> str:
    """Describe which tensors do not match a network: few names of each kind.

    Parameters
    ----------
    missing, unexpected, other_shape : iterable of str
        Names of tensors; of the last, with both shapes.

    Returns
    -------
    str
        Such as ``"2 missing (conv1.weight, bn1.weight)"``. Empty if there are none.
    """
    kinds = {"missing": missing, "unexpected": unexpected}
    kinds["of another shape"] = other_shape
    parts = []
    for kind, names in kinds.items():
        names = list(names)
        if names:
            more = ", ..." if len(names) > _N_SHOWN else ""
            shown = ", ".join(names[:_N_SHOWN])
            parts.append(f"{len(names)} {kind} ({shown}{more})")
    return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A state dict without a prefix, compared with a network."""

    place: str
    prefix: str
    state_dict: StateDict
    n_outside: int  # tensors without the prefix
    n_names: int  # of the network
    fits: bool  # all names below the head exist
    has_shapes: bool
    other_head: tuple[str, ...]  # tensors that are not of the network

    @classmethod
    def of(
        cls,
        place: str,
        prefix: str,
        tensors: StateDict,
        adapted: StateDict,
        own: Mapping[str, Tensor],
        head: Head,
    ) -> "_Candidate":
        below = [n for n in own if n not in head.tensors and not n.endswith(_COUNTER)]
        known = [name for name in own if name in adapted]
        children = {name.partition(".")[0] for name in own}
        return cls(
            place,
            prefix,
            adapted,
            sum(not name.startswith(prefix) for name in tensors),
            len(known),
            bool(known) and all(name in adapted for name in below),
            all(adapted[n].shape == own[n].shape for n in below if n in adapted),
            tuple(
                name
                for name in adapted
                if name not in own and _is_of_other_head(name, head, children)
            ),
        )

    def __str__(self) -> str:
        names = f"the names with the prefix {self.prefix!r}"
        if not self.prefix:
            names = "the names without a prefix"
        return f"{names} in {self.place}" if self.place else names

    def equals(self, other: "_Candidate", own: Iterable[str]) -> bool:
        """Return whether both have the same tensors of the network."""
        mine, theirs = self.state_dict, other.state_dict
        return self is other or all(
            _are_equal(mine[name], theirs[name])
            if name in mine and name in theirs
            else (name in mine) == (name in theirs)
            for name in own
        )

    def selection(self, head: Head, own: Mapping[str, Tensor]) -> Selection:
        """Remove the layers of another head, and list what the head lacks."""
        kept: Any = OrderedDict(self.state_dict)
        # Layers inside the head that the network does not have: its own names, if the
        # file has them, belong to the same other head.
        is_replaced = any(name.startswith(f"{head.name}.") for name in self.other_head)
        missing: list[str] = []
        if self.fits and head.last and (is_replaced or not head.last & kept.keys()):
            for name in head.tensors & kept.keys():
                if name in head.last or kept[name].shape != own[name].shape:
                    del kept[name]
            missing = sorted(
                n for n in head.tensors if n not in kept and not n.endswith(_COUNTER)
            )
        if self.fits:
            for name in self.other_head:
                del kept[name]
        if hasattr(self.state_dict, "_metadata"):
            kept._metadata = self.state_dict._metadata
        return Selection(kept, tuple(missing), self._removed(missing))

    def _removed(self, missing: list[str]) -> str:
        if not self.fits:
            return ""
        parts = [f"read {self.place}"] if self.place else []
        if self.prefix:
            outside = f" and {self.n_outside} tensors without it" * (self.n_outside > 0)
            parts.append(f"removed the prefix {self.prefix!r}{outside}")
        if self.other_head:
            parts.append(
                f"ignored {len(self.other_head)} tensors of another head "
                f"({', '.join(self.other_head[:_N_SHOWN])})"
            )
        if missing:
            parts.append(f"the head is missing ({', '.join(missing[:_N_SHOWN])})")
        return "; ".join(parts)


def _find(
    content: Any, place: str, depth: int, visited: set[int]
) -> Iterator[tuple[str, StateDict]]:
    # In a small file, one large dict may be the value of many keys.
    if not isinstance(content, dict) or id(content) in visited:
        return
    visited.add(id(content))
    nested: list[tuple[str, StateDict]] = []
    for key in CONTAINERS if depth > 0 else ():
        # A pickle can set attributes of any name, such as "get", on an OrderedDict.
        value = dict.get(content, key)
        nested += _find(value, f"{place}[{key!r}]", depth - 1, visited)
    tensors: Any = OrderedDict(
        # The copy has none of the attributes that a pickle can set on a parameter.
        (name, Tensor.detach(value))
        for name, value in dict.items(content)
        if isinstance(name, str) and _is_array(value)
    )
    if nested:
        yield from nested
    elif tensors:
        versions = _versions_in(content)
        if versions is not None:
            tensors._metadata = versions
        yield place, tensors


def _are_equal(one: Tensor, other: Tensor) -> bool:
    # An expanded tensor, which is small in the file, would take long to compare.
    is_expanded = one.nbytes > one.untyped_storage().nbytes()
    is_of_dtype = one.dtype == other.dtype
    return is_of_dtype and not is_expanded and torch.equal(one, other)


def _is_array(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_meta
    )


def _versions_in(content: dict[str, Any]) -> dict[str, dict[str, int]] | None:
    """Return the versions of layers that ``state_dict()`` stores with the tensors."""
    metadata = getattr(content, "__dict__", {}).get("_metadata")
    if not isinstance(metadata, dict):
        return None
    return {
        name: {"version": value["version"]}
        for name, value in dict.items(metadata)
        if type(value) is dict and isinstance(value.get("version"), int)
    }


def _without_prefix(tensors: StateDict) -> Iterator[tuple[str, StateDict]]:
    """Yield each prefix of wrappers, and the tensors without it."""
    counts: Counter[str] = Counter()
    for name in tensors:
        prefix = ""
        counts[prefix] += 1
        for part in name.split(".", _MAX_WRAPPERS)[:-1]:
            if part not in WRAPPERS:
                break
            prefix += f"{part}."
            counts[prefix] += 1
    frequent = sorted(counts, key=lambda each: (-counts[each], len(each), each))
    for prefix in frequent[:_MAX_PREFIXES]:
        if not prefix:
            yield prefix, tensors  # with the versions of its layers
            continue
        inside = ((n, v) for n, v in tensors.items() if n.startswith(prefix))
        yield prefix, OrderedDict((n[len(prefix) :], value) for n, value in inside)


def _is_of_other_head(name: str, head: Head, children: set[str]) -> bool:
    first = name.partition(".")[0]
    is_training_head = first in TRAINING_HEADS and first not in children
    return is_training_head or bool(head.name and name.startswith(f"{head.name}."))
