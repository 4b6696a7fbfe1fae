"""
=================================================
What PretrainedFeatures adds to the network's time
=================================================

Two ratios, each of two ways measured in turns in one run:

- one picture through ``transform``, against decoding it and one forward pass of
  torchvision's own network;
- all pictures through ``transform``, against a loop over batches that decodes, stacks
  and runs torchvision's own network.

::

    python examples/benchmarks/overhead.py --data FOLDER --backbone resnet18
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import models

from sktl import PretrainedFeatures

BATCH_SIZE = 32


def ratio(ours: Callable[[], object], plain: Callable[[], object], n: int) -> str:
    """Time two ways in turns, after a warm-up, and compare their medians."""
    seconds: dict[Callable[[], object], list[float]] = {ours: [], plain: []}
    for repeat in range(n + 1):
        for way, times in seconds.items():
            start = time.perf_counter()
            way()
            if repeat:
                times.append(time.perf_counter() - start)
    mine, other = (1000 * float(np.median(times)) for times in seconds.values())
    return f"{mine / other:.2f} ({mine:.1f} ms against {other:.1f} ms, n = {n})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What does PretrainedFeatures add?")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--pictures", type=int, default=128)
    arguments = parser.parse_args()
    paths = sorted(map(str, arguments.data.rglob("*.jpg")))[: arguments.pictures]

    net = models.get_model(arguments.backbone, weights=None).eval()
    transform = models.get_model_weights(arguments.backbone).DEFAULT.transforms()
    features = PretrainedFeatures(arguments.backbone, weights=None)

    def decoded(path: str) -> torch.Tensor:
        with Image.open(path) as picture:
            return transform(picture.convert("RGB"))

    @torch.inference_mode()
    def plain(batch: list[str]) -> None:
        net(torch.stack([decoded(path) for path in batch]))

    def plain_loop() -> None:
        for start in range(0, len(paths), BATCH_SIZE):
            plain(paths[start : start + BATCH_SIZE])

    print(
        f"{arguments.backbone}, {platform.machine()}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}, torchvision {torchvision.__version__}"
    )
    one = ratio(lambda: features.transform(paths[:1]), lambda: plain(paths[:1]), 50)
    print(f"one picture:  {one}")
    every = ratio(lambda: features.transform(paths), plain_loop, 5)
    print(f"{len(paths)} pictures: {every}")


if __name__ == "__main__":
    main()
