"""Settings of a fit, selected on held-out images where they are "auto"."""

import sys
import warnings
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sktl._training.build import FitParts, build_config
from sktl._training.config import LINEAR_PROBE, RANDOM, SelectionRow, TrainingConfig
from sktl._training.selection import (
    ALPHAS,
    SettingsSelection,
    candidates,
    choose,
    n_to_hold_out,
)
from sktl._training.targets import selection_mask

# Used where nothing can be selected: settings with which the training loss hardly ever
# rises above that of the linear probe.
_SAFE_LR, _SAFE_ALPHA = 1e-4, 0.4


def fit_settings(parts: FitParts) -> TrainingConfig:
    """Return the settings of the training of a fit; select those that are ``"auto"``.

    Parameters
    ----------
    parts : FitParts
        The fit. The rows of the selection are appended to its state.

    Returns
    -------
    TrainingConfig
    """
    estimator, held_out = parts.estimator, parts.data.held_out
    safe = _safe_settings(parts)
    is_auto = estimator.lr == "auto" or _selects_alpha(parts)
    if not is_auto or parts.partial or not parts.is_new or safe.max_epochs == 0:
        return safe
    if parts.interpolates and safe.wise_ft_alpha == 0:  # the probe, whatever is tried
        return replace(safe, max_epochs=0)
    if not estimator.early_stopping:
        n_held_out = n_to_hold_out(len(held_out))
        mask = selection_mask(parts.data.targets, n_held_out, parts.state.seed)
        if mask is None:
            _warn_of_safe_settings(safe)
            return safe
        held_out = mask
    best = _select(parts, safe, held_out)
    if not best.n_epochs:  # nothing is trained, since nothing was better than the probe
        return replace(safe, wise_ft_alpha=0.0, max_epochs=0)
    return replace(
        safe, lr=best.lr, head_init=best.head_init, wise_ft_alpha=best.wise_ft_alpha
    )


def _selects_alpha(parts: FitParts) -> bool:
    return parts.estimator.wise_ft_alpha == "auto" and parts.interpolates


def _safe_settings(parts: FitParts) -> TrainingConfig:
    """Return the settings of the training if nothing is selected."""
    estimator = parts.estimator
    lr, alpha, head_init = estimator.lr, estimator.wise_ft_alpha, estimator.head_init
    if lr == "auto":
        lr = _SAFE_LR if parts.is_new else estimator.lr_
    if not parts.is_new:
        head_init = estimator.head_init_
    elif not parts.fits_probe:
        head_init = RANDOM
    elif head_init == "auto":
        head_init = LINEAR_PROBE
    if not parts.interpolates:
        alpha = 1.0
    return build_config(
        parts,
        lr=float(lr),
        head_init=head_init,
        wise_ft_alpha=_SAFE_ALPHA if alpha == "auto" else float(alpha),
    )


def _select(
    parts: FitParts, config: TrainingConfig, held_out: NDArray[np.bool_]
) -> SelectionRow:
    """Return the best row of the selection, which `parts.state` has afterwards."""
    estimator, rows = parts.estimator, parts.state.selection

    def save() -> None:
        if parts.checkpoint is not None:
            parts.checkpoint.save_selection(parts.state)

    selection = SettingsSelection(parts, config, held_out)
    lr = "auto" if estimator.lr == "auto" else config.lr
    tried = candidates(lr, estimator.head_init, config.batch_size)
    alphas = ALPHAS if _selects_alpha(parts) else (config.wise_ft_alpha,)
    selection.run(tried, alphas, rows, save)
    # The rows of an interrupted run may have the probe already.
    if _selects_alpha(parts) and all(row.n_epochs for row in rows):
        rows.append(selection.evaluate_probe())
        save()
    target = parts.data.targets.target
    chosen = choose(rows, prefer_probe=target.prefers_probe)
    if config.verbose:
        tqdm.write(
            f"Selected on held-out images: lr={chosen.lr}, head_init="
            f"{chosen.head_init!r}, wise_ft_alpha={chosen.wise_ft_alpha}.",
            file=sys.stderr,
        )
    return chosen


def _warn_of_safe_settings(config: TrainingConfig) -> None:
    warnings.warn(
        "lr='auto' and wise_ft_alpha='auto' are selected on held-out images, so there "
        "must be at least four images, and two of each class; with groups, at least "
        "two, and two of each of two classes. Got less images or groups, or a class "
        f"with one image. lr={config.lr} and wise_ft_alpha={config.wise_ft_alpha} are "
        "used. Add images, or set both parameters.",
        UserWarning,
        stacklevel=4,
    )
