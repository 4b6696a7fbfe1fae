"""The skorch net of an estimator, in the form that scorers of scikit-learn expect.

The net that trains a network returns outputs for encoded targets. Scorers need a
classifier that predicts labels, or a regressor that predicts numbers.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import ClassifierTags, RegressorTags, Tags
from skorch.dataset import Dataset

from sktl._training.targets import ClassificationTarget, Target

_NET = "_net"
_TARGET = "_target"
_FORWARD_ITER = "forward_iter"


class _ScoringNet:
    """View of a net as an estimator; every other attribute is that of the net.

    Parameters
    ----------
    net : skorch.NeuralNet
        Its outputs are those of the network.
    target : Target
        Decodes the outputs.

    Attributes
    ----------
    verbose : int
        Always 1: a callback that prints was passed in order to print.
    """

    verbose = 1

    def __init__(self, net: Any, target: Target) -> None:
        vars(self).update({_NET: net, _TARGET: target})

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
        """Yield the outputs for a dataset, or for pixels or activations, in batches."""
        if isinstance(X, Dataset):  # a dataset of the trainer, with its labels
            X = X.X
        if isinstance(X, torch.Tensor | np.ndarray):
            for part in torch.split(torch.as_tensor(X), self.batch_size):
                output = self.evaluation_step((part, None), training=training)
                yield output.to(device)
        else:
            yield from self._net.forward_iter(X, training=training, device=device)

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the predictions, as those of the estimator."""
        return self._target.decode(self._outputs(X))

    def _outputs(self, X: Any) -> NDArray[np.float32]:
        parts = [part.detach().float().cpu().numpy() for part in self.forward_iter(X)]
        return np.concatenate(parts)


class ClassifierNet(_ScoringNet):
    """View of a net as a classifier; every other attribute is that of the net.

    Parameters
    ----------
    net : skorch.NeuralNet
        Its outputs are logits.
    target : ClassificationTarget
        Decodes the logits.

    Attributes
    ----------
    classes_ : object
        As in the classifier.
    """

    _target: ClassificationTarget

    @property
    def classes_(self) -> NDArray[Any]:
        """Attribute of the classifier."""
        return self._target.classes

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Return the probabilities, as those of the classifier."""
        return self._target.probabilities(self._outputs(X))

    def decision_function(self, X: Any) -> NDArray[Any]:
        """Return the scores, as those of the classifier."""
        return self._target.decision_values(self._outputs(X))

    def score(self, X: Any, y: Any) -> float:
        """Return the accuracy."""
        return float(accuracy_score(y, self.predict(X)))

    def __sklearn_tags__(self) -> Tags:
        """Return the tags of a classifier."""
        tags = BaseEstimator().__sklearn_tags__()
        tags.estimator_type = "classifier"
        tags.classifier_tags = ClassifierTags()
        return tags


class RegressorNet(_ScoringNet):
    """View of a net as a regressor; every other attribute is that of the net."""

    def score(self, X: Any, y: Any) -> float:
        """Return the coefficient of determination."""
        return float(r2_score(y, self.predict(X)))

    def __sklearn_tags__(self) -> Tags:
        """Return the tags of a regressor."""
        tags = BaseEstimator().__sklearn_tags__()
        tags.estimator_type = "regressor"
        tags.regressor_tags = RegressorTags()
        return tags
