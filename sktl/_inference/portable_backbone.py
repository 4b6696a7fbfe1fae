"""Pickles of estimators contain the registrations of their backbones.

So a process that loads a pickle, or gets a task from another one, knows the networks
that `register_backbone` added there.
"""

from collections.abc import Callable, Sequence
from typing import Any

from sklearn.base import BaseEstimator

from sktl._backbones import registered
from sktl._backbones.registration import Registration, pickled_for
from sktl._backbones.saved_network import find_saved_network


class PortableBackbone(BaseEstimator):
    """Base class of estimators with a `backbone` that other processes know as well."""

    backbone: Any
    weights: Any

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Return the reduced estimator, which first registers its backbone.

        A task of a worker process takes along all others that can be imported, since a
        search sets another backbone there. A file or a hash of joblib does not depend
        on them.
        """
        create, arguments, *rest = super().__reduce_ex__(protocol)
        backbone = _saved_or_own_name(self)
        registrations = registered.registrations_to_pickle(
            backbone, with_others=pickled_for() == "process"
        )
        if registrations:
            arguments = (backbone, registrations, create, arguments)
            create = _register_and_create
        return create, arguments, *rest


def _saved_or_own_name(estimator: PortableBackbone) -> Any:
    """Return the name of the backbone, which saved weights may determine."""
    try:
        saved = find_saved_network(estimator.weights)
    except (OSError, ValueError):  # fit reports invalid weights
        saved = None
    return estimator.backbone if saved is None else saved.architecture.backbone


def _register_and_create(
    backbone: object,
    registrations: Sequence[Registration],
    create: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    for registration in registrations:
        registered.restore(registration, required=registration.name == backbone)
    return create(*arguments)
