"""The registration of a backbone in a saved file.

The file names the builder; loading imports it only if the caller trusts it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sktl._backbones import registered
from sktl._backbones.register import create_registration
from sktl._backbones.registration import ImportedBuilder, Registration
from sktl._backbones.saved_network import parse_preprocessing
from sktl._utils.json_values import get_value, is_list_of, require

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def registration_to_document(
    registration: Registration | None,
) -> dict[str, Any] | None:
    """Return a registration as a JSON object.

    Parameters
    ----------
    registration : Registration or None
        With which the backbone was loaded. None if `register_backbone` has not added
        it. If the builder cannot be imported, that of this process now is named.

    Returns
    -------
    dict of str or None
        None without a registration.

    Raises
    ------
    TypeError
        If other processes cannot import the builder.
    """
    if registration is None:
        return None
    current = registered.registrations.get(registration.name)
    if current and not registration.is_importable:
        # The network was defined in a module and registered again, to save it.
        if registration.differences(current) == ["builder"]:
            registration = current
    stages = registration.stages
    return {
        "name": registration.name,
        "builder": registration.reference,
        "preprocessing": asdict(registration.preprocessing),
        "stages": None if stages is None else [[n, list(m)] for n, m in stages],
        "head": list(registration.head),
        "categories": registration.categories,
        "layout": registration.layout,
        "n_prefix_tokens": registration.n_prefix_tokens,
    }


def check_trusted(
    document: Mapping[str, Any],
    trusted: Sequence[str],
    *,
    path: str,
    method: str,
) -> None:
    """Raise if the backbone of a saved file is unknown and its builder is not trusted.

    Parameters
    ----------
    document : mapping of str
        The file; anything that JSON can hold may be in it.
    trusted : sequence of str
        References of builders that may be imported.
    path, method : str
        Path of the file, and name of the method that loads it, for the error message.

    Raises
    ------
    TypeError
        If `trusted` is not a list of str.
    ValueError
        If the builder is not trusted.
    """
    if not isinstance(trusted, list | tuple) or not is_list_of([*trusted], str):
        raise TypeError(
            "trusted must be a list of references such as ['my_module:build']. Got "
            f"{trusted!r}."
        )
    described = document.get("registration")
    if not isinstance(described, dict) or registered.owns(str(described.get("name"))):
        return
    name, reference = described.get("name"), described.get("builder")
    if not isinstance(reference, str) or reference in trusted:
        return
    module, _, function = reference.partition(":")
    raise ValueError(
        f"The backbone {name!r} of {path!r} must be registered in this process, or its "
        f"builder must be trusted, since load imports no code by itself. Got "
        f"trusted={[*trusted]}. If you trust {reference!r}, write\n"
        f"    {method}({path!r}, trusted=[{reference!r}])\n"
        "or register it before by\n"
        f"    from {module} import {function.partition('.')[0]}\n"
        f"    register_backbone({name!r}, {function}, ...)"
    )


def restore_registration(document: Mapping[str, Any]) -> None:
    """Register the backbone of a saved file, unless this process knows it.

    The backbone of this process may have another builder, such as a lambda.

    Parameters
    ----------
    document : mapping of str
        The file, after `check_trusted`.

    Raises
    ------
    ValueError
        If the registration is invalid, or this process has another backbone under the
        name.
    """
    described = document.get("registration")
    if described is None:
        return
    require(isinstance(described, dict), "its 'registration' has an invalid type")
    name, reference = (get_value(described, key, str) for key in ("name", "builder"))
    require(
        _REFERENCE.fullmatch(reference) is not None,
        f"its builder {reference!r} is no reference of a function of a module",
    )
    registered.restore(
        _parse(name, ImportedBuilder(reference), described), any_builder=True
    )


def _parse(
    name: str, builder: ImportedBuilder, document: Mapping[str, Any]
) -> Registration:
    stages, head = document.get("stages"), get_value(document, "head", list)
    categories = document.get("categories")
    require(
        stages is None
        or (
            is_list_of(stages, list)
            and all(len(s) == 2 and isinstance(s[0], str) for s in stages)
            and all(is_list_of(modules, str) for _, modules in stages)
        ),
        "its stages must be None or names with lists of modules",
    )
    require(is_list_of(head, str), "its head must be a list of modules")
    require(
        categories is None or is_list_of(categories, str),
        "its categories must be None or a list of str",
    )
    try:
        return create_registration(
            name,
            builder,
            preprocessing=parse_preprocessing(document),
            stages=None if stages is None else dict(stages),
            head=None if stages is None else head,
            categories=categories,
            layout=document.get("layout"),
            n_prefix_tokens=get_value(document, "n_prefix_tokens", int),
        )
    except TypeError as error:  # an empty list of modules
        raise ValueError(str(error)) from error
