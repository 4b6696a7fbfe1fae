"""Tests of the training callbacks: one concern each, called as skorch calls them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score
from skorch.callbacks import Callback
from torch.nn import functional as F
from trainer_helpers import TARGET, Y, make_classifier, make_dataset, make_trainer

from sktl._training.callbacks import (
    DivergenceCheck,
    GradientClipping,
    LearningRateScheduler,
    ProgressBar,
    ValidationOutputs,
    format_row,
)
from sktl._training.optim import lr_lambda, parameter_groups

pytestmark = pytest.mark.usefixtures("quick_linear_probe")


class RecordLearningRates(Callback):
    rates = []  # noqa: RUF012  (shared by all copies)

    def on_grad_computed(self, net, named_parameters, training=False, **rest):
        self.rates.append([group["lr"] for group in net.optimizer_.param_groups])


@pytest.mark.parametrize("lr_schedule", ["constant", "cosine", "onecycle"])
def test_learning_rate_of_each_step_and_depth(images, lr_schedule):
    RecordLearningRates.rates.clear()
    fitted = make_classifier(
        lr=0.02,
        layer_decay=0.5,
        lr_schedule=lr_schedule,
        callbacks=[RecordLearningRates()],
    ).fit(images, Y)
    groups = parameter_groups(fitted.module_, 9, lr=1, layer_decay=0.5, weight_decay=1)
    factors = [lr_lambda(lr_schedule, step, 9) for step in range(9)]
    expected = np.outer(factors, [0.02 * group["lr"] for group in groups])
    np.testing.assert_allclose(RecordLearningRates.rates, expected, rtol=1e-12)
    rates = [row["lr"] for row in fitted.history_ if row["epoch"] > 0]
    np.testing.assert_allclose(rates, expected[2::3, 0])


def test_scheduler_continues_in_a_later_epoch():
    groups = [{"max_lr": 0.2}, {"max_lr": 0.1}]
    net = SimpleNamespace(lr=0.1, optimizer_=SimpleNamespace(param_groups=groups))
    scheduler = LearningRateScheduler("cosine", n_steps_per_epoch=5, n_epochs=4)
    scheduler.start_epoch(2)
    scheduler.on_batch_begin(net, training=False)  # a validation batch is not a step
    for step in (10, 11):
        scheduler.on_batch_begin(net, training=True)
        factor = lr_lambda("cosine", step, 20)
        np.testing.assert_allclose(
            [g["lr"] for g in groups], [0.2 * factor, 0.1 * factor]
        )
        assert scheduler.lr == 0.1 * factor  # not that of the last layer


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_gradient_norm_is_at_most_5(scale):
    parameters = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    for parameter in parameters:
        parameter.grad = scale * torch.arange(1.0, 1.0 + len(parameter))
    before = torch.cat([parameter.grad.clone() for parameter in parameters])
    groups = [{"params": [parameter]} for parameter in parameters]
    net = SimpleNamespace(optimizer_=SimpleNamespace(param_groups=groups))
    GradientClipping().on_grad_computed(net)
    after = torch.cat([parameter.grad for parameter in parameters])
    expected = before * min(1.0, 5.0 / float(before.norm()))
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=0)


def test_validation_score_and_loss_are_weighted(images):
    trainer = make_trainer(
        make_dataset(images, slice(0, None, 2)),
        valid := make_dataset(images, slice(1, None, 2)),
        patience=9,
        max_epochs=1,
    )
    trainer.run()
    x, (y, weight) = next(iter(valid.batches(range(20), 1)))
    with torch.inference_mode():
        logits = trainer.net.module_.eval()(x)
    row = trainer.state.history[0]
    expected = accuracy_score(
        y.numpy(), logits.argmax(1).numpy(), sample_weight=weight.numpy()
    )
    assert row["valid_score"] == pytest.approx(expected)
    losses = F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1)
    assert row["valid_loss"] == pytest.approx((losses * weight).mean().item())


def test_validation_outputs_are_of_the_last_epoch():
    recorded = ValidationOutputs()
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    weight = torch.tensor([1.0, 3.0])
    for y, expected in ((torch.tensor([0, 0]), 0.25), (torch.tensor([1, 1]), 0.75)):
        recorded.on_epoch_begin(None)
        for training, targets in ((True, 1 - y), (False, y)):
            batch = (None, (targets, weight))
            recorded.on_batch_end(None, batch, training=training, y_pred=logits)
        assert TARGET.score(*recorded.last()) == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("batch_size", [8, 40])
def test_diverging_loss(images, optimizer, batch_size):
    estimator = make_classifier(lr=1e30, optimizer=optimizer, batch_size=batch_size)
    epoch = 1 if batch_size == 8 else 2
    reason = rf"loss must be finite.* in epoch {epoch} with lr=1e\+30. Reduce lr"
    with pytest.raises(ValueError, match=reason):
        estimator.fit(images, Y)
    with pytest.raises(NotFittedError):
        estimator.predict(images)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 0.5])
def test_divergence_check_reads_training_batches_only(loss):
    check = DivergenceCheck(lr=0.1)
    check.start_epoch(4)
    net = SimpleNamespace(history={(-1, "batches", -1, "train_loss"): loss})
    check.on_batch_end(net, training=False)
    if loss == 0.5:
        check.on_batch_end(net, training=True)
        assert not check.diverged
        return
    assert not check.diverged
    with pytest.raises(ValueError, match=f"Got {loss} in epoch 5 with lr=0.1"):
        check.on_batch_end(net, training=True)
    assert check.diverged


class _FakeBar:
    """Stands for the progress bar of tqdm, and records its calls."""

    def __init__(self, total, initial, **options):
        self.total, self.n, self.delay = total, initial, options["delay"]
        self.is_open = False
        self.descriptions, self.values = [], []

    def __enter__(self):
        self.is_open = True
        return self

    def __exit__(self, *error):
        self.is_open = False

    def update(self):
        assert self.is_open
        self.n += 1

    def set_description(self, text, refresh):
        assert not refresh  # the bar may not be shown yet
        self.descriptions.append(text)

    def set_postfix(self, values, refresh):
        assert not refresh
        self.values.append(values)


@pytest.fixture
def bars(monkeypatch):
    """Return the list of the progress bars that are made."""
    made = []

    def make(**options):
        made.append(_FakeBar(**options))
        return made[-1]

    monkeypatch.setattr("sktl._training.callbacks.tqdm", make)
    return made


def test_progress_bar_counts_the_training_steps(bars):
    progress_bar = ProgressBar(n_steps=12, max_epochs=4)
    progress_bar.on_batch_end(None, training=True)  # not shown yet
    with progress_bar.show(n_done=3):
        for training in (True, False, True):
            progress_bar.on_batch_end(None, training=training)
    progress_bar.on_batch_end(None, training=True)
    assert [(bar.total, bar.n, bar.delay) for bar in bars] == [(12, 5, 1)]


@pytest.mark.parametrize(
    ("parameters", "n_steps"),
    [({"max_epochs": 3}, 9), ({"max_epochs": 3, "batch_size": 8}, 15)],
)
def test_progress_bar_of_a_fit(images, bars, parameters, n_steps):
    make_classifier(verbose=1, **parameters).fit(images, Y)
    assert [(bar.total, bar.n) for bar in bars] == [(n_steps, n_steps)]
    make_classifier(**parameters).fit(images, Y)  # without verbose, no bar
    assert len(bars) == 1


def test_no_progress_bar_for_a_short_training(images, capfd):
    make_classifier(verbose=1).fit(images, Y)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("early_stopping", [False, True])
def test_progress_bar_names_epoch_loss_and_score(images, bars, early_stopping):
    fitted = make_classifier(
        verbose=1, early_stopping=early_stopping, n_iter_no_change=9
    ).fit(images, Y)
    (bar,) = bars
    assert bar.descriptions == ["Epoch 1/3", "Epoch 2/3", "Epoch 3/3"]
    names = ["train_loss"]
    names += ["valid_loss", "valid_score"] if early_stopping else []
    rows = [{name: row[name] for name in names} for row in fitted.history_[1:]]
    assert bar.values == rows


@pytest.mark.parametrize("early_stopping", [False, True])
def test_verbose_2_prints_a_line_per_epoch(images, bars, capsys, early_stopping):
    options = {"early_stopping": early_stopping, "lr": "auto", "max_epochs": 2}
    fitted = make_classifier(verbose=2, **options).fit(images, Y)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [format_row(row, 2) for row in fitted.history_]
    assert [line.split(":")[0] for line in lines[:2]] == ["Epoch 0/2", "Epoch 1/2"]
    for row, line in zip(fitted.history_, lines, strict=True):
        assert f"train_loss {row['train_loss']:.4f}" in line
        assert ("valid_score" in line) == early_stopping
