"""Tests of checkpoints: resumed runs, other runs, damaged files, full disks."""

import builtins
import errno
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from interrupted_training import StopAt
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import sktl._training.checkpoint
from sktl import FineTunedCNNClassifier
from sktl._training import trainer
from sktl._training.checkpoint import Checkpoint
from sktl._utils.tensor_file import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

Y = np.repeat([0, 1], 20)


@pytest.fixture
def estimator(tmp_path):
    return FineTunedCNNClassifier(
        "tiny",
        weights=None,
        max_epochs=4,
        batch_size=16,
        lr=0.01,
        head_init="linear_probe",
        lr_schedule="cosine",
        wise_ft_alpha=0.4,
        checkpoint=tmp_path,
        engine="torch",
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


@pytest.fixture(scope="module")
def contents():
    """Return a list for the content of the checkpoint that tests share."""
    return []


@pytest.fixture
def interrupted(images, estimator, file, contents):
    """Write the checkpoint of a run that was interrupted after two epochs."""
    if not contents:
        interrupt(estimator, images, Y)
        contents.append(file.read_bytes())
    file.write_bytes(contents[0])


def assert_equal_fits(one, other):
    weights = other.module_.state_dict()
    for name, value in one.module_.state_dict().items():
        assert torch.equal(value, weights[name])
    assert one.history_ == other.history_
    assert one.best_epoch_ == other.best_epoch_


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("n_epochs", [1, 3])
def test_resumed_run_has_equal_bits(images, estimator, optimizer, n_epochs):
    estimator.set_params(optimizer=optimizer, dropout=0.3, early_stopping=True)
    expected = clone(estimator).set_params(checkpoint=None).fit(images, Y)
    interrupt(estimator, images, Y, n_epochs)
    assert_equal_fits(estimator.fit(images, Y), expected)


def test_parameters_without_effect_may_change(images, estimator, tmp_path):
    expected = clone(estimator).set_params(checkpoint=None).fit(images, Y)
    interrupt(estimator, images, Y)
    os.rename(tmp_path, elsewhere := f"{tmp_path} moved")
    estimator.set_params(
        checkpoint=elsewhere,
        n_jobs=2,
        verbose=1,
        memory=tmp_path,
        callbacks=[StopAt(9)],
    )
    assert_equal_fits(estimator.fit(list(images), Y.tolist()), expected)


def test_completed_run_is_only_read(images, estimator, file, monkeypatch):
    estimator.set_params(early_stopping=True, n_iter_no_change=1)
    expected = clone(estimator).fit(images, Y)
    before = file.read_bytes()
    monkeypatch.setattr("sktl._training.checkpoint.write_tensors", None)
    assert_equal_fits(estimator.fit(images, Y), expected)
    assert file.read_bytes() == before


@pytest.mark.usefixtures("interrupted")
def test_file_is_read_once(images, estimator, file, monkeypatch):
    read = []
    name = "sktl._training.checkpoint.read_tensors"
    monkeypatch.setattr(name, lambda path: read.append(path) or read_tensors(path))
    assert estimator.fit(images, Y).n_iter_ == 4
    assert read == [file]


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
        {"resize": "pad"},
        {"random_state": 1},
        pytest.param(
            {"precision": "bfloat16"},
            marks=pytest.mark.filterwarnings("ignore:precision='bfloat16' is slow"),
        ),
        {"head_init": "random"},
    ],
)
@pytest.mark.usefixtures("interrupted")
def test_other_parameters(images, estimator, file, change):
    before = file.read_bytes()
    (name,) = change
    with pytest.raises(
        ValueError, match=rf"{file}.* differs in .*{name} \(in the file"
    ):
        estimator.set_params(**change).fit(images, Y)
    assert file.read_bytes() == before
    with pytest.raises(NotFittedError):
        estimator.predict(images)


@pytest.mark.parametrize("change", ["X", "order", "y", "fewer", "weight", "classes"])
@pytest.mark.usefixtures("interrupted")
def test_other_data(images, estimator, change):
    X, y, weight = images.copy(), Y.copy(), None
    if change == "X":
        X[7, 3, 5, 1] ^= 1
    elif change == "order":
        X[[2, 3]] = X[[3, 2]]
    elif change == "y":
        y[[2, 25]] = y[[25, 2]]
    elif change == "fewer":
        X, y = X[1:], y[1:]
    elif change == "weight":
        weight = np.r_[2.0, np.ones(39)]
    else:
        y = y + 3
    named = {"order": "X", "fewer": "X", "weight": "sample weights"}
    reason = rf"must belong to this run.* {named.get(change, change)} \(in the file"
    with pytest.raises(ValueError, match=reason):
        estimator.fit(X, y, sample_weight=weight)


def test_the_error_says_how_to_train_for_more_epochs(images, estimator, tmp_path):
    estimator.fit(images, Y)
    with pytest.raises(ValueError, match=r"load the estimator .* from_checkpoint"):
        clone(estimator).set_params(max_epochs=6).fit(images, Y)
    with pytest.raises(ValueError, match=r"to start again\.$"):
        clone(estimator).set_params(lr=0.5).fit(images, Y)
    loaded = FineTunedCNNClassifier.from_checkpoint(tmp_path)
    loaded.set_params(max_epochs=6, warm_start=True, checkpoint=tmp_path / "more")
    assert loaded.fit(images, Y).n_iter_ == 6


def test_columns_of_the_history_after_a_resume(images, estimator):
    estimator.set_params(early_stopping=True)
    expected = clone(estimator).set_params(checkpoint=None).fit(images, Y)
    interrupt(estimator, images, Y)
    got = [list(row) for row in estimator.fit(images, Y).history_]
    assert got == [list(row) for row in expected.history_]


@pytest.mark.usefixtures("interrupted")
def test_only_differences_are_named(images, estimator):
    with pytest.raises(ValueError, match="differs in") as error:
        estimator.set_params(lr=0.5).fit(images, Y)
    assert "differs in lr (in the file 0.01, now 0.5). Use" in str(error.value)


def test_other_initial_weights(images, tmp_path, estimator):
    for name in "ab":
        estimator.set_params(checkpoint=None, max_epochs=0, random_state=ord(name))
        module = estimator.fit(images, Y).module_
        weights = {
            f"stages.{k}": v.contiguous() for k, v in module[:-2].state_dict().items()
        }
        weights |= {"head.2.weight": torch.ones(5, 16), "head.2.bias": torch.ones(5)}
        safetensors.torch.save_file(weights, tmp_path / f"{name}.safetensors")
    estimator.set_params(
        max_epochs=4, checkpoint=tmp_path, weights=tmp_path / "a.safetensors"
    )
    interrupt(estimator, images, Y)
    estimator.set_params(weights=tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="differs in initial weights"):
        estimator.fit(images, Y)
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    estimator.set_params(weights=tmp_path / "c.safetensors").fit(images, Y)


@pytest.mark.usefixtures("interrupted")
def test_another_version_of_torch(images, estimator, monkeypatch):
    monkeypatch.setattr("torch.__version__", "99.0.0+cpu")
    with pytest.raises(ValueError, match=r"differs in torch \(in the file"):
        estimator.fit(images, Y)


class Rotate:
    """Augmentation whose text contains its memory address."""

    def __call__(self, image):
        return image.rotate(90)


def test_memory_address_of_a_function_is_ignored(images, estimator):
    expected = clone(estimator).set_params(checkpoint=None, augmentation=Rotate())
    expected.fit(images, Y)
    first = Rotate()
    interrupt(estimator.set_params(augmentation=first), images, Y)
    second = Rotate()
    assert str(first) != str(second)
    assert_equal_fits(
        estimator.set_params(augmentation=second).fit(images, Y), expected
    )


class Malicious:
    # A pickle calls this when it is loaded.
    def __reduce__(self):  # noqa: D105
        return exec, ("import builtins; builtins.sktl_was_attacked = True",)


def damage(content, how):
    if how == "empty":
        return b""
    if how == "text":
        return b"not a checkpoint"
    if how == "pickle":
        return pickle.dumps(Malicious())
    if how == "json":
        header = b'{"__metadata__":{"sktl":"' + b"[" * 9000 + b'","sktl_sha256":"0"}}'
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


@pytest.mark.parametrize(
    "how",
    [
        how
        if DAMAGES.index(how) % 3 == 0
        else pytest.param(how, marks=pytest.mark.slow)
        for how in DAMAGES
    ],
)
@pytest.mark.usefixtures("interrupted")
def test_damaged_file(images, estimator, file, how):
    file.write_bytes(damage(file.read_bytes(), how))
    with pytest.raises(ValueError, match=rf"{file}.*(must be|differs)"):
        estimator.fit(images, Y)
    assert not hasattr(builtins, "sktl_was_attacked")
    with pytest.raises(NotFittedError):
        estimator.predict(images)
    file.unlink()
    estimator.fit(images, Y)


@pytest.mark.usefixtures("interrupted")
def test_pickle_is_not_executed(images, estimator, file):
    torch.save({"weights": Malicious()}, file)
    with pytest.raises(ValueError, match=f"{file}.*Nothing in it was executed"):
        estimator.fit(images, Y)
    assert not hasattr(builtins, "sktl_was_attacked")


def test_saved_classifier_is_not_a_checkpoint(images, estimator, file):
    clone(estimator).set_params(checkpoint=None).fit(images, Y).save(file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"{file}.* must have the format"):
        estimator.fit(images, Y)
    assert file.read_bytes() == before


INVALID_VALUES = {
    "epoch": [None, "x", float("inf"), -1, 10**9, 10**400, True, 2.0],
    "best_epoch": [float("nan"), -1, 10**9],
    "best_score": [None, "x", [1], [1, 2, 3], [1, None], [True, 0.5], {"a": 1}],
    "seed": [None, "x", -1, 2**31, 2**80, True, 0.5],
    "history": [None, "x", [{}], [{"epoch": 1}], [[1]], {"a": 1}],
    "fingerprint": [None, "x"],
    "selection": [None, "x", {}, [3], [[]], [{}], [{"lr": 0.1}]],
}


@pytest.mark.parametrize(
    ("part", "value"),
    [(part, v) for part in INVALID_VALUES for v in INVALID_VALUES[part]],
)
@pytest.mark.usefixtures("interrupted")
def test_invalid_value(images, estimator, file, part, value):
    tensors, document = read_tensors(file)
    write_tensors(file, tensors, {**document, part: value})
    with pytest.raises(ValueError, match=f"{file}"):
        estimator.fit(images, Y)


@pytest.mark.parametrize("part", ["best", "initial"])
@pytest.mark.usefixtures("interrupted")
def test_weights_of_another_network(images, estimator, file, part):
    tensors, document = read_tensors(file)
    tensors[f"{part}.head.0.bias"] = torch.zeros(7)
    write_tensors(file, tensors, document)
    with pytest.raises(ValueError, match=f"{file}.*belong to another network"):
        estimator.fit(images, Y)


@pytest.mark.parametrize("how", ["missing", "shape", "name", "state"])
@pytest.mark.usefixtures("interrupted")
def test_tensors_of_another_training(images, estimator, file, how):
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
        estimator.fit(images, Y)


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError])
@pytest.mark.parametrize("name", ["check_state_dict", "load_optimizer_state"])
@pytest.mark.usefixtures("interrupted")
def test_error_of_our_own_code_is_not_called_damage(
    images, estimator, monkeypatch, name, error
):
    def broken(*arguments):
        raise error("a mistake in the code")

    monkeypatch.setattr(trainer, name, broken)
    with pytest.raises(error, match="a mistake in the code"):
        estimator.fit(images, Y)


class DiskFullAfter:
    """Stands for ``os.fsync`` on a disk that is full after some files."""

    def __init__(self, n_files):
        self.n_left = n_files
        self.fsync = os.fsync

    def __call__(self, descriptor):
        self.n_left -= 1
        if self.n_left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.fsync(descriptor)


def test_full_disk_warns_and_keeps_the_previous_file(
    images, estimator, file, monkeypatch
):
    expected = clone(estimator).set_params(checkpoint=None).fit(images, Y)
    monkeypatch.setattr(os, "fsync", DiskFullAfter(2))
    with pytest.warns(UserWarning, match=f"{file}.*after epoch .*No space") as warnings:
        estimator.fit(images, Y)
    assert [str(w.message).split(":")[0].split()[-1] for w in warnings] == ["3", "4"]
    assert {w.filename for w in warnings} != {sktl._training.checkpoint.__file__}
    assert_equal_fits(estimator, expected)
    assert os.listdir(file.parent) == [file.name]
    assert read_tensors(file)[1]["epoch"] == 2
    monkeypatch.undo()
    assert_equal_fits(clone(estimator).fit(images, Y), expected)


def test_file_of_a_killed_process_is_removed(images, estimator, file, tmp_path):
    interrupt(estimator, images, Y)
    half = tmp_path / "fine_tuning-0123456789ab.tmp"
    half.write_bytes(file.read_bytes()[:1000])
    other = tmp_path / "other.tmp"
    other.touch()
    estimator.fit(images, Y)
    assert sorted(tmp_path.iterdir()) == sorted([file, other])


def test_interrupt_while_writing_keeps_the_previous_file(
    images, estimator, file, monkeypatch
):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    interrupt(estimator, images, Y)
    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(images, Y)
    assert os.listdir(file.parent) == [file.name]
    assert file.read_bytes() == before


def test_directory_is_created(images, estimator, tmp_path):
    estimator.set_params(checkpoint=str(tmp_path / "a" / "b"), max_epochs=1).fit(
        images, Y
    )
    assert (tmp_path / "a" / "b" / "fine_tuning.safetensors").exists()


def test_directory_that_is_a_file(images, estimator, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"'checkpoint'.*directory.*file'"):
        estimator.set_params(checkpoint=tmp_path / "file").fit(images, Y)


def test_tilde_is_expanded(images, estimator, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    estimator.set_params(checkpoint="~/runs", max_epochs=1).fit(images, Y)
    assert (tmp_path / "runs" / "fine_tuning.safetensors").exists()
    assert Checkpoint("~/runs").seed(-1) != -1


def test_empty_name(images, estimator):
    with pytest.raises(ValueError, match="'checkpoint' parameter must be the name"):
        estimator.set_params(checkpoint="").fit(images, Y)


def test_checkpoint_seed(images, estimator, tmp_path, file):
    assert Checkpoint(tmp_path).seed(5) == 5
    assert Checkpoint(tmp_path / "nothing").seed(5) == 5
    estimator.set_params(random_state=None, max_epochs=1).fit(images, Y)
    assert Checkpoint(tmp_path).seed(-1) == read_tensors(file)[1]["seed"] >= 0
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=str(file)):
        Checkpoint(tmp_path).seed(5)


@pytest.mark.parametrize("weights", [None, "DEFAULT"])
def test_resumed_run_without_random_state_uses_the_seed_of_the_file(
    images, estimator, monkeypatch, tmp_path, weights
):
    estimator.set_params(random_state=None, weights=weights, early_stopping=True)
    estimator.set_params(
        backbone="tiny" if weights is None else "five stages", trainable=1
    )
    interrupt(estimator, images, Y)
    seed = Checkpoint(tmp_path).seed(-1)
    estimator.fit(images, Y)
    fixed = SimpleNamespace(randint=lambda high: seed)
    monkeypatch.setattr("sktl._training.build.check_random_state", lambda state: fixed)
    assert_equal_fits(
        estimator, clone(estimator).set_params(checkpoint=None).fit(images, Y)
    )


def test_content_of_the_file(images, estimator, file):
    estimator.set_params(early_stopping=True, n_iter_no_change=2).fit(images, Y)
    tensors, document = read_tensors(file)
    weights = estimator.module_.state_dict()
    assert {f"weights.{name}" for name in weights} <= set(tensors)
    best = {n: v for n, v in tensors.items() if n.startswith("best.")}
    assert all(
        torch.equal(v, weights[n.removeprefix("best.")]) for n, v in best.items()
    )
    assert len(best) == len(weights)
    assert document["history"] == estimator.history_
    parameters = sum(1 for _ in estimator.module_.parameters())
    assert sum(name.endswith(".exp_avg_sq") for name in tensors) == parameters
    assert Path(file).stat().st_size > 3 * sum(v.nbytes for v in weights.values())
