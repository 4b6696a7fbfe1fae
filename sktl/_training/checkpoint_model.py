"""The fitted model of the last completed epoch of a checkpoint."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sktl._training.checkpoint import Checkpoint
from sktl._training.serialization import SavedModel, parse_model
from sktl._utils.json_values import is_list_of


def load_checkpoint(
    directory: str | os.PathLike[str],
    estimators: Sequence[str],
    trusted: Sequence[str] = (),
) -> tuple[SavedModel, list[str]]:
    """Return the model as if the training had ended with the last completed epoch.

    Parameters
    ----------
    directory : str or path-like
        Directory of the checkpoint, which is only read.
    estimators, trusted
        As in `load_model`.

    Returns
    -------
    saved : SavedModel
        The model.
    others : list of str
        Names of the parameters that the file does not have.

    Raises
    ------
    OSError
        If there is no checkpoint, or it cannot be read.
    ValueError
        If it has no completed epoch, is damaged, or is one of another class; or if its
        backbone is unknown.
    TypeError
        If `trusted` is not a list of str.
    """
    name = f"The checkpoint in {os.fspath(directory)!r}"
    last = Checkpoint(directory).last_epoch()
    if last is None:
        raise ValueError(
            f"{name} must have a completed epoch. Got one of a run that was "
            "interrupted before. Call fit with the same data to resume it."
        )
    state, weights, document = last
    model: Any = document.get("model")
    if not isinstance(model, dict) or "reason" in model:
        reason = model["reason"] if isinstance(model, dict) else "no model"
        raise ValueError(
            f"{name} must describe its network. Got none: {reason} Call fit with the "
            "same data to resume the run."
        )
    others: Any = model.get("not_saved")
    record = {
        "history": state.history,
        "best_epoch": state.best_epoch,
        "selection": [asdict(row) for row in state.selection],
        **{name: document.get(name) for name in ("lr", "head_init", "wise_ft_alpha")},
    }
    saved = parse_model(
        {**model, **record},
        lambda structure: weights,
        os.fspath(directory),
        estimators,
        trusted,
        origin="from_checkpoint",
    )
    return saved, others if is_list_of(others, str) else []
