"""Selection of settings that are ``"auto"``, by short trainings on a part of the data.

From the same linear probe, the network is trained with each candidate for a part of
`max_epochs`, and its weights are interpolated with the probe (Wortsman et al., *Robust
Fine-tuning of Zero-shot Models*, 2022). The candidate and the coefficient with the
least loss on held-out images are selected; the probe itself is one of them. The loss is
used rather than the accuracy because it depends on every held-out image, and not only
on those near a decision boundary.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sktl._training.build import FitParts, fit_head
from sktl._training.config import (
    LINEAR_PROBE,
    SOFT_PROBE,
    SelectionRow,
    TrainerState,
    TrainingConfig,
)
from sktl._training.network import interpolate_weights, soften_head
from sktl._training.trainer import Trainer


@dataclass(frozen=True)
class Candidate:
    """Settings of one training, as the parameters of `FineTunedCNNClassifier`."""

    lr: float
    head_init: str


# By priority: if there is no time for all of them, the first ones are tried. Learning
# rates for batches of 32.
LEARNING_RATES = (6e-4, 2e-3, 2e-4)
CANDIDATES = (
    Candidate(6e-4, SOFT_PROBE),
    Candidate(6e-4, LINEAR_PROBE),
    Candidate(2e-3, SOFT_PROBE),
)
ALPHAS = (0.6, 0.2, 0.4, 0.8, 1.0)

_COST = 1.1  # of all candidates together, relative to the training that follows
_MIN_GAIN = 0.5  # standard errors
_FRACTION = 0.15  # of the images, to hold out
# Of few images more are held out: up to this number and this fraction.
_ENOUGH, _MAX_FRACTION = 100, 1 / 3


def n_to_hold_out(n_samples: int) -> int:
    """Return the number of images to hold out of a number of images."""
    few = min(_ENOUGH, int(_MAX_FRACTION * n_samples))
    return max(few, math.ceil(_FRACTION * n_samples))


def plan_trainings(n_candidates: int, max_epochs: int, fraction: float) -> list[int]:
    """Return the number of epochs of the training of each candidate.

    Parameters
    ----------
    n_candidates : int
        Number of candidates. The last ones are left out if there is no time for them.
    max_epochs : int
        Number of epochs of the training that follows, on all images.
    fraction : float
        Fraction of the images that candidates are trained on.

    Returns
    -------
    list of int
        At least one candidate for at least one epoch.
    """
    budget = _COST * max_epochs / fraction  # epochs of a candidate
    n_tried = max(1, min(n_candidates, int(budget)))
    return [max(1, min(max_epochs, int(budget / n_tried)))] * n_tried


def candidates(lr: float | str, head_init: str, batch_size: int) -> list[Candidate]:
    """Return the candidates that the parameters of an estimator leave.

    Parameters
    ----------
    lr, head_init
        The parameters.
    batch_size : int
        Batch size of the training. Learning rates grow with its square root, as is
        usual for Adam (Krizhevsky, *One weird trick for parallelizing convolutional
        neural networks*, 2014).

    Returns
    -------
    list of Candidate
        By priority.
    """
    if not isinstance(lr, str):
        return [Candidate(lr, LINEAR_PROBE if head_init == "auto" else head_init)]
    chosen: tuple[Candidate, ...] = CANDIDATES
    if head_init != "auto":
        chosen = tuple(Candidate(rate, head_init) for rate in LEARNING_RATES)
    factor = math.sqrt(batch_size / 32)
    return [replace(each, lr=float(f"{each.lr * factor:.2g}")) for each in chosen]


def choose(rows: Sequence[SelectionRow], *, prefer_probe: bool = False) -> SelectionRow:
    """Return the row with the least loss, if it is clearly less than the default's.

    Parameters
    ----------
    rows : sequence of SelectionRow
        The first one has the settings that are best on most data. They are kept unless
        another loss is less by half a standard error of the difference, since a few
        images can prefer bad settings by chance.
    prefer_probe : bool, default=False
        Whether the default is the linear probe, if it is a row, and not the first row.

    Returns
    -------
    SelectionRow
    """
    probes = [row for row in rows if not row.n_epochs]
    first = probes[0] if prefer_probe and probes else rows[0]
    best = min(rows, key=lambda row: row.valid_loss)
    if not math.isfinite(first.valid_loss):
        return best
    gains = np.subtract(first.valid_losses, best.valid_losses)
    if len(gains) < 2:  # one image, which says nothing about others
        return first
    standard_error = gains.std(ddof=1) / math.sqrt(len(gains))
    return best if gains.mean() > _MIN_GAIN * standard_error else first


class SettingsSelection:
    """The trainings that settings are selected by.

    Parameters
    ----------
    parts : FitParts
        The fit. Its network is not changed.
    config : TrainingConfig
        Settings of the training that follows.
    held_out : ndarray of shape (n,), bool
        Mask of the images that the candidates are compared on. They may be the
        validation set of the fit.
    """

    def __init__(
        self, parts: FitParts, config: TrainingConfig, held_out: NDArray[np.bool_]
    ) -> None:
        self._parts = parts
        self._targets = parts.data.targets
        self._is_trained = ~(held_out | parts.data.held_out)
        self._train = parts.sets.train(np.flatnonzero(self._is_trained))
        self._valid = parts.sets.valid(np.flatnonzero(held_out))
        self._held_out = held_out
        self._config = replace(
            config,
            patience=None,
            wise_ft_alpha=1.0,
            unfreeze_every=None,
            verbose=min(config.verbose, 1),
        )

    @functools.cached_property
    def _initial_network(self) -> nn.Sequential:
        """The network that all trainings start from; a resumed fit may not need it."""
        parts = self._parts
        model = replace(parts.model, network=copy.deepcopy(parts.model.network))
        if parts.fits_probe:
            features, seed = parts.activations.features(), parts.state.seed
            fit_head(model, self._targets, features, self._is_trained, seed)
        return model.network

    def run(
        self,
        candidates: Sequence[Candidate],
        alphas: Sequence[float],
        rows: list[SelectionRow],
        after_each: Callable[[], None],
    ) -> None:
        """Train each candidate, and append a row for each coefficient.

        Parameters
        ----------
        candidates : sequence of Candidate
            By priority: the last ones are left out if there is no time for them.
        alphas : sequence of float
            Interpolation coefficients.
        rows : list of SelectionRow
            The rows so far, of an interrupted run; new ones are appended.
        after_each : callable
            Called after each training, to write a checkpoint.
        """
        fraction = self._is_trained.sum() / (~self._parts.data.held_out).sum()
        plan = plan_trainings(len(candidates), self._config.max_epochs, float(fraction))
        tried = {(row.lr, row.head_init) for row in rows}
        for each, n_epochs in zip(candidates, plan, strict=False):
            if (each.lr, each.head_init) not in tried:
                config = replace(
                    self._config,
                    lr=each.lr,
                    head_init=each.head_init,
                    max_epochs=n_epochs,
                )
                rows.extend(self._train_and_evaluate(config, alphas))
                after_each()

    def evaluate_probe(self) -> SelectionRow:
        """Return the row of the linear probe, before any training."""
        config = replace(self._config, lr=0.0, head_init=LINEAR_PROBE, max_epochs=0)
        features = self._parts.activations.features()[self._held_out]
        head = self._initial_network[-1].eval()
        with torch.inference_mode():
            outputs = head(torch.from_numpy(features))
        head.train()
        return self._row(config, 0.0, outputs)

    def _train_and_evaluate(
        self, config: TrainingConfig, alphas: Sequence[float]
    ) -> list[SelectionRow]:
        network = copy.deepcopy(self._initial_network)
        trainer = Trainer(
            network,
            self._parts.model.preprocessing,
            self._targets.target,
            self._train,
            None,
            config=config,
            state=TrainerState(self._parts.state.seed),
        )
        initial = trainer.copy_weights()
        if config.head_init == SOFT_PROBE:
            soften_head(network[-1])
        try:
            trainer.run()
        except ValueError:
            # A learning rate that was passed is not replaced by another candidate.
            if not trainer.diverged or self._parts.estimator.lr != "auto":
                raise
            return [self._row(config, 1.0, None)]
        last, rows = trainer.copy_weights(), []
        for alpha in alphas:
            network.load_state_dict(interpolate_weights(initial, last, alpha))
            rows.append(self._row(config, alpha, trainer.outputs(self._valid)))
        return rows

    def _row(
        self, config: TrainingConfig, alpha: float, outputs: Tensor | None
    ) -> SelectionRow:
        """Return a row with loss and score; None: the training diverged."""
        targets = self._targets
        settings = (config.lr, config.head_init, alpha, config.max_epochs)
        if outputs is None or not outputs.isfinite().all():
            return SelectionRow(*settings, math.inf, 0.0)
        y = targets.y[self._held_out]
        weight = targets.sample_weight[self._held_out]
        losses = targets.target.calibrated_losses(outputs.numpy(), y, weight)
        score = targets.target.score(outputs.numpy(), y, weight)
        return SelectionRow(
            *settings, float(losses.mean()), score, tuple(losses.tolist())
        )
