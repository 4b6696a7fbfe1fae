"""Tests of the skorch net that runs the steps of a training."""

from dataclasses import replace

import torch
from skorch.callbacks import Callback
from trainer_helpers import BACKBONE, CONFIG, TARGET, make_dataset

from sktl._backbones.new_head import replace_head
from sktl._training.skorch_net import make_net


def test_net_has_the_settings(images, capsys):
    network = replace_head(BACKBONE, 2)
    config = replace(CONFIG, optimizer="sgd", lr=0.3, n_trainable_stages=0)
    train, valid = make_dataset(images, slice(30)), make_dataset(images, slice(30, 40))
    callback = Callback()
    net = make_net(network, network, TARGET, config, valid, [("mine", callback)])
    assert dict(net.callbacks_)["mine"] is callback
    trained = [p for group in net.optimizer_.param_groups for p in group["params"]]
    head = list(network[-1].parameters())
    assert {id(p) for p in trained} == {id(p) for p in head}
    assert isinstance(net.optimizer_, torch.optim.SGD)
    assert net.optimizer_.param_groups[0]["lr"] == 0.3
    assert net.get_split_datasets(train) == (train, valid)
    assert [len(y) for _, (y, _) in net.get_iterator(train, training=True)] == [15, 15]
    assert capsys.readouterr().out == ""
    alone = make_net(network, network, TARGET, config, None, [])
    assert alone.train_split is None
