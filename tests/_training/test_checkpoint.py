"""A checkpoint is of one run, whole, and nothing in it is executed."""

import builtins
import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from skorch.callbacks import Callback

import sktl._training.checkpoint
from sktl import FineTunedCNNClassifier
from sktl._training.checkpoint import checkpoint_seed
from sktl._utils.tensor_file import read_tensors, write_tensors

Y = np.repeat([0, 1], 20)


class StopAt(Callback):
    """Raise KeyboardInterrupt in the first batch after so many epochs."""

    def __init__(self, n_epochs):
        self.left = n_epochs

    def on_epoch_end(self, net, **rest):
        self.left -= 1

    def on_batch_begin(self, net, **rest):
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def mine(tmp_path):
    return FineTunedCNNClassifier(
        "tiny",
        weights=None,
        max_epochs=4,
        batch_size=16,
        lr=0.01,
        checkpoint=tmp_path,
        random_state=0,
    )


@pytest.fixture
def file(tmp_path):
    return tmp_path / "fine_tuning.safetensors"


def interrupt(estimator, X, y, n_epochs=2, **more):
    callbacks = estimator.callbacks
    with pytest.raises(KeyboardInterrupt):
        estimator.set_params(callbacks=[StopAt(n_epochs)]).fit(X, y, **more)
    estimator.set_params(callbacks=callbacks)


def check_same(one, other):
    state = other.module_.state_dict()
    for name, value in one.module_.state_dict().items():
        assert torch.equal(value, state[name])
    assert one.history_ == other.history_
    assert one.best_epoch_ == other.best_epoch_


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("n_epochs", [1, 3])
def test_it_goes_on_with_the_bits_it_would_have_had(images, mine, optimizer, n_epochs):
    mine.set_params(optimizer=optimizer, dropout=0.3, early_stopping=True)
    expected = clone(mine).set_params(checkpoint=None).fit(images, Y)
    interrupt(mine, images, Y, n_epochs)
    check_same(mine.fit(images, Y), expected)


def test_what_has_no_effect_may_change(images, mine, tmp_path):
    expected = clone(mine).set_params(checkpoint=None).fit(images, Y)
    interrupt(mine, images, Y)
    os.rename(tmp_path, elsewhere := f"{tmp_path} moved")
    mine.set_params(
        checkpoint=elsewhere,
        n_jobs=2,
        verbose=1,
        memory=tmp_path,
        callbacks=[StopAt(9)],
    )
    check_same(mine.fit(list(images), Y.tolist()), expected)


def test_a_finished_run_is_only_read(images, mine, file, monkeypatch):
    mine.set_params(early_stopping=True, n_iter_no_change=1)
    expected = clone(mine).fit(images, Y)
    before = file.read_bytes()
    monkeypatch.setattr("sktl._training.checkpoint.write_tensors", None)
    check_same(mine.fit(images, Y), expected)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.02},
        {"max_epochs": 5},
        {"dropout": 0.1},
        {"trainable": 1},
        {"optimizer": "sgd"},
        {"hidden_layer_sizes": 4},
        {"augmentation": "flip"},
        {"augmentation": max},
        {"class_weight": {0: 1, 1: 2}},
        {"early_stopping": True},
        {"batch_size": 8},
        {"image_size": 24},
        {"random_state": 1},
        {"precision": "bfloat16"},
        {"head_init": "random"},
    ],
)
def test_t04_other_parameters_are_refused(images, mine, file, change):
    interrupt(mine, images, Y)
    before = file.read_bytes()
    (name,) = change
    with pytest.raises(ValueError, match=rf"{file}.* differs in .*{name} \(there"):
        mine.set_params(**change).fit(images, Y)
    assert file.read_bytes() == before
    with pytest.raises(NotFittedError):
        mine.predict(images)


@pytest.mark.parametrize("what", ["X", "order", "y", "fewer", "weight", "classes"])
def test_t04_other_data_are_refused(images, mine, what):
    interrupt(mine, images, Y)
    X, y, weight = images.copy(), Y.copy(), None
    if what == "X":
        X[7, 3, 5, 1] ^= 1
    elif what == "order":
        X[[2, 3]] = X[[3, 2]]
    elif what == "y":
        y[[2, 25]] = y[[25, 2]]
    elif what == "fewer":
        X, y = X[1:], y[1:]
    elif what == "weight":
        weight = np.r_[2.0, np.ones(39)]
    else:
        y = y + 3
    named = {"order": "X", "fewer": "X", "weight": "weights of samples"}.get(what, what)
    with pytest.raises(ValueError, match=rf"must be of this very run.* {named}"):
        mine.fit(X, y, sample_weight=weight)


def test_t04_what_differs_is_all_that_is_named(images, mine):
    interrupt(mine, images, Y)
    with pytest.raises(ValueError, match="differs in") as refused:
        mine.set_params(lr=0.5).fit(images, Y)
    assert "differs in lr (there 0.01, here 0.5). Use" in str(refused.value)


def test_t04_other_weights_are_refused(images, tmp_path, mine):
    for name in "ab":
        mine.set_params(checkpoint=None, max_epochs=0, random_state=ord(name))
        module = mine.fit(images, Y).module_
        state = {
            f"stages.{k}": v.contiguous() for k, v in module[:-2].state_dict().items()
        }
        state |= {"head.2.weight": torch.ones(5, 16), "head.2.bias": torch.ones(5)}
        safetensors.torch.save_file(state, tmp_path / f"{name}.safetensors")
    mine.set_params(
        max_epochs=4, checkpoint=tmp_path, weights=tmp_path / "a.safetensors"
    )
    interrupt(mine, images, Y)
    mine.set_params(weights=tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="differs in digest of weights"):
        mine.fit(images, Y)
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    mine.set_params(weights=tmp_path / "c.safetensors").fit(images, Y)


def test_t04_another_torch_is_refused(images, mine, monkeypatch):
    interrupt(mine, images, Y)
    monkeypatch.setattr("torch.__version__", "99.0.0+cpu")
    with pytest.raises(ValueError, match=r"differs in torch \(there"):
        mine.fit(images, Y)


class Turning:
    """An augmentation whose text has the place in memory where it is."""

    def __call__(self, image):
        return image.rotate(90)


def test_the_place_of_a_function_in_memory_does_not_matter(images, mine):
    expected = clone(mine).set_params(checkpoint=None, augmentation=Turning())
    expected.fit(images, Y)
    first = Turning()
    interrupt(mine.set_params(augmentation=first), images, Y)
    second = Turning()
    assert str(first) != str(second)
    check_same(mine.set_params(augmentation=second).fit(images, Y), expected)


class Malicious:
    # What a pickle runs when it is read.
    def __reduce__(self):  # noqa: D105
        return exec, ("import builtins; builtins.sktl_was_attacked = True",)


def damaged(content, how):
    if how == "empty":
        return b""
    if how == "text":
        return b"not a checkpoint"
    if how == "pickle":
        return pickle.dumps(Malicious())
    if how == "json":
        header = b'{"__metadata__":{"sktl":"' + b"[" * 9000 + b'","sha256":"0"}}'
        return len(header).to_bytes(8, "little") + header
    content = bytearray(content)
    if how.startswith("cut"):
        return content[: int(len(content) * float(how.split()[1]))]
    if how == "longer":
        return content + b"\0"
    content[int((len(content) - 1) * float(how.split()[1]))] ^= 4
    return content


DAMAGES = ["empty", "text", "pickle", "json", "longer", "cut 0.01", "cut 0.5"]
DAMAGES += [f"flip {where:.2f}" for where in np.linspace(0, 1, 15)]


@pytest.mark.parametrize("how", DAMAGES)
def test_t05_a_damaged_file_is_named_and_refused(images, mine, file, how):
    interrupt(mine, images, Y)
    file.write_bytes(damaged(file.read_bytes(), how))
    with pytest.raises(ValueError, match=rf"{file}.*(must be|differs)"):
        mine.fit(images, Y)
    assert not hasattr(builtins, "sktl_was_attacked")
    with pytest.raises(NotFittedError):
        mine.predict(images)
    file.unlink()
    mine.fit(images, Y)


def test_t05_a_pickle_of_torch_is_not_executed(images, mine, file):
    interrupt(mine, images, Y)
    torch.save({"weights": Malicious()}, file)
    with pytest.raises(ValueError, match=f"{file}.*Nothing in it was executed"):
        mine.fit(images, Y)
    assert not hasattr(builtins, "sktl_was_attacked")


def test_t05_a_saved_classifier_is_no_checkpoint(images, mine, file):
    clone(mine).set_params(checkpoint=None).fit(images, Y).save(file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"{file}.* must be of the format"):
        mine.fit(images, Y)
    assert file.read_bytes() == before


PARSE_ERRORS = {
    "epoch": [None, "x", float("inf"), -1, 10**9, 10**400],
    "best_epoch": [float("nan"), -1, 10**9],
    "best_score": [None, "x"],
    "seed": [None, "x", -1, 2**31, 2**80, True, 0.5],
    "history": [None, "x", [{}], [{"epoch": 1}], [[1]], {"a": 1}],
    "identity": [None, "x"],
}


@pytest.mark.parametrize(
    ("part", "value"), [(part, v) for part in PARSE_ERRORS for v in PARSE_ERRORS[part]]
)
def test_t05_a_document_that_makes_no_sense(images, mine, file, part, value):
    interrupt(mine, images, Y)
    tensors, document = read_tensors(file)
    write_tensors(file, tensors, {**document, part: value})
    with pytest.raises(ValueError, match=f"{file}"):
        mine.fit(images, Y)


@pytest.mark.parametrize("part", ["best", "start"])
def test_t05_other_weights_that_do_not_fit(images, mine, file, part):
    interrupt(mine, images, Y)
    tensors, document = read_tensors(file)
    tensors[f"{part}.head.0.bias"] = torch.zeros(7)
    write_tensors(file, tensors, document)
    with pytest.raises(ValueError, match=f"{file}.*of another network"):
        mine.fit(images, Y)


@pytest.mark.parametrize("how", ["missing", "shape", "name", "state"])
def test_t05_tensors_that_do_not_fit(images, mine, file, how):
    interrupt(mine, images, Y)
    tensors, document = read_tensors(file)
    if how == "missing":
        del tensors["weights.head.0.bias"]
    elif how == "shape":
        tensors["weights.head.0.bias"] = torch.zeros(7)
    elif how == "name":
        tensors["optimizer.exp_avg"] = torch.zeros(7)
    else:
        tensors["optimizer.99.exp_avg"] = torch.zeros(7)
    write_tensors(file, tensors, document)
    with pytest.raises(ValueError, match=f"{file}"):
        mine.fit(images, Y)


class FullAfter:
    """A disk that is full from the third file on."""

    def __init__(self, n_files):
        self.left = n_files
        self.fsync = os.fsync

    def __call__(self, descriptor):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.fsync(descriptor)


def test_t03_a_full_disk_warns_and_leaves_what_was_there(
    images, mine, file, monkeypatch
):
    expected = clone(mine).set_params(checkpoint=None).fit(images, Y)
    monkeypatch.setattr(os, "fsync", FullAfter(2))
    with pytest.warns(UserWarning, match=f"{file}.*after epoch .*No space") as warned:
        mine.fit(images, Y)
    assert [str(w.message).split(":")[0].split()[-1] for w in warned] == ["3", "4"]
    assert {w.filename for w in warned} != {sktl._training.checkpoint.__file__}
    check_same(mine, expected)
    assert os.listdir(file.parent) == [file.name]
    assert read_tensors(file)[1]["epoch"] == 2
    monkeypatch.undo()
    check_same(clone(mine).fit(images, Y), expected)


def test_t03_what_a_killed_writer_left_is_removed(images, mine, file, tmp_path):
    interrupt(mine, images, Y)
    half = tmp_path / "fine_tuning-0123456789ab.tmp"
    half.write_bytes(file.read_bytes()[:1000])
    other = tmp_path / "mine.tmp"
    other.touch()
    mine.fit(images, Y)
    assert sorted(tmp_path.iterdir()) == sorted([file, other])


def test_t03_an_interrupt_while_writing_leaves_what_was_there(
    images, mine, file, monkeypatch
):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    interrupt(mine, images, Y)
    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mine.fit(images, Y)
    assert os.listdir(file.parent) == [file.name]
    assert file.read_bytes() == before


def test_the_directory_is_made(images, mine, tmp_path):
    mine.set_params(checkpoint=str(tmp_path / "a" / "b"), max_epochs=1).fit(images, Y)
    assert (tmp_path / "a" / "b" / "fine_tuning.safetensors").exists()


def test_a_file_is_no_directory(images, mine, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"'checkpoint'.*directory.*file'"):
        mine.set_params(checkpoint=tmp_path / "file").fit(images, Y)


def test_tilde_is_expanded(images, mine, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    mine.set_params(checkpoint="~/mine", max_epochs=1).fit(images, Y)
    assert (tmp_path / "mine" / "fine_tuning.safetensors").exists()
    assert checkpoint_seed("~/mine", -1) != -1


def test_an_empty_name_is_none(images, mine):
    with pytest.raises(ValueError, match="'checkpoint' parameter must be the name"):
        mine.set_params(checkpoint="").fit(images, Y)


def test_the_seed_of_what_is_there(images, mine, tmp_path, file):
    assert checkpoint_seed(tmp_path, 5) == 5
    assert checkpoint_seed(tmp_path / "nothing", 5) == 5
    mine.set_params(random_state=None, max_epochs=1).fit(images, Y)
    assert checkpoint_seed(tmp_path, -1) == read_tensors(file)[1]["seed"] >= 0
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=str(file)):
        checkpoint_seed(tmp_path, 5)


@pytest.mark.parametrize("weights", [None, "DEFAULT"])
def test_without_a_random_state_it_goes_on_with_its_seed(
    images, mine, monkeypatch, tmp_path, weights
):
    mine.set_params(random_state=None, weights=weights, early_stopping=True)
    mine.set_params(backbone="tiny" if weights is None else "resnet_mini", trainable=1)
    interrupt(mine, images, Y)
    seed = checkpoint_seed(tmp_path, -1)
    mine.fit(images, Y)
    monkeypatch.setattr(FineTunedCNNClassifier, "_seed", lambda self: seed)
    check_same(mine, clone(mine).set_params(checkpoint=None).fit(images, Y))


def test_the_whole_state_is_in_the_file(images, mine, file):
    mine.set_params(early_stopping=True, n_iter_no_change=2).fit(images, Y)
    tensors, document = read_tensors(file)
    weights = mine.module_.state_dict()
    assert {f"weights.{name}" for name in weights} <= set(tensors)
    best = {n: v for n, v in tensors.items() if n.startswith("best.")}
    assert all(
        torch.equal(v, weights[n.removeprefix("best.")]) for n, v in best.items()
    )
    assert len(best) == len(weights)
    assert document["history"] == mine.history_
    parameters = sum(1 for _ in mine.module_.parameters())
    assert sum(name.endswith(".exp_avg_sq") for name in tensors) == parameters
    assert Path(file).stat().st_size > 3 * sum(v.nbytes for v in weights.values())
