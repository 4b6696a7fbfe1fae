"""Tests of the views of a net as an estimator."""

import pickle

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.base import is_classifier
from sklearn.metrics import accuracy_score, check_scoring, roc_auc_score
from trainer_helpers import Y, make_dataset, make_trainer

from sktl._training.multiclass import MulticlassTarget
from sktl._training.scoring_net import ClassifierNet

LABELS = np.array(["bird", "cat"])


@pytest.fixture
def trained(images):
    """Return the network and the view of its net, after a short training."""
    trainer = make_trainer(make_dataset(images), max_epochs=1)
    trainer.run()
    return trainer, ClassifierNet(trainer.net, MulticlassTarget(LABELS))


def expected_proba(trainer, x):
    with torch.inference_mode():
        return softmax(trainer.net.module_.eval()(x).numpy(), axis=1)


def test_predictions_for_a_dataset_and_for_pixels(images, trained):
    trainer, net = trained
    dataset = make_dataset(images)
    (batch,) = dataset.batches(range(40), 1)
    expected = expected_proba(trainer, batch[0])
    for X in (dataset, batch[0], batch[0].numpy()):
        np.testing.assert_allclose(net.predict_proba(X), expected, atol=1e-6)
        assert net.predict(X).tolist() == LABELS[expected.argmax(axis=1)].tolist()


def test_scorers_of_scikit_learn(images, trained):
    trainer, net = trained
    dataset = make_dataset(images)
    proba = expected_proba(trainer, next(dataset.batches(range(40), 1))[0])
    assert is_classifier(net)
    y = LABELS[Y]
    accuracy = accuracy_score(y, LABELS[proba.argmax(axis=1)])
    assert check_scoring(net)(net, dataset, y) == accuracy
    assert check_scoring(net, "accuracy")(net, dataset, y) == accuracy
    got = check_scoring(net, "roc_auc")(net, dataset, y)
    assert got == pytest.approx(roc_auc_score(y, proba[:, 1]))


def test_other_attributes_are_those_of_the_net(trained):
    trainer, net = trained
    net.lr = 0.5
    assert trainer.net.lr == net.lr == 0.5
    assert net.history is trainer.net.history
    assert (net.verbose, trainer.net.verbose) == (1, 0)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = net.no_such_name


def test_pickle():
    net = pickle.loads(pickle.dumps(ClassifierNet({"a": 1}, MulticlassTarget(LABELS))))
    assert dict(net.items()) == {"a": 1}
    assert net.classes_.tolist() == LABELS.tolist()
