"""Tests of regression targets: encoding, loss, score, documents."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from torch import nn

from sktl._training.multiclass import MulticlassTarget
from sktl._training.regression import (
    LOSSES,
    RegressionTarget,
    WeightedRegressionLoss,
    encode_regression,
    regression_from_document,
    standardization,
)

ROBUST = LOSSES[1:]


def encode(y, sample_weight=None, loss="squared_error", previous=None, n_samples=None):
    return encode_regression(
        len(y) if n_samples is None else n_samples,
        y,
        sample_weight,
        loss=loss,
        previous=previous,
        estimator=Ridge(),
    )


def target_of(center, scale, ndim=2, loss="squared_error"):
    return RegressionTarget(np.array(center), np.array(scale), ndim, loss)


Y = np.random.default_rng(0).normal([5, -300], [0.1, 40], size=(30, 2))


@pytest.mark.parametrize("weighted", [False, True])
def test_encoded_targets_are_standardized(weighted):
    weight = np.arange(30) if weighted else None
    targets = encode(Y, weight)
    assert targets.y.dtype == np.float32
    used = np.ones(30) if weight is None else weight
    np.testing.assert_array_equal(targets.rows, np.flatnonzero(used))
    mean = np.average(targets.y, axis=0, weights=used[targets.rows])
    variance = np.average(targets.y**2, axis=0, weights=used[targets.rows])
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    np.testing.assert_allclose(variance, 1, rtol=1e-6)
    decoded = targets.target.decode(targets.y)
    np.testing.assert_allclose(decoded, Y[targets.rows], rtol=1e-6)


@pytest.mark.parametrize("loss", ROBUST)
def test_an_outlier_does_not_change_the_scale_of_robust_losses(loss):
    y = np.random.default_rng(0).normal(7, 3, size=2001)
    center, scale = standardization(y, np.ones(2001), loss)
    assert center == np.median(y)
    assert scale == pytest.approx(3, rel=0.05)
    y[0] = 1e6
    got = standardization(y, np.ones(2001), loss)
    np.testing.assert_allclose(got, (center, scale), rtol=1e-2)
    mostly_zero = np.array([0.0] * 8 + [1.0, 3.0])
    assert standardization(mostly_zero, np.ones(10), loss) == (0, pytest.approx(0.4))


@pytest.mark.parametrize("loss", ROBUST)
def test_weight_2_is_two_samples_in_the_median(loss):
    y, weight = np.array([1.0, 2.0, 5.0, 9.0]), np.array([1, 1, 3, 1])
    got = standardization(y, weight, loss)
    assert got == standardization(np.repeat(y, weight), np.ones(6), loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [0.1, 1e9, -3.0])
def test_constant_targets_are_decoded_exactly(loss, value):
    targets = encode(np.full(7, value), loss=loss)
    assert not targets.y.any()
    assert targets.target.scale.tolist() == [1]
    assert targets.target.decode(np.zeros((2, 1), "f4")).tolist() == [value, value]


@pytest.mark.parametrize(("shape", "ndim"), [((4,), 1), ((4, 1), 2), ((4, 3), 2)])
def test_predictions_have_the_dimensions_of_y(shape, ndim):
    y = np.arange(np.prod(shape)).reshape(shape)
    targets = encode(y)
    assert targets.target.ndim == ndim
    assert targets.y.shape == (4, targets.target.n_outputs)
    decoded = targets.target.decode(targets.y)
    assert decoded.shape == shape
    assert decoded.dtype == np.float64
    np.testing.assert_allclose(decoded, y, atol=1e-6)
    np.testing.assert_array_equal(targets.target.labels(targets.y), decoded)


def test_a_training_that_continues_keeps_the_standardization():
    first = encode([1.0, 2.0, 9.0]).target
    later = encode([[100.0], [200.0]], previous=first, loss="huber")
    assert later.target.center == first.center
    assert later.target.scale == first.scale
    assert later.target.loss_name == "huber"
    np.testing.assert_allclose(later.target.decode(later.y), [[100], [200]], rtol=1e-5)
    two = encode(Y, previous=first).target
    with pytest.raises(ValueError, match=r"which had 1 per image\. Got 2"):
        two.check_unchanged(first, "warm_start")


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_equals_that_of_torch(loss):
    generator = torch.Generator().manual_seed(0)
    outputs = 3 * torch.randn(8, 2, generator=generator)
    y = torch.randn(8, 2, generator=generator)
    weight = torch.rand(8, generator=generator)
    criterion = {
        "squared_error": nn.MSELoss(reduction="none"),
        "absolute_error": nn.L1Loss(reduction="none"),
        "huber": nn.HuberLoss(reduction="none", delta=1.345),
    }[loss](outputs, y)
    expected = (criterion.mean(1) * weight).mean()
    got = WeightedRegressionLoss(loss)(outputs, (y, weight))
    torch.testing.assert_close(got, expected)
    losses = target_of([0.0, 0], [1.0, 1], loss=loss).calibrated_losses(
        outputs.numpy(), y.numpy(), weight.numpy()
    )
    assert losses.mean() == pytest.approx(float(expected / weight.mean()), rel=1e-5)


def test_loss_does_not_broadcast():
    y, outputs = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [2.0]])
    assert WeightedRegressionLoss("squared_error")(outputs, (y, torch.ones(2))) == 0
    with pytest.raises(RuntimeError):
        WeightedRegressionLoss("squared_error")(outputs, (y[:1], torch.ones(1)))


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_score_is_r2(n_outputs):
    rng = np.random.default_rng(0)
    y, outputs = rng.normal(size=(2, 20, n_outputs)).astype("f4")
    weight = rng.uniform(0.1, 2, 20)
    target = target_of([0.0] * n_outputs, [1.0] * n_outputs)
    expected = r2_score(y, outputs, sample_weight=weight)
    assert target.score(outputs, y, weight) == pytest.approx(expected)
    y[:, 0] = 4
    expected = r2_score(y, outputs, sample_weight=weight)
    assert target.score(outputs, y, weight) == pytest.approx(expected)
    outputs[:, 0] = 4
    expected = r2_score(y, outputs, sample_weight=weight)
    assert target.score(outputs, y, weight) == pytest.approx(expected)


def test_score_of_one_image_is_defined():
    target = target_of([0.0], [1.0])
    one = np.ones((1, 1), "f4")
    assert target.score(one, one, np.ones(1)) == 1
    assert target.score(one + 1, one, np.ones(1)) == 0


@pytest.mark.parametrize("loss", ROBUST)
def test_ridge_probe_of_robust_losses_ignores_the_size_of_an_outlier(loss):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 3)).astype("f4")
    y = x @ [1, 2, 3] + rng.normal(size=100)
    heads = []
    for outlier in (50, 1e6):
        y[0] = outlier
        targets = encode(y, loss=loss)
        head = nn.Linear(3, 1)
        targets.target.initialize_head(
            head,
            x,
            targets.y,
            np.ones(100),
            groups=None,
            hidden_layer_sizes=(),
            seed=0,
        )
        heads.append(head)
        predicted = targets.target.decode(head(torch.from_numpy(x)).detach().numpy())
        assert r2_score(y[1:], predicted[1:]) > 0.8
    torch.testing.assert_close(heads[0].weight, heads[1].weight)


@pytest.mark.parametrize(
    ("y", "sample_weight", "reason"),
    [
        (None, None, "requires y to be passed"),
        ([1, np.nan, 2], None, r"y\[1\] = nan"),
        (["a", "b", "c"], None, "FineTunedCNNClassifier"),
        ([1, 2], None, r"inconsistent numbers of samples: \[3, 2\]"),
        ([1, 2, 3], [0, 0, 0], "at least one non-zero"),
        ([1, 2, 3], [1, -1, 0], "Negative values"),
        ([-1.7e308, 1.7e308, 1.7e308], None, "y must have a scale"),
    ],
)
def test_invalid_y(y, sample_weight, reason):
    with pytest.raises(ValueError, match=reason):
        encode(y, sample_weight, n_samples=3)


@pytest.mark.parametrize("loss", ROBUST)
def test_a_target_that_float32_cannot_hold_is_named(loss):
    with pytest.raises(ValueError, match=r"y must have a scale\. Got 1e\+20 in row 3"):
        encode([0.0, 1.0, 2.0, 1e20, 3.0], [0, 1, 1, 1, 1], loss=loss)
    encode([0.0, 1.0, 2.0, 1e6, 3.0], loss=loss)


def test_further_targets_are_standardized_alike():
    target = encode([1.0, 2.0, 9.0]).target
    for y in ([4.0, 5.0], [[4], [5]]):
        got = target.encode(y, "y_val", Ridge())
        np.testing.assert_allclose(target.decode(got), [4, 5])
    for y, reason in (
        ([[1, 2]], "y_val must have as many columns as y, 1"),
        ([1, np.nan], r"y_val must be finite numbers\. Got y_val\[1\] = nan"),
        (["a"], "numbers as y_val"),
        ([1e30], "y_val must have a scale"),
    ):
        with pytest.raises(ValueError, match=reason):
            target.encode(y, "y_val", Ridge())


def test_kinds_of_targets_do_not_mix():
    classes, number = MulticlassTarget(np.arange(2)), encode(Y[:, :1]).target
    for target, previous in ((classes, number), (number, classes)):
        with pytest.raises(ValueError, match="of the kind of the first fit"):
            target.check_unchanged(previous, "warm_start")


@pytest.mark.parametrize("y", [[0.1, 0.3], [[0.1], [1 / 3]], Y])
def test_document_round_trip(y):
    target = encode(y).target
    document = json.loads(json.dumps(target.to_document()))
    loaded = regression_from_document(document)
    assert loaded.center.tolist() == target.center.tolist()
    assert loaded.scale.tolist() == target.scale.tolist()
    assert loaded.ndim == target.ndim
    assert loaded.fingerprint() == target.fingerprint()


DOCUMENT = {
    "kind": "regression",
    "n_outputs": 1,
    "ndim": 1,
    "center": [0.5],
    "scale": [2.0],
}


@pytest.mark.parametrize(
    "change",
    [
        {"n_outputs": 2},
        {"n_outputs": 0, "center": [], "scale": []},
        {"n_outputs": True},
        {"ndim": 3},
        {"ndim": 1, "n_outputs": 2, "center": [0.0, 1.0], "scale": [1.0, 1.0]},
        {"center": ["a"]},
        {"center": [float("nan")]},
        {"center": 0.5},
        {"scale": [0.0]},
        {"scale": [-1.0]},
        {"scale": [float("inf")]},
        {"scale": None},
    ],
)
def test_invalid_document(change):
    with pytest.raises(ValueError, match="its "):
        regression_from_document({**DOCUMENT, **change})
