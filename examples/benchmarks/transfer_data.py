"""
====================================================
Data sets and networks of the transfer learning test
====================================================

Used by ``transfer_quality.py``. A *cell* of that benchmark is a data set, a number of
labeled images per class, a network and an image size. The data sets:

- *digits*: scanned digits of scikit-learn, unlike the photographs of ImageNet;
- *textures*: ten classes of textures, photographs but not of objects;
- *hymenoptera*: ants and bees, which are categories of ImageNet;
- *tiny*: 20 classes of Tiny ImageNet at 32 x 32 pixels.

All but the digits are read from the folder given by ``--data``, and left out if they
are not there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from sktl import Preprocessing, register_backbone

# Milliseconds per image of a training step (forward and backward, batches of 32) on two
# cores, by network and image size. Used only for the estimate of the total time.
MILLISECONDS = {
    ("resnet_mini", 32): 12.0,
    ("squeezenet1_1", 64): 2.5,
    ("squeezenet1_1", 112): 8.5,
    ("efficientnet_lite0", 64): 13.0,
    ("efficientnet_lite0", 112): 24.0,
}
WEIGHTS = {
    "squeezenet1_1": "squeezenet1_1-imagenet.pth",
    "efficientnet_lite0": "tf_efficientnet_lite0-imagenet.pth",
}
TINY_CLASSES = 20
TINY_IMAGES = 200  # per class, of 500


@dataclass(frozen=True)
class Setting:
    """What every method is given besides the training images.

    Attributes
    ----------
    backbone, weights, image_size, pixel_range
        As in the estimators of sktl.
    flip : bool
        Whether a mirrored image may have the same label.
    """

    backbone: str
    weights: str
    image_size: int
    pixel_range: Any
    flip: bool

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of the estimators of sktl."""
        names = ("backbone", "weights", "image_size", "pixel_range")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Cell:
    """A data set, labeled images per class (0: all), a network and an image size."""

    data: str
    n_labels: int
    network: str
    image_size: int

    @property
    def name(self) -> str:
        """Name of the cell, as in the tables and in the names of result files."""
        labels = self.n_labels or "all"
        return f"{self.data}-{labels}-{self.network}-{self.image_size}"

    @property
    def milliseconds(self) -> float:
        """Time of a training step per image."""
        return MILLISECONDS[self.network, self.image_size]


# Cheap cells come first in each data set, and cheap data sets first.
CELLS = (
    Cell("digits", 10, "squeezenet1_1", 64),
    Cell("digits", 5, "resnet_mini", 32),
    Cell("digits", 30, "squeezenet1_1", 64),
    Cell("digits", 10, "resnet_mini", 32),
    Cell("textures", 10, "squeezenet1_1", 112),
    Cell("textures", 10, "efficientnet_lite0", 64),
    Cell("textures", 60, "squeezenet1_1", 64),
    Cell("hymenoptera", 0, "squeezenet1_1", 112),
    Cell("hymenoptera", 0, "efficientnet_lite0", 64),
    Cell("tiny", 25, "squeezenet1_1", 64),
    Cell("tiny", 100, "squeezenet1_1", 64),
)
# Run only if they are named: they would double the time.
MORE_CELLS = (
    Cell("digits", 30, "resnet_mini", 32),
    Cell("hymenoptera", 0, "efficientnet_lite0", 112),
    Cell("tiny", 25, "efficientnet_lite0", 64),
    Cell("tiny", 100, "efficientnet_lite0", 64),
)
QUICK_CELLS = (Cell("digits", 5, "resnet_mini", 32),)


@dataclass(frozen=True)
class Images:
    """All images of a data set.

    Attributes
    ----------
    X : ndarray
        Paths ``(n,)`` or pixels ``(n, h, w)`` or ``(n, h, w, 3)``.
    y : ndarray of shape (n,)
        Labels.
    n_test : int
        Number of test images.
    n_own_train : int or None
        If given, the data set has a split of its own: so many training images, then
        the test images.
    pixel_range : tuple or "auto"
        As in the estimators.
    flip : bool
        As in `Setting`.
    """

    X: NDArray[Any]
    y: NDArray[Any]
    n_test: int = 400
    n_own_train: int | None = None
    pixel_range: Any = "auto"
    flip: bool = True

    def split(
        self, n_labels: int, seed: int
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return the indices of the training and of the test images, both stratified.

        Seed 0 of a data set with a split of its own is this split. Every other seed
        draws new training and test images, in the same numbers.
        """
        everything = np.arange(len(self.y))
        n_train = n_labels * len(np.unique(self.y))
        if self.n_own_train is not None:
            n_train = self.n_own_train
            if seed == 0:
                return everything[:n_train], everything[n_train:]
        train, test = train_test_split(
            everything,
            train_size=n_train,
            test_size=self.n_test,
            stratify=self.y,
            random_state=seed,
        )
        return train, test


def digits(folder: Path) -> Images:
    """Return the digits of scikit-learn: ``(1797, 8, 8)``, from 0 to 16."""
    X, y = load_digits(return_X_y=True)
    return Images(X.reshape(-1, 8, 8), y, pixel_range=(0, 16), flip=False)


def textures(folder: Path) -> Images:
    """Return the textures: 10 classes x 120 files."""
    paths = sorted(folder.glob("textures/*/*.jpg"))
    return Images(np.array([str(p) for p in paths]), np.array(parents(paths)))


def hymenoptera(folder: Path) -> Images:
    """Return ants and bees: 244 training files, then 153 validation files."""
    train, test = (
        sorted(folder.glob(f"hymenoptera/{part}/*/*.jpg")) for part in ("train", "val")
    )
    paths = train + test
    return Images(
        np.array([str(p) for p in paths]),
        np.array(parents(paths)),
        n_test=len(test),
        n_own_train=len(train),
    )


def tiny(folder: Path) -> Images:
    """Return 20 classes of Tiny ImageNet, the same in each call: 200 images each."""
    with np.load(folder / "tiny_imagenet32" / "train.npz") as file:
        jpeg, offsets, label = file["jpeg"], file["offsets"], file["label"]
    rng = np.random.default_rng(7)
    chosen = rng.choice(label.max() + 1, TINY_CLASSES, replace=False)
    rows = np.concatenate([np.flatnonzero(label == c)[:TINY_IMAGES] for c in chosen])
    pixels = []
    for row in rows:
        content = jpeg[offsets[row] : offsets[row + 1]].tobytes()
        with Image.open(BytesIO(content)) as image:
            pixels.append(np.asarray(image.convert("RGB")))
    return Images(np.stack(pixels), label[rows])


def parents(paths: list[Path]) -> list[str]:
    """Return the names of the folders that contain the files."""
    return [path.parent.name for path in paths]


LOADERS: dict[str, Callable[[Path], Images]] = {
    "digits": digits,
    "textures": textures,
    "hymenoptera": hymenoptera,
    "tiny": tiny,
}
FOLDERS = {"tiny": "tiny_imagenet32"}  # where it is not the name of the data set


def reason_to_skip(cell: Cell, folder: Path) -> str | None:
    """Return why a cell cannot be computed here, or None if it can."""
    needed = []
    if cell.data != "digits":
        needed.append(folder / FOLDERS.get(cell.data, cell.data))
    if cell.network in WEIGHTS:
        needed.append(folder / "weights" / WEIGHTS[cell.network])
    missing = [str(path) for path in needed if not path.exists()]
    if missing:
        return f"missing {', '.join(missing)}"
    if cell.network == "efficientnet_lite0" and not register_efficientnet_lite0():
        return "timm, which defines the network, is not installed"
    return None


def setting_of(cell: Cell, images: Images, folder: Path) -> Setting:
    """Return what every method is given in a cell."""
    weights = "DEFAULT"
    if cell.network in WEIGHTS:
        weights = str(folder / "weights" / WEIGHTS[cell.network])
    return Setting(
        cell.network, weights, cell.image_size, images.pixel_range, images.flip
    )


@cache
def register_efficientnet_lite0() -> bool:
    """Register EfficientNet-Lite0, and return whether timm is installed."""
    try:
        import timm
    except ImportError:
        return False

    def build() -> nn.Module:
        network = timm.create_model("tf_efficientnet_lite0")
        blocks = list(network.blocks)
        # A stage ends where the resolution halves. Neither a dict nor what is written
        # to `__dict__` is registered, so the state dict has timm's names only.
        network.stages = {
            "stem": nn.Sequential(network.conv_stem, network.bn1, blocks[0]),
            "stage1": blocks[1],
            "stage2": blocks[2],
            "stage3": nn.Sequential(*blocks[3:5]),
            "stage4": nn.Sequential(*blocks[5:], network.conv_head, network.bn2),
        }
        network.__dict__["head"] = nn.Sequential(
            network.global_pool, network.classifier
        )
        return network

    register_backbone(
        "efficientnet_lite0",
        build,
        preprocessing=Preprocessing(
            resize_size=256,
            crop_size=224,
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
    )
    return True
