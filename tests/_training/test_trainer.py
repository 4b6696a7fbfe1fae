"""A training is the loop one would write by hand, and leaves the world as it was."""

import copy
import math
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.utils import check_random_state
from skorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from sktl import FineTunedCNNClassifier
from sktl._backbones.registry import load_backbone
from sktl._images.augmentation import augmentation_for
from sktl._images.preprocessing import Normalization
from sktl._images.validation import validate_images
from sktl._training.datasets import ImageDataset
from sktl._training.network import parameter_groups, replace_head
from sktl._training.optim import lr_lambda
from sktl._training.trainer import (
    Trainer,
    TrainerState,
    TrainingConfig,
    warn_of_shared_gpu,
)
from sktl._utils.random_state import temporary_seed

Y = np.repeat([0, 1], 20)
WEIGHT = np.linspace(0.5, 1.5, 40)
BACKBONE = load_backbone("tiny", None, random_state=0)
DEFAULTS = {
    "n_trainable_stages": 2,
    "fixed_statistics": False,
    "optimizer": "adamw",
    "lr": 0.01,
    "layer_decay": 0.5,
    "weight_decay": 0.1,
    "lr_schedule": "cosine",
    "max_epochs": 3,
    "label_smoothing": 0.1,
    "wise_ft_alpha": 1.0,
    "unfreeze_every": None,
    "patience": None,
    "batch_size": 16,
    "device": torch.device("cpu"),
    "precision": "float32",
    "verbose": 0,
}


def classifier(backbone="tiny", **options):
    defaults = {"weights": None, "max_epochs": 3, "batch_size": 16, "random_state": 0}
    return FineTunedCNNClassifier(backbone, **{**defaults, **options})


def some(images, chosen=slice(None), augmentation=None):
    rows = np.arange(len(images))[chosen]
    return ImageDataset(
        validate_images(images, estimator=classifier(), reset=True),
        rows,
        Y[rows],
        WEIGHT[rows],
        augmentation=augmentation_for(augmentation, BACKBONE.preprocessing),
        side=16,
        n_jobs=None,
    )


def a_training(training, validation=None, **options):
    with temporary_seed(torch.device("cpu"), 0):
        network = replace_head(BACKBONE, 2, dropout=0.2)
    return Trainer(
        network,
        BACKBONE.preprocessing,
        training,
        validation,
        settings=TrainingConfig(**{**DEFAULTS, **options}),
        progress=TrainerState(seed=7),
    )


def by_hand(network, images, *, optimizer, n_epochs=3, lr=0.01, n_batches=3):
    """Train as one does in PyTorch: forward, loss, backward, clip, step, schedule."""
    preprocessing = BACKBONE.preprocessing
    pixels = validate_images(images, estimator=classifier(), reset=True)
    pixels = np.stack([preprocessing(pixels[i]) for i in range(len(images))])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v) for v in (preprocessing.mean, preprocessing.std))
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    y, weight = torch.from_numpy(Y), torch.from_numpy(WEIGHT).float()

    groups = []
    for rate, part in ((lr, "head"), (lr / 2, "stage1"), (lr / 4, "stem")):
        parameters = list(network.get_submodule(part).parameters())
        for decay, ndim in ((0.1, (2, 4)), (0.0, (1,))):
            chosen = [p for p in parameters if p.ndim in ndim]
            groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    if optimizer == "adamw":
        steps = torch.optim.AdamW(groups)
    else:
        steps = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    rates = [group["lr"] for group in groups]
    network.train()
    step, losses = 0, []
    for epoch in range(n_epochs):
        with temporary_seed(torch.device("cpu"), 7, epoch):
            order = torch.randperm(len(y))
            losses.append(0.0)
            for at in order.tensor_split(n_batches):
                for group, rate in zip(steps.param_groups, rates, strict=True):
                    group["lr"] = rate * lr_lambda("cosine", step, n_epochs * 3)
                steps.zero_grad()
                out = F.cross_entropy(
                    network(x[at]), y[at], reduction="none", label_smoothing=0.1
                )
                loss = (out * weight[at]).mean()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 5.0)
                steps.step()
                step += 1
                losses[-1] += loss.item() * len(at) / len(y)
    return losses


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_is_the_loop_one_writes_by_hand(images, optimizer):
    training = a_training(some(images), optimizer=optimizer)
    expected = copy.deepcopy(training.network)
    losses = by_hand(expected, images, optimizer=optimizer)
    training.run()
    assert_close(training.network, expected)
    got = [row["train_loss"] for row in training.progress.history]
    np.testing.assert_allclose(got, losses, rtol=1e-6)


def assert_close(one, other):
    state = other.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6)


def equal_bits(one, other):
    state = other.state_dict()
    return all(torch.equal(v, state[name]) for name, v in one.state_dict().items())


class Rates(Callback):
    seen = []  # noqa: RUF012  (of all copies)

    def on_grad_computed(self, net, named_parameters, training=False, **rest):
        self.seen.append([group["lr"] for group in net.optimizer_.param_groups])


@pytest.mark.parametrize("lr_schedule", ["constant", "cosine", "onecycle"])
def test_each_step_has_the_rate_of_schedule_and_depth(images, lr_schedule):
    Rates.seen.clear()
    fitted = classifier(
        lr=0.02, layer_decay=0.5, lr_schedule=lr_schedule, callbacks=[Rates()]
    ).fit(images, Y)
    groups = parameter_groups(fitted.module_, 9, lr=1, layer_decay=0.5, weight_decay=1)
    factors = [lr_lambda(lr_schedule, step, 9) for step in range(9)]
    expected = np.outer(factors, [0.02 * group["lr"] for group in groups])
    np.testing.assert_allclose(Rates.seen, expected, rtol=1e-12)
    rates = [row["lr"] for row in fitted.history_ if row["epoch"] > 0]
    np.testing.assert_allclose(rates, expected[2::3, 0])


@pytest.mark.parametrize("family", ["resnet18", "mobilenet_v2", "densenet121"])
@pytest.mark.parametrize("trainable", ["head", 1])
@pytest.mark.parametrize("head_init", ["linear_probe", "random"])
def test_frozen_stages_keep_their_bits(images, family, trainable, head_init):
    X, y = images[::4], Y[::4]
    mine = classifier(
        family,
        trainable=trainable,
        head_init=head_init,
        image_size=64,
        batch_size=5,
        lr=0.1,
    )
    before = clone(mine).set_params(max_epochs=0).fit(X, y).module_.state_dict()
    after = mine.set_params(max_epochs=1).fit(X, y).module_
    names = [name for name, _ in after.named_children()]
    trains = {"head"} if trainable == "head" else set(names[-3:])
    moved = {
        name.split(".")[0]
        for name, value in after.state_dict().items()
        if not torch.equal(value, before[name])
    }
    has_weights = {name.split(".")[0] for name in before}
    assert moved == trains & has_weights


@pytest.mark.parametrize("head_init", ["linear_probe", "random"])
def test_t11_statistics_of_batch_norm_move_only_under_a_random_head(images, head_init):
    mine = classifier("resnet_mini", weights="DEFAULT", head_init=head_init, lr=0.1)
    mine.set_params(trainable=1, max_epochs=1).fit(images, Y)
    before = load_backbone("resnet_mini").stages
    for name, stage in before.items():
        trained = mine.module_.get_submodule(name)
        still = all(
            torch.equal(value, other)
            for value, other in zip(stage.buffers(), trained.buffers(), strict=True)
        )
        assert still == (name != "stage4" or head_init == "linear_probe")
        assert equal_bits(stage, trained) == (name != "stage4")


def test_t11_what_is_left_behind_is_in_evaluation_mode(images):
    fitted = classifier(early_stopping=True, validation_fraction=0.2, dropout=0.5)
    fitted.fit(images, Y)
    assert not any(module.training for module in fitted.module_.modules())
    alone = np.concatenate([fitted.predict_proba(images[i : i + 1]) for i in (0, 5)])
    together = fitted.predict_proba(images)
    np.testing.assert_allclose(alone, together[[0, 5]], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(fitted.predict_proba(images), together)
    assert not any(module.training for module in fitted.module_.modules())


@pytest.mark.parametrize("n_classes", [2, 4])
def test_epoch_0_is_the_linear_probe(images, n_classes):
    y = np.arange(40) % n_classes
    fitted = classifier("resnet_mini", weights="DEFAULT", trainable=1)
    first = clone(fitted).set_params(max_epochs=0)
    first.fit(images, y, sample_weight=WEIGHT)
    fitted.set_params(max_epochs=1).fit(images, y, sample_weight=WEIGHT)
    proba = first.predict_proba(images)
    expected = log_loss(y, proba, sample_weight=WEIGHT)
    for each in (first, fitted):
        assert each.history_[0]["epoch"] == 0
        assert each.history_[0]["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert (first.n_iter_, first.best_epoch_, first.loss_curve_) == (0, 0, [])


def test_early_stopping_keeps_the_best_epoch(images):
    training = a_training(
        some(images, slice(0, None, 2)),
        some(images, slice(1, None, 2)),
        patience=4,
        max_epochs=30,
        lr=0.05,
    )
    states = {}
    training.run(lambda t: states.update({t.progress.epoch: copy.deepcopy(t.network)}))
    rows = training.progress.history
    best = max(rows, key=lambda row: (round(row["valid_score"], 6), -row["valid_loss"]))
    assert training.progress.best_epoch == best["epoch"]
    assert training.progress.epoch == min(30, best["epoch"] + 4)
    assert equal_bits(training.network, states[best["epoch"]])


def test_epochs_with_the_same_hits_are_told_apart_by_their_loss(images):
    # Sums of weights round differently before and after the first epoch.
    odd = np.arange(40) % 2 == 1
    training = a_training(
        some(images, odd),
        some(images, odd),
        patience=9,
        lr=1e-5,
        fixed_statistics=True,
    )
    training.begin(features_of(training, images), Y, WEIGHT, odd)
    training.run()
    rows = training.progress.history
    scores = [row["valid_score"] for row in rows]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-6)
    assert 0 < scores[0] < 1
    assert np.argmin([row["valid_loss"] for row in rows]) == 3
    assert training.progress.best_epoch == 3


def features_of(training, images):
    x = next(iter(some(images).batches(range(40), 1)))[0]
    with torch.inference_mode():
        x = Normalization(BACKBONE.preprocessing)(x)
        return training.network.eval()[:-1](x).numpy()


def test_scores_on_the_held_out_part_are_weighted(images):
    training = a_training(
        some(images, slice(0, None, 2)),
        some(images, slice(1, None, 2)),
        patience=9,
        max_epochs=1,
    )
    training.run()
    x, (y, weight) = next(iter(some(images, slice(1, None, 2)).batches(range(20), 1)))
    with torch.inference_mode():
        logits = training.net.module_.eval()(x)
    hits = (logits.argmax(1) == y).double()
    row = training.progress.history[0]
    expected = np.average(hits.numpy(), weights=weight.numpy())
    assert row["valid_score"] == pytest.approx(expected)
    losses = F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1)
    assert row["valid_loss"] == pytest.approx((losses * weight).mean().item())


class Stages(Callback):
    states = []  # noqa: RUF012  (of all copies)

    def on_epoch_end(self, net, **rest):
        network = net.module_.partially_frozen.network
        self.states.append(copy.deepcopy(dict(network.named_children())))


@pytest.mark.parametrize(
    ("trainable", "n_trainable"), [("all", [0, 0, 1, 1, 2, 2]), (1, [0, 0, 1, 1, 1, 1])]
)
def test_unfreeze_every_opens_one_stage_after_the_other(images, trainable, n_trainable):
    Stages.states.clear()
    fitted = classifier(
        trainable=trainable, unfreeze_every=2, max_epochs=6, callbacks=[Stages()]
    ).fit(images, Y)
    rows = [row for row in fitted.history_ if row["epoch"] > 0]
    assert [row["n_trainable_stages"] for row in rows] == n_trainable
    for epoch in range(1, 6):
        before, after = Stages.states[epoch - 1 : epoch + 1]
        for name, depth in (("stage1", 1), ("stem", 2)):
            moved = not equal_bits(before[name], after[name])
            assert moved == (n_trainable[epoch] >= depth)


def test_a_network_that_only_learns_its_head_has_no_other_gradients(images):
    training = a_training(some(images), n_trainable_stages=0, max_epochs=1)
    seen = []
    training.net.optimizer_.register_step_post_hook(
        lambda *rest: seen.extend(
            name
            for name, parameter in training.network.named_parameters()
            if parameter.grad is not None
        )
    )
    training.run()
    assert seen == ["head.1.weight", "head.1.bias"] * 3


def everything_global():
    return [
        torch.get_rng_state().tolist(),
        str(check_random_state(None).get_state()),
        random.getstate(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.is_autocast_enabled("cpu"),
    ]


def noisy(image):
    """Draw from every global generator there is."""
    shift = random.randrange(3) + int(check_random_state(None).randint(3))
    return image.rotate(90 * (shift + int(torch.randint(4, ()))))


class Failing(Callback):
    def __init__(self, error):
        self.error = error

    def on_batch_end(self, net, **rest):
        if len(net.history) == 2:
            raise self.error


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("error", [None, OSError("a"), KeyboardInterrupt()])
def test_t06_nothing_global_changes(images, error, precision):
    mine = classifier(
        augmentation=noisy,
        dropout=0.5,
        early_stopping=True,
        precision=precision,
        callbacks=[Failing(error)] if error else None,
    )
    before = everything_global()
    if error is None:
        mine.fit(images, Y)
    else:
        with pytest.raises(type(error)):
            mine.fit(images, Y)
    assert everything_global() == before


OPTIONS = {"dropout": 0.3, "augmentation": noisy, "early_stopping": True}


def test_t06_same_random_state_same_bits(images):
    one = classifier(**OPTIONS).fit(images, Y)
    random.random()
    torch.rand(1)
    two = clone(one).fit(images, Y)
    assert equal_bits(one.module_, two.module_)
    assert one.history_ == two.history_
    assert equal_bits(
        one.module_, clone(one).set_params(n_jobs=4).fit(images, Y).module_
    )


def test_t06_same_bits_in_threads(images):
    before = everything_global()
    expected = classifier(**OPTIONS).fit(images, Y).module_
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(lambda _: classifier(**OPTIONS).fit(images, Y), range(3)):
            assert equal_bits(got.module_, expected)
    assert everything_global() == before


@pytest.mark.parametrize("weights", [None, "DEFAULT"])
def test_t06_random_states_of_each_kind(images, weights):
    backbone = "tiny" if weights is None else "resnet_mini"
    mine = classifier(backbone, weights=weights, trainable=1, max_epochs=1)

    def fitted(random_state):
        again = clone(mine).set_params(random_state=random_state)
        return again.fit(images, Y)

    state = np.random.RandomState(5)
    first, second = fitted(state).module_, fitted(state).module_
    assert equal_bits(fitted(np.random.RandomState(5)).module_, first)
    assert equal_bits(fitted(5).module_, first)
    assert equal_bits(fitted(np.int64(5)).module_, first)
    assert not equal_bits(second, first) or weights  # clones of a state are equal
    assert not equal_bits(fitted(6).module_, first)
    assert not equal_bits(fitted(None).module_, fitted(None).module_)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
    ],
)
def test_t11_it_trains_where_gradients_are_off(images, mode):
    expected = classifier().fit(images, Y)
    with mode():
        got = classifier().fit(images, Y)
    assert equal_bits(got.module_, expected.module_)
    assert not any(p.is_inference() for p in got.module_.parameters())


def test_t07_copies_predict_the_same(images, tmp_path):
    fitted = classifier("resnet_mini", weights="DEFAULT", max_epochs=1)
    fitted.fit(images, Y)
    expected = fitted.predict_proba(images)
    joblib.dump(fitted, tmp_path / "fitted.joblib", compress=3)
    copies = [
        pickle.loads(pickle.dumps(fitted)),
        copy.deepcopy(fitted),
        joblib.load(tmp_path / "fitted.joblib"),
    ]
    for each in copies:
        np.testing.assert_array_equal(each.predict_proba(images), expected)
        assert not hasattr(each, "net_")
        each.set_params(warm_start=True).fit(images, Y)  # and can go on


def test_t07_no_optimizer_in_a_pickle(images):
    fitted = classifier("resnet_mini", weights="DEFAULT", max_epochs=1)
    fitted.fit(images, Y)
    content = pickle.dumps(fitted)
    n_bytes = sum(v.nbytes for v in fitted.module_.state_dict().values())
    assert n_bytes < len(content) < n_bytes + 100_000
    for word in (b"exp_avg", b"torch.optim", b"skorch"):
        assert word not in content


def test_what_only_training_needed_is_let_go(images):
    fitted = classifier(early_stopping=True).fit(images, Y)
    assert all(p.grad is None for p in fitted.module_.parameters())
    assert fitted.net_.train_split is None
    assert len(fitted.net_.history) == fitted.n_iter_


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("batch_size", [8, 40])
def test_t10_a_loss_that_is_no_number_says_what_to_do(images, optimizer, batch_size):
    mine = classifier(lr=1e30, optimizer=optimizer, batch_size=batch_size)
    epoch = 1 if batch_size == 8 else 2
    reason = rf"loss in .* finite.* in epoch {epoch} with lr=1e\+30. Reduce lr"
    with pytest.raises(ValueError, match=reason):
        mine.fit(images, Y)
    with pytest.raises(NotFittedError):
        mine.predict(images)


def test_t10_weights_that_the_last_step_broke_are_not_kept(images):
    training = a_training(some(images), max_epochs=1)
    optimizer = training.net.optimizer_
    hook = lambda *rest: training.network.head[-1].weight.data.fill_(math.inf)  # noqa: E731
    optimizer.register_step_post_hook(
        lambda *rest: hook() if training.net.history[-1].get("batches")[2:] else None
    )
    with pytest.raises(ValueError, match=r"weights in .* finite.* in epoch 1 .*Reduce"):
        training.run()
    assert not training.progress.history


def test_t10_out_of_memory_says_what_to_do(images):
    error = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(MemoryError, match=r"16 images.*Reduce batch_size"):
        classifier(callbacks=[Failing(error)]).fit(images, Y)
    with pytest.raises(RuntimeError, match="something else"):
        classifier(callbacks=[Failing(RuntimeError("something else"))]).fit(images, Y)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_t12_not_a_word_unless_asked(images, capfd, early_stopping):
    mine = classifier(early_stopping=early_stopping, augmentation="trivial")
    mine.fit(images, Y).predict(images)
    assert capfd.readouterr() == ("", "")


def test_a_bar_is_for_long_trainings_only(images, capfd, monkeypatch):
    classifier(verbose=1).fit(images, Y)
    assert capfd.readouterr() == ("", "")
    bar = SimpleNamespace(n=0)
    bar.update = lambda: setattr(bar, "n", bar.n + 1)

    class Bar:
        def __init__(self, total, initial, **rest):
            bar.total, bar.n = total, initial

        def __enter__(self):
            return bar

        def __exit__(self, *error):
            return None

    monkeypatch.setattr("sktl._training.trainer.tqdm", Bar)
    classifier(verbose=1).fit(images, Y)
    assert (bar.n, bar.total) == (9, 9)


def test_workers_that_share_a_gpu_are_told(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    warn_of_shared_gpu(cuda)  # this is no worker
    worker = SimpleNamespace(name="LokyProcess-3")
    monkeypatch.setattr("sktl._training.trainer.current_process", lambda: worker)
    warn_of_shared_gpu(torch.device("cpu"))
    with pytest.warns(UserWarning, match=r"on one GPU.*n_jobs=1"):
        warn_of_shared_gpu(cuda)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    warn_of_shared_gpu(cuda)
