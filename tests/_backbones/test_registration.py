"""Tests of sktl._backbones.registration."""

import functools
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cloudpickle
import joblib
import pytest
from torch import nn

from sktl._backbones.registration import (
    ImportedBuilder,
    LocalBuilder,
    Registration,
    pickled_for,
    portable_builder,
)
from sktl._images.preprocessing import Preprocessing

SIZE = Preprocessing(8, 8)


def build() -> nn.Module:
    return nn.Linear(3, 2)


class Factory:
    build = staticmethod(build)

    @staticmethod
    def other() -> nn.Module:
        return nn.Linear(3, 4)


class Net(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 5)


@pytest.mark.parametrize(
    ("builder", "name", "width"),
    [(build, "build", 2), (Factory.other, "Factory.other", 4), (Net, "Net", 5)],
)
def test_a_function_of_a_module_is_imported(
    builder: Callable[[], nn.Module], name: str, width: int
) -> None:
    registration = Registration("mine", portable_builder("mine", builder), SIZE)
    assert registration.reference == f"{__name__}:{name}"
    loaded = pickle.loads(pickle.dumps(registration))
    assert loaded == registration
    assert loaded.builder().out_features == width


def _of_a_script() -> nn.Module:
    return nn.Linear(3, 2)


_of_a_script.__module__ = "__main__"
renamed = functools.wraps(build)(lambda: nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("builder", "described"),
    [
        (lambda: nn.Linear(3, 2), f"{__name__}:<lambda>"),
        (_of_a_script, "__main__:_of_a_script"),
        (renamed, f"{__name__}:build"),
        (functools.partial(nn.Linear, 3, 2), "partial"),
    ],
)
def test_other_builders_are_not_pickled(
    builder: Callable[[], nn.Module], described: str
) -> None:
    registration = Registration("mine", portable_builder("mine", builder), SIZE)
    assert not registration.is_importable
    assert isinstance(registration.builder(), nn.Linear)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        with pytest.raises(pickle.PicklingError, match=f"'mine' must .*{described}. D"):
            pickle.dumps(registration, protocol)
    with pytest.raises(TypeError, match="Define it at the top level of a module"):
        _ = registration.reference


def test_joblib_hashes_the_code_of_a_local_builder() -> None:
    def register(width: int, size: int = 8) -> Registration:
        builder = portable_builder("mine", lambda: nn.Linear(3, width))
        return Registration("mine", builder, Preprocessing(size, size))

    other = portable_builder("mine", lambda: nn.Linear(4, 2))
    again = portable_builder("mine", lambda: nn.Linear(4, 2))
    assert pickled_for() == "process"
    assert joblib.hash(register(2)) == joblib.hash(register(2))
    assert joblib.hash(register(2)) != joblib.hash(register(3))
    assert joblib.hash(register(2)) != joblib.hash(register(2, 16))
    assert joblib.hash(other) == joblib.hash(again) != joblib.hash(register(2).builder)


def test_a_cached_function_writes_no_file_without_the_builder(tmp_path: Path) -> None:
    builder = portable_builder("mine", lambda: nn.Linear(3, 2))

    def write(path: Path) -> None:
        for dump in (joblib.dump, lambda each, path: pickle.dumps(each)):
            with pytest.raises(pickle.PicklingError, match="other processes"):
                dump(builder, path)

    joblib.Memory(tmp_path, verbose=0).cache(write)(tmp_path / "file")


def test_a_restored_registration_has_the_same_hash() -> None:
    registration = Registration("mine", ImportedBuilder("nets:build"), SIZE)
    restored = replace(registration, is_restored=True)
    assert joblib.hash(restored) == joblib.hash(registration)
    assert not pickle.loads(pickle.dumps(restored)).is_restored


def test_workers_get_a_copy_of_a_local_builder() -> None:
    width = 7
    registration = Registration(
        "mine", portable_builder("mine", lambda: nn.Linear(3, width)), SIZE
    )
    sent = cloudpickle.dumps(registration)
    loaded = cloudpickle.loads(sent)
    # The same registration, so that it does not replace itself.
    assert loaded == registration == cloudpickle.loads(sent)
    assert isinstance(loaded.builder, LocalBuilder)
    assert loaded.builder().out_features == 7


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("no_such_module:build", ImportError, "No module named 'no_such_module'.*Add"),
        (f"{__name__}:missing", ImportError, "has no attribute 'missing'"),
        ("sktl._images.preprocessing:MAX_SIZE", TypeError, "callable. Got int"),
    ],
)
def test_invalid_references_raise(
    reference: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ImportedBuilder(reference)()


def test_differences() -> None:
    one = Registration("mine", ImportedBuilder("a:b"), SIZE)
    other = Registration("mine", ImportedBuilder("a:c"), SIZE, layout="NHWC")
    assert one.differences(other) == ["builder", "layout"]
