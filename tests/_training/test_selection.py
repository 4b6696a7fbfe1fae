"""Tests of the selection of settings by short trainings on a part of the data."""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from reference import normalized
from scipy.special import softmax
from scipy.stats import sem
from sklearn.metrics import accuracy_score, log_loss
from trainer_helpers import equal_bits, make_classifier, make_parts

from sktl._training import selection
from sktl._training.build import build_config
from sktl._training.config import SelectionRow
from sktl._training.selection import (
    ALPHAS,
    CANDIDATES,
    LEARNING_RATES,
    Candidate,
    SettingsSelection,
    candidates,
    choose,
    n_to_hold_out,
    plan_trainings,
)

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

Y = np.repeat([0, 1], 20)[np.arange(40) * 7 % 40]  # hard to learn
WEIGHT = np.linspace(0.5, 1.5, 40)
HELD_OUT = np.arange(40) % 3 == 0


def make_selection(parts, held_out=HELD_OUT):
    head_init = parts.estimator.head_init
    config = build_config(parts, lr=1.0, head_init=head_init, wise_ft_alpha=0.4)
    return SettingsSelection(parts, replace(config, max_epochs=4), held_out)


def run(parts, tried, alphas=ALPHAS, rows=None, **options):
    rows = [] if rows is None else rows
    make_selection(parts, **options).run(tried, alphas, rows, lambda: None)
    return rows


@pytest.mark.parametrize("n", [2, 3, 10, 40, 85, 150, 300, 301, 1000, 20_000])
def test_number_of_images_to_hold_out(n):
    held_out = n_to_hold_out(n)
    assert 1 <= held_out <= n / 2
    assert n_to_hold_out(n - 1) <= held_out
    assert held_out / n >= n_to_hold_out(10 * n) / (10 * n) - 1 / n  # fewer of many


@pytest.mark.parametrize("n_candidates", [1, 3, 4, 12])
@pytest.mark.parametrize("max_epochs", [1, 2, 3, 5, 10, 40])
@pytest.mark.parametrize("fraction", [0.5, 0.67, 0.85])
def test_planned_trainings(n_candidates, max_epochs, fraction):
    plan = plan_trainings(n_candidates, max_epochs, fraction)
    assert 1 <= len(plan) <= n_candidates
    assert len(set(plan)) == 1
    assert 1 <= plan[0] <= max_epochs
    budget = selection._COST * max_epochs / fraction
    assert sum(plan) <= max(1, budget)
    if budget >= n_candidates:
        assert len(plan) == n_candidates


def test_candidates_that_the_parameters_leave():
    assert candidates(0.5, "random", 32) == [Candidate(0.5, "random")]
    assert candidates(0.5, "auto", 32) == [Candidate(0.5, "linear_probe")]
    for batch_size in (4, 8, 32):
        factor = math.sqrt(batch_size / 32)
        every = candidates("auto", "auto", batch_size)
        assert [each.head_init for each in every] == [c.head_init for c in CANDIDATES]
        expected = [factor * each.lr for each in CANDIDATES]
        np.testing.assert_allclose([each.lr for each in every], expected, rtol=0.05)
        random = candidates("auto", "random", batch_size)
        assert {each.head_init for each in random} == {"random"}
        expected = [factor * lr for lr in LEARNING_RATES]
        np.testing.assert_allclose([each.lr for each in random], expected, rtol=0.05)
        assert len(set(every)) == len(every)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_first_row_is_kept_unless_another_is_clearly_better(noise):
    losses = np.array([0.6, 0.7, 0.8, 0.9])
    gains = 0.2 + noise * np.array([1, -1, 1, -1])
    rows = [
        SelectionRow(0.1, "random", 1.0, 2, each.mean(), 0.5, tuple(each))
        for each in (losses, losses - gains, losses + 0.1)
    ]
    assert sem(gains) == pytest.approx(noise / np.sqrt(3))
    assert choose(rows) is rows[1 if noise == 0 else 0]


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_probe_is_kept_if_it_is_preferred(noise):
    losses = np.array([0.6, 0.7, 0.8, 0.9])
    gains = 0.2 + noise * np.array([1, -1, 1, -1])
    first, best, probe = (
        SelectionRow(0.1, "random", 1.0, n_epochs, each.mean(), 0.5, tuple(each))
        for n_epochs, each in ((2, losses + 0.1), (2, losses - gains), (0, losses))
    )
    kept = best if noise == 0 else probe
    assert choose([first, best, probe], prefer_probe=True) is kept
    assert choose([probe, first, best], prefer_probe=True) is kept
    assert choose([first, best], prefer_probe=True) is best


def test_first_row_is_kept_if_one_image_is_held_out():
    rows = [SelectionRow(0.1, "random", 1.0, 2, v, 0.5, (v,)) for v in (0.5, 0.1)]
    assert choose(rows) is rows[0]


def test_first_row_that_diverged_is_not_kept():
    diverged = SelectionRow(0.1, "random", 1.0, 2, math.inf, 0.0)
    finite = SelectionRow(0.1, "random", 1.0, 2, 0.5, 0.5, (0.4, 0.6))
    assert choose([diverged, finite]) is finite
    assert choose([finite, diverged]) is finite


TRIED = {
    "linear_probe": [Candidate(0.02, "linear_probe"), Candidate(0.1, "linear_probe")],
    "auto": [Candidate(0.02, "linear_probe"), Candidate(0.02, "soft_linear_probe")],
    "random": [Candidate(0.02, "random")],
}


@pytest.mark.parametrize(
    "head_init",
    ["auto", "random", pytest.param("linear_probe", marks=pytest.mark.slow)],
)
def test_rows_equal_fits_on_the_images_that_are_not_held_out(images, head_init):
    # Different head_init of candidates need the same mode of BatchNorm as the config.
    given = {"head_init": "linear_probe" if head_init == "auto" else head_init}
    weight = WEIGHT / WEIGHT[~HELD_OUT].mean()
    options = {"optimizer": "sgd", **given}
    parts = make_parts(images, Y, weight, **options)
    alphas = (1.0,) if head_init == "random" else (0.4, 1.0)
    rows = run(parts, TRIED[head_init], alphas)
    assert len(rows) == len(TRIED[head_init]) * len(alphas)
    train = np.flatnonzero(~HELD_OUT)
    for row in rows:
        options |= {"lr": row.lr, "head_init": row.head_init}
        estimator = make_classifier(
            weights="DEFAULT",
            max_epochs=row.n_epochs,
            wise_ft_alpha=row.wise_ft_alpha,
            **options,
        ).fit(images[train], Y[train], sample_weight=weight[train])
        loss, score = evaluate(estimator, images)
        assert row.valid_loss == pytest.approx(loss, rel=1e-3)
        assert row.valid_score == pytest.approx(score)


def evaluate(estimator, images):
    """Return the least log loss of all temperatures and the accuracy."""
    y, weight = Y[HELD_OUT], WEIGHT[HELD_OUT]
    with torch.inference_mode():
        x = normalized(images[HELD_OUT], estimator.preprocessing_)
        logits = estimator.module_(x).numpy()
    temperatures = np.geomspace(0.14, 54, 300)
    proba = softmax(logits / temperatures[:, None, None], axis=2)
    losses = -np.log(proba[:, np.arange(len(y)), y]) @ weight / weight.sum()
    best = proba[np.argmin(losses)]
    loss = log_loss(y, best, sample_weight=weight)
    assert loss == pytest.approx(losses.min(), rel=1e-5)
    return loss, accuracy_score(y, logits.argmax(axis=1), sample_weight=weight)


def test_row_of_the_probe_is_that_of_a_training_of_no_epochs(images):
    row = make_selection(make_parts(images, Y, WEIGHT)).evaluate_probe()
    probe = make_classifier(weights="DEFAULT", max_epochs=0)
    probe.fit(images[~HELD_OUT], Y[~HELD_OUT], sample_weight=WEIGHT[~HELD_OUT])
    loss, score = evaluate(probe, images)
    assert row.valid_loss == pytest.approx(loss, rel=1e-3)
    assert row.valid_score == pytest.approx(score)
    assert (row.lr, row.wise_ft_alpha, row.n_epochs) == (0, 0, 0)


def test_candidates_are_independent_and_do_not_change_the_model(images):
    parts = make_parts(images, Y, dropout=0.5)
    before = make_parts(images, Y, dropout=0.5).model.network
    tried = [Candidate(0.1, "linear_probe"), Candidate(0.01, "linear_probe")]
    rows = run(parts, tried)
    assert equal_bits(parts.model.network, before)
    n_epochs = [row.n_epochs for row in rows]
    again = run(parts, tried[::-1])
    assert [row.n_epochs for row in again] == n_epochs
    assert sorted(rows, key=str) == sorted(again, key=str)


def test_tried_candidates_are_not_repeated(images):
    parts, calls = make_parts(images, Y), []
    expected = run(parts, CANDIDATES)
    rows = expected[: len(ALPHAS)]
    selection = make_selection(parts)
    selection.run(CANDIDATES, ALPHAS, rows, lambda: calls.append(len(rows)))
    assert rows == expected
    assert calls == [len(ALPHAS) * n for n in range(2, len(rows) // len(ALPHAS) + 1)]


def test_candidate_that_diverges_is_not_selected(images):
    parts = make_parts(images, Y, batch_size=8, lr="auto")
    tried = [Candidate(1e30, "linear_probe"), Candidate(1e-3, "linear_probe")]
    first, *rest = run(parts, tried)
    assert (first.lr, first.valid_loss) == (1e30, math.inf)
    assert [row.lr for row in rest] == [1e-3] * len(ALPHAS)
    assert choose([first, *rest]) in rest


def test_learning_rate_that_was_passed_must_not_diverge(images):
    parts = make_parts(images, Y, batch_size=8, lr=1e30)
    with pytest.raises(ValueError, match=r"must be finite.*lr=1e\+30. Reduce lr"):
        run(parts, [Candidate(1e30, "linear_probe")])


def test_candidate_whose_outputs_are_not_finite_is_not_selected(images):
    # After a single step the weights are finite, and the outputs overflow.
    parts = make_parts(images, Y, batch_size=40)
    tried = [Candidate(1e30, "linear_probe"), Candidate(1e-3, "linear_probe")]
    plan = "sktl._training.selection.plan_trainings"
    with mock.patch(plan, return_value=[1, 1]):
        rows = run(parts, tried)
    assert not any(math.isnan(row.valid_loss) for row in rows)
    assert choose(rows).lr == 1e-3


def test_other_errors_are_raised(images):
    def invalid(image):
        raise ValueError("no such augmentation")

    parts = make_parts(images, Y, augmentation=invalid)
    with pytest.raises(ValueError, match="no such augmentation"):
        run(parts, CANDIDATES)


def test_images_of_the_validation_set_are_not_trained_on(images):
    parts = make_parts(images, Y, early_stopping=True)
    decoded = []
    train = parts.sets.train
    parts.sets.train = lambda rows: decoded.append(rows) or train(rows)
    rows = run(parts, CANDIDATES[:1], (1.0,), held_out=parts.data.held_out)
    trained, evaluated = decoded  # without augmentation, both are made by `train`
    np.testing.assert_array_equal(evaluated, np.flatnonzero(parts.data.held_out))
    np.testing.assert_array_equal(trained, np.flatnonzero(~parts.data.held_out))
    assert len(rows) == 1
