"""
====================================================
What an epoch of FineTunedCNNClassifier costs
====================================================

The same work, done by three: `FineTunedCNNClassifier`, a skorch script as its
documentation has it, and a plain PyTorch loop, each with the same network, trainable
part, batch size, optimizer and precision, on images already decoded to uint8 in
memory. The scripts freeze as scripts do: ``requires_grad = False`` below, everything in
training mode. Measured is an epoch of a run of three, in turns, without the first.

A second loop is a careful one, for comparison: it runs what is frozen under
``torch.no_grad()``, as FineTunedCNNClassifier does.

::

    python examples/benchmarks/fine_tuning.py --data FOLDER --backbone resnet18

``FOLDER`` holds a folder per class. Weights are random: they do not change the time.
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
from sktl._backbones.registry import load_backbone
from sktl._training.network import n_trainable_stages, replace_head

LR, WEIGHT_DECAY = 1e-4, 1e-2


def decoded(paths: list[str], backbone: Any) -> np.ndarray:
    """Decode, resize and crop as the network asks for: ``(n, side, side, 3)``."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(backbone.preprocessing(image.convert("RGB")))
    return np.stack(images)


class Script(nn.Module):
    """What a script trains: a network on normalized images, lower stages frozen."""

    def __init__(self, backbone: Any, trainable: Any, precision: str, careful: bool):
        super().__init__()
        self.network = replace_head(backbone, 2)
        self.network.to(memory_format=torch.channels_last)
        names = [name for name, _ in self.network.named_children()]
        n_trainable = n_trainable_stages(trainable, names[:-2])
        # With the head alone, what leads to it is frozen too.
        self.n_frozen = len(names) - 2 - n_trainable if n_trainable else len(names) - 1
        for part in self.network[: self.n_frozen]:
            part.requires_grad_(False)
        self.careful = careful
        self.mixed = precision == "bfloat16"
        preprocessing = backbone.preprocessing
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Give logits ``(n, 2)`` of ``(n, side, side, 3)``, uint8."""
        x = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            if not self.careful:
                return self.network(x).float()
            with torch.no_grad():
                x = self.network[: self.n_frozen](x)
            return self.network[self.n_frozen :](x).float()


class EpochStarts(Callback):
    """Notes when each epoch began; the last entry is when training ended."""

    def on_train_begin(self, net: Any, **_: Any) -> None:
        """Forget."""
        self.moments: list[float] = []

    def on_epoch_begin(self, net: Any, **_: Any) -> None:
        """Note."""
        self.moments.append(time.perf_counter())

    def on_train_end(self, net: Any, **_: Any) -> None:
        """Note."""
        self.moments.append(time.perf_counter())


def plain_loop(script: Script, X: Tensor, y: Tensor, batch_size: int) -> Any:
    """Give a function that trains a script in a plain loop, and times its epochs."""
    learned = [p for p in script.parameters() if p.requires_grad]

    def run(n_epochs: int) -> list[float]:
        optimizer = torch.optim.AdamW(learned, lr=LR, weight_decay=WEIGHT_DECAY)
        moments = [time.perf_counter()]
        for _ in range(n_epochs):
            script.train()
            for rows in torch.randperm(len(X)).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(script(X[rows]), y[rows]).backward()
                optimizer.step()
            moments.append(time.perf_counter())
        return moments

    return run


def skorch_script(script: Script, X: Tensor, y: Tensor, batch_size: int) -> Any:
    """Give a function that trains a script with skorch, and times its epochs."""

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
        return moments_of(net.fit(X, y))

    return run


def moments_of(net: NeuralNet) -> list[float]:
    """Find the moments that a net's callback noted."""
    (starts,) = (c for _, c in net.callbacks_ if isinstance(c, EpochStarts))
    return starts.moments


def ours(
    backbone: str, trainable: Any, precision: str, X: Any, y: Any, batch_size: int
) -> Any:
    """Give a function that trains FineTunedCNNClassifier, and times its epochs."""

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
        return moments_of(classifier.fit(X, y).net_)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What does an epoch cost?")
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
            Script(backbone, trainable, precision, careful)
            for careful in (False, True, False)
        ]
        ways = {
            "sktl": ours(arguments.backbone, trainable, precision, X, y, size),
            "plain loop": plain_loop(scripts[0], *tensors, size),
            "careful loop": plain_loop(scripts[1], *tensors, size),
            "skorch script": skorch_script(scripts[2], *tensors, size),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.repeats):
            for name, run in ways.items():
                # The first epoch of three is not counted: memory is still allocated.
                seconds[name] += np.diff(run(3))[1:].tolist()
        median = {name: float(np.median(times)) for name, times in seconds.items()}
        print(f"trainable={trainable!r}: sktl {median['sktl']:.2f} s an epoch", end="")
        for name in list(ways)[1:]:
            ratio = median["sktl"] / median[name]
            print(f"; {ratio:.2f} times the {name} ({median[name]:.2f} s)", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
