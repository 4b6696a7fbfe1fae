"""The skorch net of a classifier, in the form that scorers of scikit-learn expect.

The net that trains a network returns logits of encoded targets. Scorers need a
classifier that predicts labels.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator
from sklearn.metrics import accuracy_score
from sklearn.utils import ClassifierTags, Tags
from skorch.dataset import Dataset

_NET = "_net"
_FORWARD_ITER = "forward_iter"


class ClassifierNet:
    """View of a net as a classifier; every other attribute is that of the net.

    Parameters
    ----------
    net : skorch.NeuralNet
        Its outputs are logits ``(n, n_classes)``.
    classes : ndarray of shape (n_classes,)
        Sorted labels.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        As given.
    verbose : int
        Always 1: a callback that prints was passed in order to print.
    """

    verbose = 1

    def __init__(self, net: Any, classes: NDArray[Any]) -> None:
        vars(self).update({_NET: net, "classes_": classes})

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the net."""
        if name == _NET:  # missing while a pickle is loaded
            raise AttributeError(name)
        return getattr(self._net, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the net."""
        if name == _FORWARD_ITER:
            # skorch replaces and deletes it, to score outputs that it has cached.
            vars(self)[name] = value
        else:
            setattr(self._net, name, value)

    def forward_iter(
        self, X: Any, training: bool = False, device: Any = "cpu"
    ) -> Iterator[torch.Tensor]:
        """Yield the logits of each batch of a dataset, or of pixels or activations."""
        if isinstance(X, Dataset):  # a dataset of the trainer, with its labels
            X = X.X
        if isinstance(X, torch.Tensor | np.ndarray):
            for part in torch.split(torch.as_tensor(X), self.batch_size):
                output = self.evaluation_step((part, None), training=training)
                yield output.to(device)
        else:
            yield from self._net.forward_iter(X, training=training, device=device)

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Return the probabilities ``(n, n_classes)``."""
        parts = [part.detach().float().cpu().numpy() for part in self.forward_iter(X)]
        proba: NDArray[np.float32] = softmax(np.concatenate(parts), axis=1)
        return proba

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable labels ``(n,)``."""
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def score(self, X: Any, y: Any) -> float:
        """Return the accuracy."""
        return float(accuracy_score(y, self.predict(X)))

    def __sklearn_tags__(self) -> Tags:
        """Return the tags of a classifier."""
        tags = BaseEstimator().__sklearn_tags__()
        tags.estimator_type = "classifier"
        tags.classifier_tags = ClassifierTags()
        return tags
