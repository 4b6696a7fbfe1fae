"""Tests of the settings of a fit: given ones, selected ones, and the fallback."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from trainer_helpers import Y, equal_bits, make_classifier

import sktl._training.settings
from sktl._training.selection import ALPHAS
from sktl._training.trainer import Trainer
from sktl._utils.tensor_file import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

SELECTED = ("lr", "head_init", "wise_ft_alpha")
AUTO = dict.fromkeys(SELECTED, "auto")
NOISY = np.where(np.arange(40) % 9 == 0, 1 - Y, Y)


def make_auto(**parameters):
    options = {"weights": "DEFAULT", "max_epochs": 2, "batch_size": 8}
    return make_classifier(**{**options, **AUTO, **parameters})


def selected(estimator):
    return {name: getattr(estimator, f"{name}_") for name in SELECTED}


@pytest.fixture
def candidates(monkeypatch):
    """Return the settings of the trainings of the selection, which may be stopped."""
    started = SimpleNamespace(settings=[], limit=math.inf)

    class Counted(Trainer):
        def __init__(self, *arguments, config, **options):
            super().__init__(*arguments, config=config, **options)
            self.settings = (config.lr, config.head_init)

        def run(self, after_epoch=None):
            if len(started.settings) == started.limit:
                raise KeyboardInterrupt
            started.settings.append(self.settings)
            super().run(after_epoch)

    monkeypatch.setattr("sktl._training.selection.Trainer", Counted)
    return started


OPTIONS = [
    {},
    {"lr": 0.01},
    *(
        pytest.param(options, marks=pytest.mark.slow)
        for options in (
            {"wise_ft_alpha": 0.4},
            {"head_init": "random"},
            {"weights": None},
            {"early_stopping": True},
            {"augmentation": "standard", "dropout": 0.3},
        )
    ),
    {"augmentation": "flip", "augmentation_views": 2, "trainable": 1},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_fit_equals_a_fit_with_the_selected_settings(images, options):
    estimator = make_auto(**options).fit(images, NOISY)
    first, *_ = rows = estimator.selection_
    best = min(rows, key=lambda row: row["valid_loss"])
    chosen = [{name: row[name] for name in SELECTED} for row in (first, best)]
    if estimator.n_iter_:
        assert selected(estimator) in chosen
    else:
        assert best["n_epochs"] == estimator.wise_ft_alpha_ == 0  # the linear probe
    fixed = clone(estimator).set_params(**selected(estimator)).fit(images, NOISY)
    assert fixed.selection_ == []
    assert equal_bits(estimator.module_, fixed.module_)
    assert estimator.history_ == fixed.history_[: len(estimator.history_)]


def test_rows_of_the_selection(images, candidates):
    estimator = make_auto(max_epochs=4).fit(images, NOISY)
    *rows, probe = estimator.selection_
    assert (probe["lr"], probe["wise_ft_alpha"], probe["n_epochs"]) == (0, 0, 0)
    assert len(candidates.settings) > 1
    tried = [(row["lr"], row["head_init"], row["wise_ft_alpha"]) for row in rows]
    assert tried == [(*each, alpha) for each in candidates.settings for alpha in ALPHAS]
    for row in rows:
        assert 0 < row["valid_loss"] < math.inf
        assert 0 <= row["valid_score"] <= 1
        assert row["n_epochs"] >= 1


def test_settings_that_are_given_are_not_selected(images, candidates):
    estimator = make_auto(lr=0.01, head_init="random").fit(images, NOISY)
    assert candidates.settings == []
    assert selected(estimator) == {
        "lr": 0.01,
        "head_init": "random",
        "wise_ft_alpha": 1.0,
    }
    make_auto(lr=0.01).fit(images, NOISY)
    assert candidates.settings == [(0.01, "linear_probe")]
    make_auto(wise_ft_alpha=0.4).fit(images, NOISY)
    assert len(set(candidates.settings)) == len(candidates.settings) > 2


def test_the_probe_is_kept_if_no_training_is_better(images, monkeypatch):
    def loss(self, outputs, y, sample_weight):
        losses.append(100.0 - len(losses))  # the probe is evaluated last
        return np.full(len(y), losses[-1])

    losses = []
    target = "sktl._training.multiclass.MulticlassTarget.calibrated_losses"
    monkeypatch.setattr(target, loss)
    estimator = make_auto().fit(images, Y)
    probe = clone(estimator).set_params(max_epochs=0).fit(images, Y)
    assert len(losses) > 1
    assert equal_bits(estimator.module_, probe.module_)
    assert (estimator.n_iter_, estimator.wise_ft_alpha_) == (0, 0)
    assert 0 < estimator.lr_ < 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"dropout": 0.3, "augmentation": "trivial"},
    ],
)
def test_equal_random_state_gives_the_same_selection(images, options):
    first = make_auto(**options).fit(images, NOISY)
    torch.rand(1)
    second = clone(first).set_params(n_jobs=3).fit(images, NOISY)
    assert second.selection_ == first.selection_
    assert equal_bits(second.module_, first.module_)
    third = clone(first).set_params(random_state=1).fit(images, NOISY)
    assert third.selection_ != first.selection_


def test_a_class_of_one_image_warns_and_selects_nothing(images):
    y = np.where(np.arange(40) == 7, 2, Y)
    estimator = make_auto()
    with pytest.warns(UserWarning, match="class with one image") as warnings:
        estimator.fit(images, y)
    assert warnings[0].filename != sktl._training.settings.__file__
    assert estimator.selection_ == []
    assert f"lr={estimator.lr_} and wise_ft_alpha={estimator.wise_ft_alpha_}" in str(
        warnings[0].message
    )
    fixed = clone(estimator).set_params(**selected(estimator)).fit(images, y)
    assert equal_bits(estimator.module_, fixed.module_)


def test_early_stopping_selects_on_its_validation_set(images, monkeypatch):
    used = []
    estimator = make_auto(early_stopping=True, validation_fraction=0.25)
    monkeypatch.setattr("sktl._training.settings.selection_mask", None)
    weight = np.linspace(0.5, 1.5, 40)
    monkeypatch.setattr(
        "sktl._training.multiclass.MulticlassTarget.calibrated_losses",
        lambda self, outputs, y, weight: used.append((y, weight)) or np.ones(len(y)),
    )
    estimator.fit(images, Y, sample_weight=weight)
    assert {len(targets) for targets, _ in used} == {10}
    assert len({tuple(weights) for _, weights in used}) == 1


@pytest.mark.parametrize("method", ["partial_fit", "warm_start"])
def test_continued_training_does_not_select(images, candidates, method):
    estimator = make_auto(head_init="soft_linear_probe").fit(images, NOISY)
    estimator.set_params(head_init="auto")
    expected, n_tried = selected(estimator), len(candidates.settings)
    if method == "partial_fit":
        estimator.partial_fit(images, NOISY)
    else:
        estimator.set_params(warm_start=True).fit(images, NOISY)
    assert len(candidates.settings) == n_tried
    continued = {**expected, "wise_ft_alpha": 1.0}
    assert selected(estimator) == continued
    assert estimator.history_[-1]["lr"] <= estimator.lr_
    first = make_auto().partial_fit(images, NOISY, classes=[0, 1])
    assert len(candidates.settings) == n_tried
    assert first.selection_ == []


def test_coefficient_of_0_selects_and_trains_nothing(images, candidates):
    estimator = make_auto(wise_ft_alpha=0).fit(images, NOISY)
    assert candidates.settings == estimator.selection_ == []
    assert (estimator.n_iter_, estimator.wise_ft_alpha_) == (0, 0)
    probe = clone(estimator).set_params(max_epochs=0).fit(images, NOISY)
    assert equal_bits(estimator.module_, probe.module_)


@pytest.mark.parametrize("head_init", ["auto", "linear_probe", "random"])
def test_head_init_of_partial_fit(images, head_init):
    estimator = make_auto(head_init=head_init)
    estimator.partial_fit(images, NOISY, classes=[0, 1, 2])  # no probe of three classes
    assert estimator.head_init_ == "random"
    assert estimator.partial_fit(images, NOISY).head_init_ == "random"
    probe = make_auto(head_init=head_init).partial_fit(images, NOISY, classes=[0, 1])
    expected = "linear_probe" if head_init == "auto" else head_init
    assert probe.head_init_ == expected


def test_no_epochs_select_nothing(images, candidates):
    estimator = make_auto(max_epochs=0).fit(images, NOISY)
    assert candidates.settings == estimator.selection_ == []
    fixed = make_classifier(weights="DEFAULT", max_epochs=0, batch_size=8)
    assert equal_bits(estimator.module_, fixed.fit(images, NOISY).module_)


@pytest.mark.parametrize(
    "limit",
    [
        pytest.param(0, marks=pytest.mark.slow),
        1,
        pytest.param(2, marks=pytest.mark.slow),
    ],
)
def test_interrupted_selection_is_resumed(images, tmp_path, candidates, limit):
    file = tmp_path / "fine_tuning.safetensors"
    expected = make_auto().fit(images, NOISY)
    every, candidates.settings, candidates.limit = candidates.settings, [], limit
    estimator = make_auto(checkpoint=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(images, NOISY)
    assert candidates.settings == every[:limit]
    assert file.exists() == (limit > 0)
    candidates.settings, candidates.limit = [], math.inf
    estimator.fit(images, NOISY)
    assert candidates.settings == every[limit:]
    assert estimator.selection_ == expected.selection_
    assert estimator.history_ == expected.history_
    assert equal_bits(estimator.module_, expected.module_)
    candidates.settings = []
    completed = clone(estimator).fit(images, NOISY)  # only reads the checkpoint
    assert candidates.settings == []
    assert completed.selection_ == expected.selection_
    assert selected(completed) == selected(expected)


def test_damaged_rows_of_an_interrupted_selection(images, tmp_path, candidates):
    file = tmp_path / "fine_tuning.safetensors"
    candidates.limit = 1
    estimator = make_auto(checkpoint=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(images, NOISY)
    tensors, document = read_tensors(file)
    for rows in (None, [{}], [{**document["selection"][0], "valid_loss": "0"}]):
        write_tensors(file, tensors, {**document, "selection": rows})
        with pytest.raises(ValueError, match=f"{file}.*row of its selection"):
            estimator.fit(images, NOISY)
