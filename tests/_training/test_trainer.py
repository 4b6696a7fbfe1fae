"""Tests of the training loop."""

import copy
import math
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from reference import normalized
from sklearn.base import clone
from sklearn.metrics import log_loss
from sklearn.utils import check_random_state
from skorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from trainer_helpers import (
    BACKBONE,
    SAMPLE_WEIGHT,
    TARGET,
    Y,
    equal_bits,
    make_classifier,
    make_dataset,
    make_trainer,
)

from sktl._backbones.registry import load_backbone
from sktl._images.preprocessing import Normalization
from sktl._training.optim import lr_lambda
from sktl._training.targets import EncodedTargets
from sktl._utils.random_state import temporary_seed

pytestmark = pytest.mark.usefixtures("quick_linear_probe")


def train_in_plain_pytorch(
    network, images, *, optimizer, n_epochs=3, lr=0.01, n_batches=3
):
    """Train with a loop of PyTorch; return the loss of each epoch."""
    x = normalized(images, BACKBONE.preprocessing)
    y, weight = torch.from_numpy(Y), torch.from_numpy(SAMPLE_WEIGHT).float()

    groups = []
    for rate, part in ((lr, "head"), (lr / 2, "stage1"), (lr / 4, "stem")):
        parameters = list(network.get_submodule(part).parameters())
        for decay, ndim in ((0.1, (2, 4)), (0.0, (1,))):
            chosen = [p for p in parameters if p.ndim in ndim]
            groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    if optimizer == "adamw":
        torch_optimizer = torch.optim.AdamW(groups)
    else:
        torch_optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    rates = [group["lr"] for group in groups]
    network.train()
    step, losses = 0, []
    for epoch in range(n_epochs):
        with temporary_seed(torch.device("cpu"), 7, epoch):
            order = torch.randperm(len(y))
            losses.append(0.0)
            for batch in order.tensor_split(n_batches):
                for group, rate in zip(
                    torch_optimizer.param_groups, rates, strict=True
                ):
                    group["lr"] = rate * lr_lambda("cosine", step, n_epochs * 3)
                torch_optimizer.zero_grad()
                out = F.cross_entropy(
                    network(x[batch]), y[batch], reduction="none", label_smoothing=0.1
                )
                loss = (out * weight[batch]).mean()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 5.0)
                torch_optimizer.step()
                step += 1
                losses[-1] += loss.item() * len(batch) / len(y)
    return losses


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_equals_a_plain_pytorch_loop(images, optimizer):
    trainer = make_trainer(make_dataset(images), optimizer=optimizer)
    expected = copy.deepcopy(trainer.network)
    losses = train_in_plain_pytorch(expected, images, optimizer=optimizer)
    trainer.run()
    assert_close(trainer.network, expected)
    got = [row["train_loss"] for row in trainer.state.history]
    np.testing.assert_allclose(got, losses, rtol=1e-6)


def assert_close(one, other):
    state = other.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family",
    [
        "five stages",
        pytest.param("resnet18", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", marks=pytest.mark.slow),
        pytest.param("densenet121", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("trainable", ["head", 1])
@pytest.mark.parametrize("head_init", ["linear_probe", "random"])
def test_frozen_stages_do_not_change(images, family, trainable, head_init):
    X, y = images[::4], Y[::4]
    estimator = make_classifier(
        family,
        trainable=trainable,
        head_init=head_init,
        image_size=64,
        batch_size=5,
        lr=0.1,
    )
    first = clone(estimator).set_params(max_epochs=0)
    before = first.fit(X, y).module_.state_dict()
    after = estimator.set_params(max_epochs=1).fit(X, y).module_
    names = [name for name, _ in after.named_children()]
    trained = {"head"} if trainable == "head" else set(names[-3:])
    changed = {
        name.split(".")[0]
        for name, value in after.state_dict().items()
        if not torch.equal(value, before[name])
    }
    with_weights = {name.split(".")[0] for name in before}
    assert changed == trained & with_weights


@pytest.mark.parametrize("head_init", ["linear_probe", "random"])
def test_linear_probe_freezes_batch_norm_statistics(images, head_init):
    estimator = make_classifier(
        "resnet_mini", weights="DEFAULT", head_init=head_init, lr=0.1, image_size=32
    )
    estimator.set_params(trainable=1, max_epochs=1).fit(images[::4], Y[::4])
    before = load_backbone("resnet_mini").stages
    for name, stage in before.items():
        trained = estimator.module_.get_submodule(name)
        equal_statistics = all(
            torch.equal(value, other)
            for value, other in zip(stage.buffers(), trained.buffers(), strict=True)
        )
        assert equal_statistics == (name != "stage4" or head_init == "linear_probe")
        assert equal_bits(stage, trained) == (name != "stage4")


def test_fitted_network_is_in_evaluation_mode(images):
    fitted = make_classifier(early_stopping=True, validation_fraction=0.2, dropout=0.5)
    fitted.fit(images, Y)
    assert not any(module.training for module in fitted.module_.modules())
    single = np.concatenate([fitted.predict_proba(images[i : i + 1]) for i in (0, 5)])
    batch = fitted.predict_proba(images)
    np.testing.assert_allclose(single, batch[[0, 5]], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(fitted.predict_proba(images), batch)
    assert not any(module.training for module in fitted.module_.modules())


@pytest.mark.parametrize("n_classes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_epoch_0_is_the_linear_probe(images, n_classes):
    y = np.arange(40) % n_classes
    options = {"weights": "DEFAULT", "trainable": 1, "image_size": 24}
    fitted = make_classifier("resnet_mini", **options)
    first = clone(fitted).set_params(max_epochs=0)
    first.fit(images, y, sample_weight=SAMPLE_WEIGHT)
    fitted.set_params(max_epochs=1).fit(images, y, sample_weight=SAMPLE_WEIGHT)
    proba = first.predict_proba(images)
    expected = log_loss(y, proba, sample_weight=SAMPLE_WEIGHT)
    for each in (first, fitted):
        assert each.history_[0]["epoch"] == 0
        assert each.history_[0]["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert (first.n_iter_, first.best_epoch_, first.loss_curve_) == (0, 0, [])


def test_early_stopping_keeps_the_best_epoch(images):
    trainer = make_trainer(
        make_dataset(images, slice(0, None, 2)),
        make_dataset(images, slice(1, None, 2)),
        patience=4,
        max_epochs=30,
        lr=0.05,
    )
    states = {}
    trainer.run(lambda t: states.update({t.state.epoch: copy.deepcopy(t.network)}))
    rows = trainer.state.history
    best = max(rows, key=lambda row: (round(row["valid_score"], 6), -row["valid_loss"]))
    assert trainer.state.best_epoch == best["epoch"]
    assert trainer.state.epoch == min(30, best["epoch"] + 4)
    assert equal_bits(trainer.network, states[best["epoch"]])


def test_epochs_of_equal_score_are_ranked_by_their_loss(images):
    # Sums of weights round differently before and after the first epoch.
    odd = np.arange(40) % 2 == 1
    trainer = make_trainer(
        make_dataset(images, odd),
        make_dataset(images, odd),
        patience=9,
        lr=1e-5,
        freeze_batch_norm=True,
    )
    targets = EncodedTargets(TARGET, np.arange(40), Y, SAMPLE_WEIGHT)
    trainer.record_initial_epoch(compute_features(trainer, images), targets, odd)
    trainer.run()
    rows = trainer.state.history
    scores = [row["valid_score"] for row in rows]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-6)
    assert 0 < scores[0] < 1
    assert np.argmin([row["valid_loss"] for row in rows]) == 3
    assert trainer.state.best_epoch == 3


def compute_features(trainer, images):
    x = next(iter(make_dataset(images).batches(range(40), 1)))[0]
    with torch.inference_mode():
        x = Normalization(BACKBONE.preprocessing)(x)
        return trainer.network.eval()[:-1](x).numpy()


class RecordStages(Callback):
    states = []  # noqa: RUF012  (shared by all copies)

    def on_epoch_end(self, net, **rest):
        network = net.module_.partially_frozen.network
        self.states.append(copy.deepcopy(dict(network.named_children())))


@pytest.mark.parametrize(
    ("trainable", "n_trainable"), [("all", [0, 0, 1, 1, 2, 2]), (1, [0, 0, 1, 1, 1, 1])]
)
def test_unfreeze_every(images, trainable, n_trainable):
    RecordStages.states.clear()
    fitted = make_classifier(
        trainable=trainable, unfreeze_every=2, max_epochs=6, callbacks=[RecordStages()]
    ).fit(images, Y)
    rows = [row for row in fitted.history_ if row["epoch"] > 0]
    assert [row["n_trainable_stages"] for row in rows] == n_trainable
    for epoch in range(1, 6):
        before, after = RecordStages.states[epoch - 1 : epoch + 1]
        for name, depth in (("stage1", 1), ("stem", 2)):
            changed = not equal_bits(before[name], after[name])
            assert changed == (n_trainable[epoch] >= depth)


def test_only_the_head_has_gradients_if_only_the_head_is_trained(images):
    trainer = make_trainer(make_dataset(images), n_trainable_stages=0, max_epochs=1)
    with_gradient = []
    trainer.net.optimizer_.register_step_post_hook(
        lambda *rest: with_gradient.extend(
            name
            for name, parameter in trainer.network.named_parameters()
            if parameter.grad is not None
        )
    )
    trainer.run()
    assert with_gradient == ["head.1.weight", "head.1.bias"] * 3


def global_state():
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


def random_rotation(image):
    """Draw from the global generators of Python, NumPy and torch."""
    shift = random.randrange(3) + int(check_random_state(None).randint(3))
    return image.rotate(90 * (shift + int(torch.randint(4, ()))))


class RaiseInSecondEpoch(Callback):
    def __init__(self, error):
        self.error = error

    def on_batch_end(self, net, **rest):
        if len(net.history) == 2:
            raise self.error


@pytest.mark.filterwarnings("ignore:precision='bfloat16' is slow")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("error", [None, OSError("a"), KeyboardInterrupt()])
def test_global_state_does_not_change(images, error, precision):
    estimator = make_classifier(
        augmentation=random_rotation,
        dropout=0.5,
        early_stopping=True,
        precision=precision,
        callbacks=[RaiseInSecondEpoch(error)] if error else None,
    )
    before = global_state()
    if error is None:
        estimator.fit(images, Y)
    else:
        with pytest.raises(type(error)):
            estimator.fit(images, Y)
    assert global_state() == before


OPTIONS = {"dropout": 0.3, "augmentation": random_rotation, "early_stopping": True}


def test_equal_random_state_gives_equal_bits(images):
    first = make_classifier(**OPTIONS).fit(images, Y)
    random.random()
    torch.rand(1)
    second = clone(first).fit(images, Y)
    assert equal_bits(first.module_, second.module_)
    assert first.history_ == second.history_
    third = clone(first).set_params(n_jobs=4).fit(images, Y)
    assert equal_bits(first.module_, third.module_)


def test_fits_in_threads_give_equal_bits(images):
    before = global_state()
    expected = make_classifier(**OPTIONS).fit(images, Y).module_
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(
            lambda _: make_classifier(**OPTIONS).fit(images, Y), range(3)
        ):
            assert equal_bits(got.module_, expected)
    assert global_state() == before


@pytest.mark.parametrize(
    "weights", [None, pytest.param("DEFAULT", marks=pytest.mark.slow)]
)
def test_random_state_of_each_type(images, weights):
    backbone = "tiny" if weights is None else "five stages"
    estimator = make_classifier(backbone, weights=weights, trainable=1, max_epochs=1)

    def fit(random_state):
        # Not of a clone, which would have a copy of the state.
        return estimator.set_params(random_state=random_state).fit(images, Y).module_

    state = np.random.RandomState(5)
    first, second = fit(state), fit(state)
    assert equal_bits(fit(np.random.RandomState(5)), first)
    assert equal_bits(fit(5), first)
    assert equal_bits(fit(np.int64(5)), first)
    assert not equal_bits(second, first)
    assert not equal_bits(fit(6), first)
    assert not equal_bits(fit(None), fit(None))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fit_where_gradients_are_disabled(images, mode):
    expected = make_classifier().fit(images, Y)
    with mode():
        got = make_classifier().fit(images, Y)
    assert equal_bits(got.module_, expected.module_)
    assert not any(p.is_inference() for p in got.module_.parameters())


def test_copies_predict_equal_bits(images, tmp_path):
    fitted = make_classifier("five stages", weights="DEFAULT", max_epochs=1)
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
        each.set_params(warm_start=True).fit(images, Y)  # training can continue


def test_pickle_contains_no_optimizer(images):
    options = {"weights": "DEFAULT", "max_epochs": 1, "image_size": 24}
    fitted = make_classifier("resnet_mini", **options).fit(images[::5], Y[::5])
    n_bytes = sum(v.nbytes for v in fitted.module_.state_dict().values())
    content = pickle.dumps(fitted)
    assert n_bytes < len(content) < n_bytes + 100_000
    for word in (b"exp_avg", b"torch.optim", b"skorch"):
        assert word not in content


def test_memory_of_training_is_released(images):
    fitted = make_classifier(early_stopping=True).fit(images, Y)
    for network in (fitted.net_.module_, fitted.module_):
        assert all(p.grad is None for p in network.parameters())
    assert fitted.net_.train_split is None
    assert len(fitted.net_.history) == fitted.n_iter_


def test_weights_that_are_not_finite_after_the_last_step(images):
    trainer = make_trainer(make_dataset(images), max_epochs=1)

    def break_weights(*rest):
        if len(trainer.net.history[-1]["batches"]) == 3:  # the last step
            trainer.network.head[-1].weight.data.fill_(math.inf)

    trainer.net.optimizer_.register_step_post_hook(break_weights)
    with pytest.raises(
        ValueError, match=r"weights must be finite.* in epoch 1 .*Reduce"
    ):
        trainer.run()
    assert not trainer.state.history
    assert trainer.diverged


def test_outputs_are_those_of_the_network(images):
    trainer = make_trainer(make_dataset(images), n_trainable_stages=1)
    trainer.run()
    assert not trainer.diverged
    rows = np.array([30, 2, 17, 5])
    got = trainer.outputs(make_dataset(images, rows))
    with torch.inference_mode():
        expected = trainer.network(normalized(images[rows], BACKBONE.preprocessing))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_copied_weights_do_not_change_with_the_network(images):
    trainer = make_trainer(make_dataset(images))
    copied = trainer.copy_weights()
    expected = copy.deepcopy(copied)
    trainer.run()
    assert copied.keys() == trainer.network.state_dict().keys()
    assert all(torch.equal(copied[name], expected[name]) for name in copied)
    assert not torch.equal(copied["head.1.weight"], trainer.network.head[-1].weight)


def test_out_of_memory(images):
    error = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(MemoryError, match=r"16 images.*Reduce batch_size"):
        make_classifier(callbacks=[RaiseInSecondEpoch(error)]).fit(images, Y)
    with pytest.raises(RuntimeError, match="something else"):
        make_classifier(
            callbacks=[RaiseInSecondEpoch(RuntimeError("something else"))]
        ).fit(images, Y)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_no_output_without_verbose(images, capfd, early_stopping):
    estimator = make_classifier(early_stopping=early_stopping, augmentation="trivial")
    estimator.fit(images, Y).predict(images)
    assert capfd.readouterr() == ("", "")


def test_load_state_continues_with_equal_bits(images):
    expected = make_trainer(make_dataset(images))
    states = []

    def copy_state(trainer):
        optimizer = copy.deepcopy(trainer.net.optimizer_.state_dict()["state"])
        weights = copy.deepcopy(trainer.network.state_dict())
        states.append((weights, copy.deepcopy(trainer.state), optimizer))

    expected.run(copy_state)
    weights, state, optimizer = states[1]  # after two of three epochs
    trainer = make_trainer(make_dataset(images))
    trainer.load_state(weights, state, optimizer)
    trainer.run()
    assert equal_bits(trainer.network, expected.network)
    assert trainer.state.history == expected.state.history


def test_load_state_of_another_network(images):
    trainer = make_trainer(make_dataset(images))
    weights = {**trainer.network.state_dict(), "head.1.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match="its weights belong to another network"):
        trainer.load_state(weights, trainer.state, {})


def test_continue_optimizer_with_fewer_trainable_stages(images):
    previous = make_trainer(make_dataset(images))
    previous.run()
    trainer = make_trainer(make_dataset(images), n_trainable_stages=1)
    trainer.continue_optimizer(previous.net.optimizer_)
    state = trainer.net.optimizer_.state_dict()["state"]
    expected = previous.net.optimizer_.state_dict()["state"]
    assert 0 < len(state) < len(expected)
    for number, values in state.items():
        assert values.keys() == expected[number].keys()
        for key, value in values.items():
            assert torch.equal(value, expected[number][key])
    another = make_trainer(make_dataset(images), optimizer="sgd")
    another.continue_optimizer(previous.net.optimizer_)
    assert another.net.optimizer_.state_dict()["state"] == {}
