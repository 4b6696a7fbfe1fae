"""
==================================================
Benchmark the epoch time of FineTunedCNNClassifier
==================================================

The benchmark compares `FineTunedCNNClassifier`, a skorch script written like skorch's
documentation, and a plain PyTorch loop. All have the same network, trainable stages,
batch size, optimizer and precision, and get decoded uint8 images in memory. The scripts
freeze stages with ``requires_grad = False``, with all modules in training mode. Each
runs three epochs, alternately; the first epoch is not counted.

A second loop runs the frozen stages under ``torch.no_grad()``, as
FineTunedCNNClassifier does.

::

    python examples/benchmarks/fine_tuning.py --data FOLDER --backbone resnet18

``FOLDER`` contains one folder per class. Weights are random, which does not affect the
time.
"""

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import skorch
import torch
from PIL import Image
from sklearn.datasets import load_files
from skorch import NeuralNet
from skorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from sktl import FineTunedCNNClassifier
from sktl._backbones.new_head import replace_head
from sktl._backbones.registry import load_backbone
from sktl._training.network import count_trainable_stages

LR, WEIGHT_DECAY = 1e-4, 1e-2


def decoded(paths: list[str], backbone: Any) -> np.ndarray:
    """Decode and preprocess images for the network: ``(n, side, side, 3)``."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(backbone.preprocessing(image.convert("RGB")))
    return np.stack(images)


class Script(nn.Module):
    """Network with frozen lower stages and normalized input, as a script has it."""

    def __init__(self, backbone: Any, trainable: Any, precision: str, no_grad: bool):
        super().__init__()
        self.network = replace_head(backbone, 2)
        self.network.to(memory_format=torch.channels_last)
        names = [name for name, _ in self.network.named_children()]
        n_trainable = count_trainable_stages(trainable, names[:-2])
        # If only the head is trainable, the pooling before it is frozen too.
        self.n_frozen = len(names) - 2 - n_trainable if n_trainable else len(names) - 1
        for part in self.network[: self.n_frozen]:
            part.requires_grad_(False)
        self.no_grad = no_grad
        self.mixed = precision == "bfloat16"
        preprocessing = backbone.preprocessing
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute logits ``(n, 2)`` of images ``(n, side, side, 3)``, uint8."""
        x = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            if not self.no_grad:
                return self.network(x).float()
            with torch.no_grad():
                x = self.network[: self.n_frozen](x)
            return self.network[self.n_frozen :](x).float()


class EpochStarts(Callback):
    """Record the start time of each epoch, and the end time of the training."""

    def on_train_begin(self, net: Any, **_: Any) -> None:
        """Clear the times."""
        self.times: list[float] = []

    def on_epoch_begin(self, net: Any, **_: Any) -> None:
        """Record the time."""
        self.times.append(time.perf_counter())

    def on_train_end(self, net: Any, **_: Any) -> None:
        """Record the time."""
        self.times.append(time.perf_counter())


def plain_loop(script: Script, X: Tensor, y: Tensor, batch_size: int) -> Any:
    """Return a function that trains a script in a plain loop and times its epochs."""
    trainable = [p for p in script.parameters() if p.requires_grad]

    def run(n_epochs: int) -> list[float]:
        optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=WEIGHT_DECAY)
        times = [time.perf_counter()]
        for _ in range(n_epochs):
            script.train()
            for rows in torch.randperm(len(X)).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(script(X[rows]), y[rows]).backward()
                optimizer.step()
            times.append(time.perf_counter())
        return times

    return run


def skorch_script(script: Script, X: Tensor, y: Tensor, batch_size: int) -> Any:
    """Return a function that trains a script with skorch and times its epochs."""

    def run(n_epochs: int) -> list[float]:
        net = NeuralNet(
            script,
            nn.CrossEntropyLoss,
            optimizer=torch.optim.AdamW,
            optimizer__weight_decay=WEIGHT_DECAY,
            lr=LR,
            batch_size=batch_size,
            max_epochs=n_epochs,
            iterator_train__shuffle=True,
            train_split=None,
            callbacks=[EpochStarts()],
            verbose=0,
        )
        return epoch_times(net.fit(X, y))

    return run


def epoch_times(net: NeuralNet) -> list[float]:
    """Return the times recorded by the callback of a net."""
    (starts,) = (c for _, c in net.callbacks_ if isinstance(c, EpochStarts))
    return starts.times


def ours(
    backbone: str, trainable: Any, precision: str, X: Any, y: Any, batch_size: int
) -> Any:
    """Return a function that trains FineTunedCNNClassifier and times its epochs."""

    def run(n_epochs: int) -> list[float]:
        classifier = FineTunedCNNClassifier(
            backbone,
            weights=None,
            trainable=trainable,
            head_init="random",
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            max_epochs=n_epochs,
            batch_size=batch_size,
            precision=precision,
            callbacks=[EpochStarts()],
            random_state=0,
        )
        return epoch_times(classifier.fit(X, y).net_)

    return run


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description="Benchmark the time of an epoch")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    backbone = load_backbone(arguments.backbone, None)
    files = load_files(arguments.data, load_content=False, random_state=0)
    X = decoded(list(files.filenames[: arguments.images]), backbone)
    y = files.target[: arguments.images]
    tensors = torch.from_numpy(X), torch.from_numpy(y)
    size, precision = arguments.batch_size, arguments.precision
    print(
        f"{arguments.backbone}, {platform.machine()}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}, skorch {skorch.__version__}, {precision},"
        f" {len(X)} images, batches of {size}, median of {2 * arguments.repeats}"
    )
    for trainable in ("all", 1, "head"):
        scripts = [
            Script(backbone, trainable, precision, no_grad)
            for no_grad in (False, True, False)
        ]
        methods = {
            "sktl": ours(arguments.backbone, trainable, precision, X, y, size),
            "plain loop": plain_loop(scripts[0], *tensors, size),
            "no_grad loop": plain_loop(scripts[1], *tensors, size),
            "skorch script": skorch_script(scripts[2], *tensors, size),
        }
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(arguments.repeats):
            for name, run in methods.items():
                # The first of three epochs is not counted: it allocates memory.
                seconds[name] += np.diff(run(3))[1:].tolist()
        median = {name: float(np.median(times)) for name, times in seconds.items()}
        print(f"trainable={trainable!r}: sktl {median['sktl']:.2f} s an epoch", end="")
        for name in list(methods)[1:]:
            ratio = median["sktl"] / median[name]
            print(f"; {ratio:.2f} times the {name} ({median[name]:.2f} s)", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
