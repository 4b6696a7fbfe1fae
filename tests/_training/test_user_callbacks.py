"""Tests of callbacks of the user: scores, output, files, and which are refused."""

import threading

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    log_loss,
    make_scorer,
    roc_auc_score,
)
from skorch.callbacks import (
    BatchScoring,
    Callback,
    Checkpoint,
    EarlyStopping,
    EpochScoring,
    EpochTimer,
    Freezer,
    GradientNormClipping,
    Initializer,
    InputShapeSetter,
    LoadInitState,
    LRScheduler,
    MlflowLogger,
    ParamMapper,
    PassthroughScoring,
    PrintLog,
    ProgressBar,
    SacredLogger,
    TensorBoard,
    TrainEndCheckpoint,
    Unfreezer,
    WandbLogger,
    WarmRestartLR,
)
from trainer_helpers import Y, make_classifier

from sktl._training.user_callbacks import check_callbacks, copy_callbacks

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

LABELS = np.array(["bird", "cat"])[Y]


def f1_of_cats(y_true, y_pred):
    return f1_score(y_true, y_pred, pos_label="cat")


def log_loss_of(net, X, y):
    return log_loss(y, net.predict_proba(X), labels=net.classes_)


# A scoring, and an independent function of labels and probabilities.
SCORES = {
    "accuracy": ("accuracy", lambda y, p: accuracy_score(y, predicted(p))),
    "f1_macro": (
        "f1_macro",
        lambda y, p: f1_score(y, predicted(p), average="macro"),
    ),
    "roc_auc": ("roc_auc", lambda y, p: roc_auc_score(y, p[:, 1])),
    "neg_log_loss": ("neg_log_loss", lambda y, p: -log_loss(y, p)),
    "make_scorer": (
        make_scorer(f1_of_cats),
        lambda y, p: f1_of_cats(y, predicted(p)),
    ),
    "function": (log_loss_of, log_loss),
    "score": (None, lambda y, p: accuracy_score(y, predicted(p))),
}


def predicted(proba):
    return np.array(["bird", "cat"])[proba.argmax(axis=1)]


class Record(Callback):
    """Record labels and probabilities of each epoch, of the training or validation."""

    def __init__(self, training):
        self.training = training
        self.epochs = []

    def on_epoch_begin(self, net, **rest):
        self.epochs.append(([], []))

    def on_batch_end(self, net, batch, training, y_pred, **rest):
        if training == self.training:
            labels, probabilities = self.epochs[-1]
            labels.extend(batch[1])
            probabilities.extend(softmax(y_pred.detach().numpy(), axis=1))

    def scores(self, function):
        return [function(np.array(y), np.array(p)) for y, p in self.epochs]


def callback_of(fitted, cls):
    (found,) = (c for _, c in fitted.net_.callbacks_ if isinstance(c, cls))
    return found


@pytest.mark.parametrize("use_caching", [True, False])
@pytest.mark.parametrize("name", SCORES)
def test_scores_of_the_validation_set(images, name, use_caching):
    scoring, function = SCORES[name]
    score = EpochScoring(scoring, name="got", use_caching=use_caching)
    fitted = make_classifier(
        max_epochs=2,
        early_stopping=True,
        validation_fraction=0.3,
        callbacks=[score, Record(training=False)],
    ).fit(images, LABELS)
    recorded = callback_of(fitted, Record)
    assert [sorted(y) for y, _ in recorded.epochs] == [["bird"] * 6 + ["cat"] * 6] * 2
    expected = recorded.scores(function)
    np.testing.assert_allclose(fitted.net_.history[:, "got"], expected, rtol=1e-5)
    if name == "accuracy":
        np.testing.assert_allclose(fitted.validation_scores_, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"trainable": 1},
        {"trainable": "head", "memory": "cache"},
        {"augmentation": "flip"},
        {"trainable": 1, "augmentation": "flip", "augmentation_views": 2},
    ],
)
def test_scores_of_the_training_set(images, tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    score = EpochScoring("roc_auc", on_train=True)
    fitted = make_classifier(
        max_epochs=2, callbacks=[score, Record(training=True)], **settings
    ).fit(images, LABELS)
    expected = callback_of(fitted, Record).scores(SCORES["roc_auc"][1])
    np.testing.assert_allclose(fitted.net_.history[:, "roc_auc"], expected)


@pytest.mark.parametrize("trainable", ["all", 1, "head"])
def test_scores_of_the_training_set_after_the_epoch(images, trainable):
    scores = [
        EpochScoring(name, on_train=True, use_caching=False)
        for name in ("accuracy", "neg_log_loss")
    ]
    fitted = make_classifier(
        trainable=trainable, max_epochs=1, engine="torch", callbacks=scores
    ).fit(images, LABELS)
    history = fitted.net_.history
    assert history[-1, "accuracy"] == fitted.score(images, LABELS)
    expected = -log_loss(LABELS, fitted.predict_proba(images))
    assert history[-1, "neg_log_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("use_caching", [True, False])
def test_scores_of_batches(images, use_caching):
    callbacks = [
        BatchScoring("accuracy", on_train=False, use_caching=use_caching),
        PassthroughScoring("accuracy", lower_is_better=False),
    ]
    fitted = make_classifier(
        early_stopping=True, validation_fraction=0.5, callbacks=callbacks
    ).fit(images, LABELS)
    np.testing.assert_allclose(
        fitted.net_.history[:, "accuracy"], fitted.validation_scores_
    )


def test_callbacks_do_not_change_the_training(images):
    scores = [
        EpochScoring(name, use_caching=False, on_train=on_train, name=f"{on_train}")
        for name, on_train in (("accuracy", True), ("f1_macro", False))
    ]
    plain, scored = (
        make_classifier(
            early_stopping=True, augmentation="flip", dropout=0.5, callbacks=callbacks
        ).fit(images, LABELS)
        for callbacks in (None, scores)
    )
    np.testing.assert_array_equal(
        plain.predict_proba(images), scored.predict_proba(images)
    )
    assert plain.history_ == scored.history_


class Hooks(Callback):
    """Record the name, the labels and the datasets of each hook."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, net, X, y, **rest):
        self.seen.append(("train", len(X), list(y)))

    def on_epoch_end(self, net, dataset_train, dataset_valid, **rest):
        self.seen.append(("epoch", list(dataset_train.y), dataset_valid))

    def on_batch_begin(self, net, batch, training, **rest):
        self.seen.append(("batch", len(batch[0]), len(batch[1]), batch[1].dtype))

    def on_grad_computed(self, net, named_parameters, batch, **rest):
        names = [name for name, _ in named_parameters]
        self.seen.append(("grad", len(names) > 0, batch[1].dtype))

    def on_train_end(self, net, X, y, **rest):
        self.seen.append(("end", len(X), list(y)))


def test_what_the_hooks_are_called_with(images):
    mine = Hooks()
    fitted = make_classifier(
        max_epochs=1, batch_size=40, callbacks=[("mine", mine)]
    ).fit(images, LABELS)
    labels, dtype = list(LABELS), LABELS.dtype
    assert dict(fitted.net_.callbacks_)["mine"].seen == [
        ("train", 40, labels),
        ("batch", 40, 40, dtype),
        ("grad", True, dtype),
        ("epoch", labels, None),
        ("end", 40, labels),
    ]
    assert mine.seen == []  # the parameter is copied


@pytest.mark.parametrize("verbose", [0, 1])
def test_print_log(images, capsys, verbose):
    callbacks = [EpochScoring("f1_macro"), PrintLog(), EpochTimer]
    make_classifier(early_stopping=True, callbacks=callbacks, verbose=verbose).fit(
        images, LABELS
    )
    header, line, *rows = capsys.readouterr().out.splitlines()
    assert {"epoch", "f1_macro", "train_loss", "valid_loss", "dur"} <= {*header.split()}
    assert set(line) == {"-", " "}
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]


def test_progress_bar(images, capsys):
    make_classifier(max_epochs=1, callbacks=[ProgressBar()]).fit(images, LABELS)
    assert "| 0/3 [" in capsys.readouterr().err  # of all batches


class GradientNorm(Callback):
    def on_grad_computed(self, net, named_parameters, **rest):
        norms = [p.grad.norm() for _, p in named_parameters if p.grad is not None]
        net.history.record("norm", float(torch.stack(norms).norm()))


def test_gradient_norm_clipping(images):
    callbacks = [GradientNormClipping(1e-3), GradientNorm()]
    fitted = make_classifier(callbacks=callbacks).fit(images, LABELS)
    np.testing.assert_allclose(fitted.net_.history[:, "norm"], 1e-3, rtol=1e-3)


def test_checkpoint_callback(images, tmp_path):
    fitted = make_classifier(
        callbacks=[Checkpoint(monitor=None, f_pickle="net.pkl", dirname=tmp_path)]
    ).fit(images, LABELS)
    saved = torch.load(tmp_path / "params.pt", weights_only=True)
    trained = fitted.module_.state_dict()
    prefix = "partially_frozen.network."
    assert {prefix + name for name in trained} <= saved.keys()
    assert all(torch.equal(v, saved[prefix + name]) for name, v in trained.items())
    assert (tmp_path / "net.pkl").exists()


class Writer:
    """A log that cannot be copied, with the methods of several services."""

    def __init__(self):
        self.lock, self.values = threading.Lock(), []

    def add_scalar(self, tag, scalar_value, **rest):
        self.values.append(scalar_value)

    def close(self):
        pass

    def log_scalar(self, name, value, step=None):
        self.values.append(value)

    def log(self, values):
        self.values.append(values["train_loss"])

    def log_batch(self, run_id, metrics=(), **rest):
        self.values.extend(metric.value for metric in metrics)

    def watch(self, module):
        assert isinstance(module, torch.nn.Module)


@pytest.mark.parametrize(
    "make",
    [
        TensorBoard,
        SacredLogger,
        lambda writer: WandbLogger(writer, save_model=False),
    ],
)
def test_loggers(images, make):
    writer = Writer()
    fitted = make_classifier(callbacks=[make(writer)]).fit(images, LABELS)
    assert set(fitted.loss_curve_) <= set(writer.values)


REFUSED = [
    (LRScheduler("StepLR", step_size=1), "LRScheduler", "lr_schedule"),
    (LRScheduler, "LRScheduler", "lr_schedule"),
    (type("Mine", (LRScheduler,), {})(), "Mine", "lr_schedule"),
    (WarmRestartLR, "WarmRestartLR", "lr_schedule"),
    (torch.optim.lr_scheduler.CyclicLR, "CyclicLR", "lr_schedule"),
    (EarlyStopping(), "EarlyStopping", "early_stopping=True and n_iter_no_change"),
    (Freezer("head"), "Freezer", "trainable"),
    (Unfreezer("head"), "Unfreezer", "unfreeze_every"),
    (ParamMapper("head"), "ParamMapper", "trainable"),
    (Initializer("head"), "Initializer", "head_init"),
    (InputShapeSetter(), "InputShapeSetter", "image_size"),
    (LoadInitState(Checkpoint()), "LoadInitState", "warm_start"),
    (TrainEndCheckpoint(), "TrainEndCheckpoint", "save after fit"),
    (Checkpoint(load_best=True), "Checkpoint", "load_best=True.*early_stopping=True"),
    (Checkpoint(), "Checkpoint", "early_stopping=False.*early_stopping=True"),
    (EpochScoring("accuracy"), "EpochScoring", "early_stopping=False.*on_train=True"),
    (BatchScoring("accuracy"), "BatchScoring", "on_train=True"),
    (PassthroughScoring("loss"), "PassthroughScoring", "on_train=True"),
    (WandbLogger(None), "WandbLogger", "early_stopping=True"),
]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("callback", "got", "advice"), REFUSED)
def test_refused_callbacks(callback, got, advice, named):
    callbacks = [("name", callback)] if named else [Callback(), callback]
    estimator = make_classifier(callbacks=callbacks)
    match = f"'callbacks' parameter of FineTunedCNNClassifier .*{got}.*{advice}"
    for fit in (estimator.fit, lambda X, y: estimator.partial_fit(X, y, [0, 1])):
        with pytest.raises(ValueError, match=match):
            fit(["no such file.png"] * 4, [0, 1, 0, 1])


@pytest.mark.parametrize("other", ["PrintLog", len, object(), (1, 2, 3)])
def test_other_objects_are_refused(other):
    with pytest.raises(TypeError, match=r"callbacks of skorch\. Got"):
        check_callbacks([other], early_stopping=False, estimator="Estimator")


def test_supported_callbacks_are_not_refused():
    callbacks = [EpochScoring("f1"), Checkpoint(), PrintLog, MlflowLogger]
    check_callbacks(callbacks, early_stopping=True, estimator="Estimator")
    callbacks = [EpochScoring("f1", on_train=True), Checkpoint("train_loss_best")]
    check_callbacks(callbacks, early_stopping=False, estimator="Estimator")
    check_callbacks(None, early_stopping=False, estimator="Estimator")


def test_copies_share_what_cannot_be_copied():
    writer, recorder = TensorBoard(Writer()), Record(training=True)
    copied, (name, other) = copy_callbacks([writer, ("name", recorder)])
    assert copied is not writer
    assert copied.writer is writer.writer
    assert name == "name"
    assert other is not recorder
    assert other.epochs is not recorder.epochs
