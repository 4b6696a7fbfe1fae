"""
=======================================
Fine-tuning scripts in plain torch
=======================================

The scripts that a user would write instead of using sktl, for ``transfer_quality.py``:
here the training loop, and both variants of PyTorch's tutorial "Transfer Learning for
Computer Vision"; in ``transfer_recipes.py`` those of fastai and AutoGluon.

All start from the same pretrained weights and from images of the same preprocessing,
and replace the classification layer by a new one. None sees the test images: the
weights are those of the last epoch, or chosen on images that are held out of the
training images.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from transfer_data import Setting

from sktl._backbones.new_head import replace_head
from sktl._backbones.registry import load_backbone
from sktl._images.sequence import ImageSequence

Transform = Callable[[Image.Image], Tensor]


class LabeledImages(Dataset[tuple[Tensor, int]]):
    """Dataset of decoded images, transformed on access."""

    def __init__(
        self,
        images: Sequence[Image.Image],
        targets: NDArray[np.int64],
        transform: Transform,
    ) -> None:
        self.images = images
        self.targets = targets
        self.transform = transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Return an image ``(3, side, side)``, float32, and its target."""
        return self.transform(self.images[i]), int(self.targets[i])


@dataclass
class Task:
    """Training images in memory, and the network to train.

    Attributes
    ----------
    setting : Setting
        Network and image size.
    images : list of PIL.Image.Image
        Decoded training images of any size.
    targets : ndarray of shape (n,)
        Encoded targets.
    seed : int
        Seed of the held-out split; torch is seeded already.
    """

    setting: Setting
    images: list[Image.Image]
    targets: NDArray[np.int64]
    seed: int
    n_classes: int = field(init=False)

    def __post_init__(self) -> None:
        """Count the classes and load the pretrained network."""
        self.n_classes = int(self.targets.max()) + 1
        self.backbone = load_backbone(self.setting.backbone, self.setting.weights)
        self.preprocessing = self.backbone.preprocessing_at(self.setting.image_size)

    def new_network(self) -> nn.Sequential:
        """Return the stages, the neck (pooling) and a new linear head."""
        return replace_head(self.backbone, self.n_classes)

    def transform(self, *augmentations: Any, cropped: bool = False) -> Transform:
        """Return preprocessing, augmentation and normalization of an image.

        With `cropped`, the first augmentation returns images of the right size, and
        takes the place of the preprocessing.
        """
        steps: list[Any] = [] if cropped else [self.preprocessing]
        if augmentations and not cropped:
            steps.append(Image.fromarray)
        normalize = T.Normalize(self.preprocessing.mean, self.preprocessing.std)
        return T.Compose([*steps, *augmentations, T.ToTensor(), normalize])

    def loader(
        self,
        transform: Transform,
        batch_size: int,
        rows: Iterable[int] | None = None,
        shuffle: bool = True,
    ) -> DataLoader[Any]:
        """Return a loader of the training images, or of the given ones."""
        indices = np.arange(len(self.images)) if rows is None else np.asarray(rows)
        images = [self.images[i] for i in indices]
        return DataLoader(
            LabeledImages(images, self.targets[indices], transform),
            batch_size,
            shuffle,
            # A single image has no BatchNorm statistics.
            drop_last=shuffle and len(images) % batch_size == 1,
        )


class Script:
    """A script with the methods of a classifier.

    Parameters
    ----------
    train : callable
        Trains on a `Task`; returns a network from ``(n, 3, h, w)`` to logits.
    setting : Setting
        Network and image size.
    seed : int
        Seed of torch and of splits.
    """

    def __init__(
        self, train: Callable[[Task], nn.Module], setting: Setting, seed: int
    ) -> None:
        self.train = train
        self.setting = setting
        self.seed = seed

    def fit(self, X: Any, y: NDArray[Any]) -> "Script":
        """Decode the images once, and train."""
        self.classes_, targets = np.unique(y, return_inverse=True)
        self.task_ = Task(self.setting, self.decoded(X), targets, self.seed)
        torch.manual_seed(self.seed)
        self.network_ = self.train(self.task_).eval()
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the labels of images, without augmentation."""
        images = self.decoded(X)
        unknown = np.zeros(len(images), np.int64)
        transform = self.task_.transform()
        batches = DataLoader(LabeledImages(images, unknown, transform), batch_size=32)
        return self.classes_[predicted(self.network_, batches)]

    def decoded(self, X: Any) -> list[Image.Image]:
        """Decode images as sktl does, so that all methods have the same pixels."""
        sequence = ImageSequence(X, self.setting.pixel_range)
        return [sequence[i] for i in range(len(sequence))]


@torch.inference_mode()
def predicted(network: nn.Module, batches: Iterable[Any]) -> NDArray[np.int64]:
    """Return the targets that a network predicts."""
    network.eval()
    return np.concatenate([network(x).argmax(1).numpy() for x, _ in batches])


def accuracy(network: nn.Module, batches: Iterable[Any]) -> float:
    """Return the accuracy of a network on a loader that does not shuffle."""
    targets = np.concatenate([y.numpy() for _, y in batches])
    return float(np.mean(predicted(network, batches) == targets))


def train_epoch(
    network: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    after_step: Callable[[], None] | None = None,
    max_norm: float | None = None,
) -> None:
    """Train for one epoch, and call a function after each step."""
    for x, y in batches:
        network.train()
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()
        if after_step is not None:
            after_step()


def tutorial(task: Task, *, tune_all: bool) -> nn.Module:
    """Train as PyTorch's tutorial does, 25 epochs in batches of four.

    SGD with momentum, learning rate 1e-3, a tenth of it after every seven epochs,
    random crops and flips. The tutorial returns the epoch with the highest accuracy on
    the images that it reports, this script returns the last one.

    Parameters
    ----------
    task : Task
        Training images and network.
    tune_all : bool
        Whether the whole network is trained ("finetuning the ConvNet"), or the head
        only ("ConvNet as fixed feature extractor"; as there, BatchNorm statistics are
        updated).
    """
    network = task.new_network()
    network[:-1].requires_grad_(tune_all)
    trainable = [p for p in network.parameters() if p.requires_grad]
    mode = T.InterpolationMode(task.preprocessing.interpolation)
    crop = T.RandomResizedCrop(task.setting.image_size, interpolation=mode)
    transform = task.transform(crop, T.RandomHorizontalFlip(), cropped=True)
    batches = task.loader(transform, batch_size=4)
    optimizer = torch.optim.SGD(trainable, lr=1e-3, momentum=0.9)
    scheduler = StepLR(optimizer, step_size=7, gamma=0.1)
    for _ in range(25):
        train_epoch(network, batches, optimizer)
        scheduler.step()
    return network
