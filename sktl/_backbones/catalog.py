"""Names of all backbones: list them, and find the source of a name."""

import difflib
from fnmatch import fnmatchcase

from sktl._backbones import bundled, registered, timm, torchvision
from sktl._backbones.source import BackboneSource

# The names of a source are reserved, except for those of `registered`.
_RESERVED: tuple[BackboneSource, ...] = (bundled, torchvision, timm)


def list_backbones(
    pattern: str | None = None, *, pretrained: bool = False
) -> list[str]:
    """Return the names of backbones.

    Parameters
    ----------
    pattern : str, default=None
        Only names that match this pattern, in which ``*`` is any text, ``?`` any
        character and ``[ab]`` one of these characters. The names of timm, such as
        ``"timm/convnextv2_tiny"``, are listed only if a pattern can match them.

    pretrained : bool, default=False
        Whether to list only networks of timm with pretrained weights; other networks
        are listed in any case. Those of timm are then listed with the tag of their
        weights, which the pattern may omit, such as
        ``"timm/convnextv2_tiny.fcmae_ft_in22k_in1k"``. After a tag, ``@`` and a
        revision of the repository of the weights may follow in the name of a backbone.

    Returns
    -------
    list of str
        The bundled network, the classification networks of torchvision, registered
        networks, and those of timm that match the pattern, sorted.

    Raises
    ------
    ImportError
        If the pattern starts with ``"timm/"`` and timm is not installed.

    Examples
    --------
    >>> from sktl import list_backbones
    >>> list_backbones("squeezenet*")
    ['squeezenet1_0', 'squeezenet1_1']
    """
    sources: list[BackboneSource] = [bundled, torchvision, registered]
    if pattern is not None and timm.may_match(pattern):
        sources.append(timm)
    names = {name for source in sources for name in source.names(pretrained)}
    if pattern is not None:
        names = {name for name in names if _matches(name, pattern)}
    return sorted(names)


def is_reserved(name: str) -> bool:
    """Return whether a name belongs to a source, so that no other network can have it.

    Parameters
    ----------
    name : str
        Name of a backbone.
    """
    return any(source.owns(name) for source in _RESERVED)


def find_source(name: str) -> BackboneSource:
    """Return the source of a backbone.

    Parameters
    ----------
    name : str
        Name of a backbone.

    Raises
    ------
    ValueError
        If no source owns the name.
    """
    for source in (*_RESERVED, registered):
        if source.owns(name):
            return source
    # Names of timm are compared without the prefix, which is easily forgotten. timm is
    # not imported only for this message.
    of_timm = timm.names() if timm.is_imported() else ()
    known = {timm.without_prefix(each): each for each in of_timm}
    known |= {each: each for each in list_backbones()}
    close = [known[each] for each in difflib.get_close_matches(str(name), known)]
    raise ValueError(
        f"There is no backbone {name!r}. "
        f"{'Do you mean ' + ' or '.join(close) + '? ' if close else ''}"
        "list_backbones() returns the names of all networks but timm's, "
        "list_backbones('timm/*') those, which start with 'timm/'. "
        "Call register_backbone in this process, for a network of your own."
    )


def _matches(name: str, pattern: str) -> bool:
    without_tag = name.partition(".")[0] if timm.owns(name) else name
    return fnmatchcase(name, pattern) or fnmatchcase(without_tag, pattern)
