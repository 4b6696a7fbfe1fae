"""Objects that are no sequences of images raise before anything is decoded."""

import io
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from mean_color import STACK, MeanColor, check_images, encode_png, save_stack
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """Return a dataset of three images of two classes, which must not be read."""
    for name, rows in (("ant", [0, 1]), ("bee", [2])):
        (tmp_path / name).mkdir()
        for row in rows:
            content = encode_png(STACK[row])
            (tmp_path / name / f"{row}.png").write_bytes(content)
    return ImageFolder(tmp_path, loader=fail_if_called)


def fail_if_called(*_: object) -> object:
    raise AssertionError("an image was read")


class Decoded(Dataset):
    """Dataset of decoded images without labels."""

    def __len__(self):
        """Return 3."""
        return 3

    __getitem__ = fail_if_called


class Stream(IterableDataset):
    __iter__ = fail_if_called


class Arrays(Decoded):
    data, targets = STACK, [0, 1, 1]


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda x: x, "[path for path, _ in X.samples], with X.targets as y"),
        (lambda x: Subset(x, [2, 0]), "[X.dataset.samples[i][0] for i in X.indices]"),
        (lambda x: DataLoader(x, 2), "[path for path, _ in X.dataset.samples]"),
        (
            lambda x: DataLoader(Subset(x, [2, 0])),
            "[X.dataset.dataset.samples[i][0] for i in X.dataset.indices]",
        ),
        (lambda x: Arrays(), "the array X.data, with X.targets"),
        (lambda x: Decoded(), "[image for image, _ in X]"),
        (lambda x: DataLoader(Decoded()), "[image for image, _ in X.dataset]"),
        (lambda x: Stream(), "[image for image, _ in X]"),
        (
            lambda x: TensorDataset(torch.from_numpy(STACK), torch.zeros(3)),
            "[image for image, _ in X]",
        ),
    ],
)
def test_datasets_of_torch(folder, make, advice):
    X = make(folder)
    with pytest.raises(TypeError, match=f"Got {type(X).__name__}, a data") as error:
        MeanColor().fit(X)
    assert advice in str(error.value)
    with pytest.raises(TypeError, match=r"X\[0\] is a .*, not an image"):
        MeanColor().fit([X])


def test_advice_for_datasets_is_right(folder):
    check_images([path for path, _ in folder.samples], STACK)
    X = Subset(folder, [2, 0])
    check_images([X.dataset.samples[i][0] for i in X.indices], STACK[[2, 0]])
    assert [X.dataset.targets[i] for i in X.indices] == [1, 0]


@pytest.mark.parametrize(
    "pair",
    [
        lambda path: (Image.fromarray(STACK[0]), 0),
        lambda path: (str(path), 0),
        lambda path: (0, path),
        lambda path: (path.read_bytes(), "ant"),
        lambda path: (STACK[0], 1),
        lambda path: (torch.from_numpy(STACK[0]), torch.tensor(1)),
    ],
)
def test_pairs_of_images_and_labels(pair, folder):
    pairs = [pair(Path(path)) for path, _ in folder.samples]
    with pytest.raises(TypeError, match=r"X\[0\], a tuple of .* Pass images and lab"):
        MeanColor().fit(pairs)


def test_images_as_tuples_of_rows():
    check_images([tuple(pixels) for pixels in STACK], STACK)


@pytest.mark.parametrize("kind", ["memory", "disk", "temporary"])
def test_open_files(kind, tmp_path):
    path = save_stack(tmp_path)[0]
    if kind == "memory":
        file, content = io.BytesIO(encode_png(STACK[0])), "getvalue"
    else:
        content = "read"
        file = open(path, "rb") if kind == "disk" else tempfile.NamedTemporaryFile()
    with file:
        with pytest.raises(TypeError, match=rf"open file.*\[X\.{content}\(\)\]"):
            MeanColor().fit(file)
        for X in ([path, file], (path, file), pd.Series([path, file])):
            with pytest.raises(TypeError, match=rf"X\[1\] is an .* X\[1\]\.{content}"):
                MeanColor().fit(X)
        if kind == "memory":
            check_images([file.getvalue()], STACK[:1])


class Indexable:
    """Object with a length and elements, and nothing else."""

    def __init__(self, elements):
        self.elements = elements

    def __len__(self):
        """Return the number of elements."""
        return len(self.elements)

    def __getitem__(self, index):
        """Return an element."""
        return self.elements[index]


class Registered(Indexable, Sequence):
    pass


@pytest.mark.parametrize("type_", [Indexable, Registered])
def test_any_sequence_of_files(type_, tmp_path):
    paths = save_stack(tmp_path)
    check_images(type_(paths), STACK)
    check_images(type_([Path(path) for path in paths]), STACK)
    check_images(type_([Path(path).read_bytes() for path in paths]), STACK)
    check_images(Registered(list(STACK)), STACK)


@pytest.mark.parametrize(
    "element", [STACK[0], Image.fromarray(STACK[0]), ("a.png", 1), {"image": STACK[0]}]
)
def test_objects_like_datasets(element):
    with pytest.raises(TypeError, match="Got Indexable with elements of type"):
        MeanColor().fit(Indexable([element]))


def test_other_objects_raise_errors_of_scikit_learn():
    class Unreadable:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise KeyError(index)

    for X in (Unreadable(), object(), 3, None):
        with pytest.raises((ValueError, TypeError, KeyError), match=r"\w"):
            MeanColor().fit(X)
    with pytest.raises(ValueError, match="Expected 2D array, got 1D array"):
        MeanColor().fit(Indexable([1.0, 2.0]))
    with pytest.raises(TypeError, match=r"Got dict_values\. Pass a list"):
        MeanColor().fit({"a": "a.png"}.values())


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from sktl._images.unsupported import check_container;"
        "check_container(['a.png']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
