"""Tests of the settings of a training and of the checks of its state."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from trainer_helpers import CONFIG

from sktl._training.config import (
    SelectionRow,
    TrainerState,
    check_state_dict,
    parse_selection,
    score_rank,
)

NETWORK = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
ROW = {"epoch": 1, "train_loss": 0.5, "lr": 0.1, "n_trainable_stages": 2}
SCORES = {"valid_loss": 0.5, "valid_score": 0.9}


@pytest.mark.parametrize(
    ("unfreeze_every", "expected"),
    [(None, [3, 3, 3, 3, 3]), (1, [0, 1, 2, 3, 3]), (2, [0, 0, 1, 1, 2])],
)
def test_number_of_trainable_stages_by_epoch(unfreeze_every, expected):
    config = replace(CONFIG, n_trainable_stages=3, unfreeze_every=unfreeze_every)
    assert [config.n_trainable_in(epoch) for epoch in range(5)] == expected


def state(**values):
    given = {"epoch": 1, "history": [ROW], "best_epoch": 1, **values}
    return TrainerState(seed=0, **given)


@pytest.mark.parametrize("weights", [{}, NETWORK.state_dict()])
def test_valid_state(weights):
    state(initial_weights=weights).validate(NETWORK, CONFIG)
    early_stopping = replace(CONFIG, patience=2)
    best = {"history": [{**ROW, **SCORES}], "best_weights": NETWORK.state_dict()}
    state(**best).validate(NETWORK, early_stopping)
    TrainerState(seed=0).validate(NETWORK, early_stopping)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"history": [{}]}, "each row of its history needs"),
        ({"history": [{**ROW, **SCORES}]}, "the last row of its history needs"),
        ({"history": [{**ROW, "lr": "0.1"}]}, "each row of its history needs"),
        ({"history": [{**ROW, "lr": True}]}, "each row of its history needs"),
        ({"epoch": CONFIG.max_epochs + 1}, "at most max_epochs=3"),
        ({"best_epoch": 2}, "best epoch at most its epoch; got 1 and 2"),
        ({"best_epoch": -1}, "got 1 and -1"),
        ({"initial_weights": {"0.bias": torch.zeros(2)}}, "another network"),
        ({"best_weights": nn.Linear(3, 2).state_dict()}, "another network"),
    ],
)
def test_invalid_state(values, reason):
    with pytest.raises(ValueError, match=reason):
        state(**values).validate(NETWORK, CONFIG)


def test_early_stopping_needs_the_weights_of_the_best_epoch():
    early_stopping = replace(CONFIG, patience=2)
    with pytest.raises(ValueError, match="weights of the best epoch are missing"):
        state(history=[{**ROW, **SCORES}]).validate(NETWORK, early_stopping)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_state_dict_of_another_network(change):
    weights = NETWORK.state_dict()
    check_state_dict(NETWORK, weights)
    if change == "missing":
        del weights["0.bias"]
    elif change == "extra":
        weights["2.bias"] = torch.zeros(2)
    elif change == "shape":
        weights["0.bias"] = torch.zeros(3)
    else:
        weights["0.bias"] = weights["0.bias"].double()
    with pytest.raises(ValueError, match="another network"):
        check_state_dict(NETWORK, weights)


SELECTION_ROW = {
    "lr": 1e-3,
    "head_init": "linear_probe",
    "wise_ft_alpha": 0.4,
    "n_epochs": 2,
    "valid_loss": float("inf"),
    "valid_score": 0.0,
}


def test_scores_of_any_unit_are_ranked():
    def rank(score, loss=1.0):
        return score_rank({"valid_score": score, "valid_loss": loss})

    assert rank(-1e-12) > rank(-2e-12)
    assert rank(-3e7) > rank(-4e7)
    assert rank(0.9, loss=0.5) == rank(0.9 + 1e-12, loss=0.5)
    assert rank(0.9, loss=0.5) > rank(0.9 + 1e-12, loss=0.6)


def test_rows_of_a_selection():
    assert parse_selection([]) == []
    (row,) = parse_selection([SELECTION_ROW])
    assert row == SelectionRow(**SELECTION_ROW)
    assert row.to_dict() == SELECTION_ROW
    losses = {"valid_losses": [0.5, 2]}
    (row,) = parse_selection([{**SELECTION_ROW, **losses}])
    assert row.valid_losses == (0.5, 2)
    assert row.to_dict() == SELECTION_ROW


@pytest.mark.parametrize(
    "rows",
    [
        None,
        "x",
        {},
        [3],
        [[]],
        [{}],
        [{**SELECTION_ROW, "epoch": 1}],
        [{**SELECTION_ROW, "valid_losses": 3}],
        [{**SELECTION_ROW, "valid_losses": [float("nan")]}],
        [{**SELECTION_ROW, "lr": -1.0}],
        [{**SELECTION_ROW, "lr": 10**400}],
        *([{**SELECTION_ROW, name: "1"}] for name in SELECTION_ROW),
        *([{**SELECTION_ROW, name: True}] for name in SELECTION_ROW),
        *([{**SELECTION_ROW, name: None}] for name in SELECTION_ROW),
        [SELECTION_ROW, {**SELECTION_ROW, "head_init": ["random"]}],
    ],
)
def test_invalid_rows_of_a_selection(rows):
    with pytest.raises(ValueError, match="each row of its selection needs"):
        parse_selection(rows)
