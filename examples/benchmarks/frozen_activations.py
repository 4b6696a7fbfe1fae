"""
=================================================
Benchmark cached activations of the frozen stages
=================================================

Three measurements of `FineTunedCNNClassifier` with frozen lower stages:

- A grid search over learning rates and heads, from files, with ``memory``, compared
  with the same search by a skorch script written like skorch's documentation. The
  script freezes the same layers, computes them in every epoch, and gets decoded images.
- The time of an epoch, compared with training only the trainable stages on activations
  in memory, by a plain loop and by skorch.
- With ``--capped N``: one epoch on N images in a process limited to 2 GB of memory,
  which is less than the activations need. (The photographs are repeated with different
  bytes appended, so that no two files are equal.)

::

    python examples/benchmarks/frozen_activations.py --data FOLDER --backbone resnet18

``FOLDER`` contains one folder per class. Weights are random, which does not affect the
time.
"""

import argparse
import platform
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import skorch
import torch
from PIL import Image
from sklearn.datasets import load_files
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNet, NeuralNetClassifier
from skorch.callbacks import GradientNormClipping
from torch import Tensor, nn
from torch.nn import functional as F

from sktl import FeatureStore, FineTunedCNNClassifier
from sktl._backbones.new_head import replace_head
from sktl._backbones.registry import load_backbone
from sktl._training.network import count_frozen_parts, count_trainable_stages

RATES, HEADS, DECAYS = [1e-3, 1e-4, 1e-5], [(), (64,)], [1e-2]
GIGABYTE = 2**30


def decoded(paths: list[str], backbone: Any) -> np.ndarray:
    """Decode and preprocess images for the network: ``(n, side, side, 3)``."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(backbone.preprocessing(image.convert("RGB")))
    return np.stack(images)


class Script(nn.Module):
    """Network with frozen lower stages and normalized input, as a script has it."""

    def __init__(self, backbone: Any, trainable: Any, hidden: tuple[int, ...] = ()):
        super().__init__()
        self.network = replace_head(backbone, 2, hidden_layer_sizes=hidden)
        self.network.to(memory_format=torch.channels_last)
        stages = [name for name, _ in self.network.named_children()][:-2]
        self.n_frozen = count_frozen_parts(
            self.network, count_trainable_stages(trainable, stages)
        )
        for part in self.network[: self.n_frozen]:
            part.requires_grad_(False)
        preprocessing = backbone.preprocessing
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Give logits ``(n, 2)`` of ``(n, side, side, 3)``, uint8."""
        x = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return self.network(x)


def ours(arguments: Any, trainable: Any, **parameters: Any) -> FineTunedCNNClassifier:
    """Return the estimator that is measured."""
    return FineTunedCNNClassifier(
        arguments.backbone,
        weights=None,
        trainable=trainable,
        max_epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        engine=arguments.engine,
        random_state=0,
        **parameters,
    )


def seconds(search: GridSearchCV, X: Any, y: Any) -> float:
    """Return the time of a search in seconds."""
    start = time.perf_counter()
    search.fit(X, y)
    return time.perf_counter() - start


def searches(arguments: Any, trainable: Any, paths: list[str], y: Any) -> None:
    """Compare the times of whole searches."""
    grid = {"lr": RATES, "weight_decay": DECAYS, "hidden_layer_sizes": HEADS}
    with tempfile.TemporaryDirectory() as memory:
        mine = GridSearchCV(
            ours(arguments, trainable, memory=memory, head_init=arguments.head_init),
            grid,
            cv=3,
        )
        first, again = (seconds(mine, paths, y) for _ in range(2))
        size = FeatureStore(memory).info()["bytes"] / 1e6
    backbone = load_backbone(arguments.backbone, None)
    net = NeuralNetClassifier(
        Script,
        module__backbone=backbone,
        module__trainable=trainable,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        batch_size=arguments.batch_size,
        max_epochs=arguments.epochs,
        iterator_train__shuffle=True,
        train_split=None,
        verbose=0,
    )
    script = GridSearchCV(
        net,
        {
            "lr": RATES,
            "optimizer__weight_decay": DECAYS,
            "module__hidden": HEADS,
        },
        cv=3,
    )
    plain = seconds(script, decoded(paths, backbone), y)
    print(
        f"trainable={trainable!r}: search {first:.1f} s, again {again:.1f} s, "
        f"{size:.0f} MB cached; skorch script {plain:.1f} s: {plain / first:.1f} "
        f"and {plain / again:.1f} times as long",
        flush=True,
    )


def suffix_loop(script: Script, x: Tensor, y: Tensor, size: int) -> list[float]:
    """Train the trainable stages on activations in a plain loop; return epoch times."""
    trainable = script.network[script.n_frozen :]
    optimizer = torch.optim.AdamW(trainable.parameters(), lr=1e-4, weight_decay=1e-2)
    times = [time.perf_counter()]
    for _ in range(3):
        for rows in torch.randperm(len(x)).split(size):
            optimizer.zero_grad()
            F.cross_entropy(trainable(x[rows]), y[rows]).backward()
            nn.utils.clip_grad_norm_(trainable.parameters(), 5.0)
            optimizer.step()
        times.append(time.perf_counter())
    return np.diff(times)[1:].tolist()


def suffix_by_skorch(script: Script, x: Tensor, y: Tensor, size: int) -> list[float]:
    """Train the trainable stages with skorch; return epoch times."""
    net = NeuralNet(
        script.network[script.n_frozen :],
        nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        optimizer__weight_decay=1e-2,
        lr=1e-4,
        batch_size=size,
        max_epochs=3,
        iterator_train__shuffle=True,
        train_split=None,
        callbacks=[GradientNormClipping(5.0)],
        verbose=0,
    ).fit(x, y)
    return net.history[1:, "dur"]


def epochs(arguments: Any, trainable: Any, paths: list[str], y: Any) -> None:
    """Compare the time of an epoch with that of the trainable stages alone."""
    backbone = load_backbone(arguments.backbone, None)
    scripts = Script(backbone, trainable), Script(backbone, trainable)
    x = activations(scripts[0], decoded(paths, backbone))
    target = torch.from_numpy(y)
    loop, by_skorch, mine = [], [], []
    for _ in range(3):
        loop += suffix_loop(scripts[0], x, target, arguments.batch_size)
        by_skorch += suffix_by_skorch(scripts[1], x, target, arguments.batch_size)
        mine.append(seconds_of_an_epoch(arguments, trainable, paths, y))
    a, b, c = (1e3 * float(np.median(times)) for times in (mine, loop, by_skorch))
    print(
        f"trainable={trainable!r}: an epoch {a:.1f} ms; trainable stages alone, on "
        f"activations in memory, {b:.1f} ms by a loop and {c:.1f} ms by skorch: "
        f"{a / b:.2f} and {a / c:.2f} times as long",
        flush=True,
    )


def activations(script: Script, pixels: np.ndarray) -> Tensor:
    """Compute the activations of the frozen stages of a script."""
    frozen = script.network[: script.n_frozen].eval()
    with torch.no_grad():
        x = torch.cat(
            [
                frozen((b / 255 - script.mean) / script.std)
                for b in torch.from_numpy(pixels).permute(0, 3, 1, 2).split(32)
            ]
        )
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def seconds_of_an_epoch(
    arguments: Any, trainable: Any, paths: list[str], y: Any
) -> float:
    """Return the time per epoch, as the difference of a longer and a shorter fit."""
    n_timed = 30 if trainable == "head" else 3
    with tempfile.TemporaryDirectory() as memory:
        classifier = ours(
            arguments, trainable, memory=memory, head_init="random", lr=1e-4
        )
        classifier.set_params(max_epochs=1).fit(paths, y)
        times = []
        for n in (1, 1 + n_timed):
            start = time.perf_counter()
            classifier.set_params(max_epochs=n).fit(paths, y)
            times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / n_timed


def capped(arguments: Any, paths: list[str], y: Any) -> None:
    """Train on activations that exceed the memory limit."""
    limit = 2 * GIGABYTE
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    n = arguments.capped
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        copies = []
        for i in range(n):
            copies.append(str(Path(folder) / f"{i}.jpg"))
            content = Path(paths[i % len(paths)]).read_bytes()
            Path(copies[-1]).write_bytes(content + i.to_bytes(4, "big"))
        classifier = ours(
            arguments,
            1,
            memory=Path(folder) / "memory",
            head_init="random",
            precision="auto",
            verbose=1,
        ).set_params(max_epochs=1)
        start = time.perf_counter()
        classifier.fit(copies, y[np.arange(n) % len(paths)])
        first = time.perf_counter() - start
        start = time.perf_counter()
        classifier.fit(copies, y[np.arange(n) % len(paths)])
        size = FeatureStore(Path(folder) / "memory").info()["bytes"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            f"{n} images, {size / 1e9:.2f} GB of activations, at most "
            f"{limit / 1e9:.1f} GB of data: an epoch in {first:.0f} s, with all "
            f"activations on disk in {time.perf_counter() - start:.0f} s; resident "
            f"{peak / 1e9:.2f} GB at the peak",
        )


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description="Benchmark cached activations")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--trainable", nargs="+", default=["head", "1"])
    # As in the script; the default of FineTunedCNNClassifier is "linear_probe".
    parser.add_argument("--head-init", default="random")
    parser.add_argument("--only", choices=["searches", "epochs"])
    parser.add_argument("--capped", type=int)
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    files = load_files(arguments.data, load_content=False, random_state=0)
    paths, y = list(files.filenames), files.target
    print(
        f"{arguments.backbone}, {platform.machine()}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}, skorch {skorch.__version__}, "
        f"engine={arguments.engine!r}, {len(paths)} images, {arguments.epochs} "
        f"epochs, batches of {arguments.batch_size}",
        flush=True,
    )
    if arguments.capped:
        capped(arguments, paths, y)
        return
    for name in arguments.trainable:
        trainable = int(name) if name.isdigit() else name
        if arguments.only != "searches":
            epochs(arguments, trainable, paths, y)
        if arguments.only != "epochs":
            searches(arguments, trainable, paths, y)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
