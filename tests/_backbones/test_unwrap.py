"""Tests of sktl._backbones.unwrap."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from sktl._backbones.stages import describe_network, find_head
from sktl._backbones.unwrap import (
    describe_mismatch,
    fill_missing_head,
    find_state_dicts,
    select_state_dict,
)


class Net(nn.Module):
    """A network with the names of a ResNet."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.layer1 = nn.Sequential(nn.Conv2d(4, 6, 1))
            self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.layer1(self.bn1(self.conv1(x))).mean((2, 3)))


NETWORK = Net()
FULL = dict(NETWORK.state_dict())
BODY = {name: value for name, value in FULL.items() if not name.startswith("fc.")}
HEAD = ("fc.bias", "fc.weight")
OTHER = {name: value + 1 for name, value in BODY.items()}
MLP = {f"{n}.weight": torch.zeros(6, 6) for n in ("0", "2")}


def under(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def select(content, network=NETWORK, adapt=lambda network, state: state):
    head = find_head(network, describe_network(network))
    return select_state_dict(find_state_dicts(content), network, head, adapt, "It")


WITH_HEAD = {
    "plain": FULL,
    "nested": {"state_dict": FULL, "epoch": 3, "optimizer": {"state": {}}},
    "nested twice": {"model": {"model_state_dict": FULL}},
    "beside numbers": {**FULL, "epoch": 3, "args": {"lr": 0.1}, 3: torch.zeros(1)},
    "DataParallel": nn.DataParallel(NETWORK).state_dict(),
    "AveragedModel": torch.optim.swa_utils.AveragedModel(NETWORK).state_dict(),
    "compiled": under("_orig_mod.", FULL),
    "compiled, then DDP": {"state_dict": under("module._orig_mod.", FULL)},
    "DDP, then compiled": {"state_dict": under("_orig_mod.module.", FULL)},
    "Lightning": {"state_dict": under("model.", FULL), "global_step": 3},
    "repeated": under("module.module.model.backbone.", FULL),
    "SupCon": {"model": under("encoder.module.", FULL) | under("head.", MLP)},
    "twice the same": {"state_dict": FULL, "model": under("module.", FULL)},
    "with another network": {"model": under("encoder.", FULL), "net": MLP},
    "without counters": {n: v for n, v in FULL.items() if "num_batches" not in n},
}
WITHOUT_HEAD = {
    "body": BODY,
    "MoCo": {
        "state_dict": under("module.encoder_q.", {**BODY, **under("fc.", MLP)})
        | under("module.encoder_k.", {**BODY, **under("fc.", MLP)})
        | {"module.queue": torch.zeros(3)},
    },
    "linear projection of MoCo": under(
        "module.encoder_q.", {**BODY, "fc.0.weight": MLP["0.weight"], **FULL}
    ),
    "SimSiam": under("module.encoder.", {**BODY, **under("fc.", MLP)})
    | under("module.predictor.", MLP),
    "SwAV": under("module.", BODY)
    | under("module.projection_head.", MLP)
    | {"module.prototypes.weight": torch.zeros(9, 6)},
    "Barlow Twins": {
        "model": under("module.backbone.", BODY) | under("module.projector.", MLP)
    },
    "teacher of DINO": {"teacher": under("backbone.", BODY) | under("head.", MLP)},
    "mmpretrain": {"state_dict": under("backbone.", BODY) | under("head.fc.", MLP)},
}


@pytest.mark.parametrize("name", WITH_HEAD)
def test_everything_around_a_state_dict_is_removed(name):
    selection = select(WITH_HEAD[name])
    assert selection.state_dict.keys() ^ FULL.keys() == (
        {"bn1.num_batches_tracked"} if name == "without counters" else set()
    )
    assert all(torch.equal(v, FULL[n]) for n, v in selection.state_dict.items())
    assert selection.missing_head == ()
    is_plain = name in ("plain", "beside numbers", "without counters")
    assert (selection.removed == "") == is_plain


@pytest.mark.parametrize("name", WITHOUT_HEAD)
def test_a_head_that_is_missing_or_another_one(name):
    selection = select(WITHOUT_HEAD[name])
    assert selection.state_dict.keys() == BODY.keys()
    assert all(torch.equal(selection.state_dict[n], v) for n, v in BODY.items())
    assert selection.missing_head == HEAD
    assert "the head is missing (fc.bias, fc.weight)" in selection.removed

    network = Net(seed=1)
    fill_missing_head(selection.state_dict, network, selection.missing_head)
    network.load_state_dict(selection.state_dict)
    assert network.fc.bias.isnan().all()


def test_what_is_removed_is_described():
    removed = select({"state_dict": WITHOUT_HEAD["SimSiam"]}).removed
    assert removed == (
        "read ['state_dict']; removed the prefix 'module.encoder.' and 2 tensors "
        "without it; ignored 2 tensors of another head (fc.0.weight, fc.2.weight); the "
        "head is missing (fc.bias, fc.weight)"
    )


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (
            {"teacher": under("backbone.", BODY), "student": OTHER},
            r"prefix 'backbone.' in \['teacher'\], and .* without .* \['student'\]",
        ),
        (
            under("student.", BODY) | under("teacher.", OTHER),
            "prefix '(student|teacher)[.]', and .* prefix '(student|teacher)[.]'",
        ),
        ({**FULL, **under("module.", Net(1).state_dict())}, "'module.'"),
    ],
)
def test_several_that_fit_and_differ_raise(content, names):
    with pytest.raises(ValueError, match=f"It have several that differ.*{names}"):
        select(content)


def test_what_does_not_fit_is_left_to_be_reported():
    other = {"conv1.weight": FULL["conv1.weight"], "layer9.weight": torch.zeros(1)}
    selection = select({"state_dict": under("module.", other)})
    assert selection.state_dict.keys() == other.keys()
    assert (selection.missing_head, selection.removed) == ((), "")
    # A body with more layers than the network is that of another network.
    assert "layer9.weight" in select({**FULL, **other}).state_dict


def test_a_bias_alone_is_not_a_missing_head():
    state = {n: v for n, v in FULL.items() if n != "fc.bias"}
    assert select(state).missing_head == ()
    assert "fc.bias" not in select(state).state_dict


def test_names_of_the_network_are_no_prefix():
    network = nn.ModuleDict({"model": NETWORK})
    state = network.state_dict()
    assert select(state, network).state_dict.keys() == state.keys()
    doubled = select(under("model.", state), network)
    assert doubled.state_dict.keys() == state.keys()
    assert find_head(network, describe_network(network)).name == "model.fc"


def test_names_are_adapted_before_they_are_compared():
    old = {name.replace("conv1", "old"): value for name, value in FULL.items()}

    def adapt(network, state):
        return {name.replace("old", "conv1"): value for name, value in state.items()}

    assert select(under("module.", old), adapt=adapt).state_dict.keys() == FULL.keys()


def test_versions_of_layers_are_kept():
    state = NETWORK.state_dict()
    (found,) = find_state_dicts({"model": state}).values()
    assert found._metadata["bn1"] == {"version": 2}
    assert select({"model": state}).state_dict._metadata["bn1"] == {"version": 2}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"epoch": 3},
        [torch.zeros(1)],
        {0: torch.zeros(1)},
        {"a": torch.zeros(1, device="meta"), "b": torch.zeros(1).to_sparse()},
        {"optimizer": {"a": torch.zeros(1)}},
        {"model": {"model": {"model": {"model": {"a": torch.zeros(1)}}}}},
    ],
)
def test_content_without_a_state_dict(content):
    assert find_state_dicts(content) == {}


def test_a_dict_that_contains_itself():
    content = OrderedDict(FULL)
    content["model"] = content
    assert len(find_state_dicts(content)) == 1


def test_one_dict_under_many_keys_is_read_once():
    shared = {"state_dict": FULL, "model": FULL, "teacher": FULL}
    content = {"net": shared, "student": shared, "model": shared}
    assert list(find_state_dicts(content)) == ["['model']['state_dict']"]


def test_expanded_tensors_are_not_compared():
    large = {**FULL, "fc.weight": torch.zeros(1).expand(2**40)}
    with pytest.raises(ValueError, match="several that differ"):
        select({"model": large, "net": {**large}})


def test_many_prefixes_take_no_time():
    parts = ["module", "model", "net", "backbone", "encoder"]
    names = [f"{a}.{b}.{c}.{d}.x" for a in parts for b in parts for c in parts
             for d in parts]  # fmt: skip
    state = dict.fromkeys(names, torch.zeros(1)) | FULL
    assert set(FULL) <= select(state).state_dict.keys()


def test_a_mismatch_shows_few_names_of_each_kind():
    assert describe_mismatch([], [], []) == ""
    assert describe_mismatch("abcd", "e", ["f: (1,), not (2,)"]) == (
        "4 missing (a, b, c, ...), 1 unexpected (e), "
        "1 of another shape (f: (1,), not (2,))"
    )
