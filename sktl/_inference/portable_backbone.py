"""Pickles of estimators contain the registrations of their backbones.

So a process that loads a pickle, or gets a task from another one, knows the networks
that `register_backbone` added there.
"""

from collections.abc import Callable, Sequence
from typing import Any

from sklearn.base import BaseEstimator

from sktl._backbones import registered
from sktl._backbones.registration import Registration


class PortableBackbone(BaseEstimator):
    """Base class of estimators with a `backbone` that other processes know as well."""

    backbone: Any

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Return the reduced estimator, which first registers its backbone.

        It takes along all others that can be imported, since a search sets another
        backbone in the worker process, and saved weights may have another one.
        """
        create, arguments, *rest = super().__reduce_ex__(protocol)
        registrations = registered.registrations_to_pickle(
            self.backbone, with_others=True
        )
        if registrations:
            arguments = (self.backbone, registrations, create, arguments)
            create = _register_and_create
        return create, arguments, *rest


def _register_and_create(
    backbone: object,
    registrations: Sequence[Registration],
    create: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    for registration in registrations:
        registered.restore(registration, required=registration.name == backbone)
    return create(*arguments)
