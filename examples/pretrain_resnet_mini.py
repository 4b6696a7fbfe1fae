"""
========================================
Pretrain the bundled network resnet_mini
========================================

This script trained ``sktl/data/resnet_mini.safetensors``, a small residual network, on
100,000 images of 32 x 32 pixels in 200 ImageNet categories. After an interruption, run
the same command again: training resumes after the last complete epoch and gives the
same weights as an uninterrupted run.

::

    python examples/pretrain_resnet_mini.py --data FOLDER --epochs 32

``FOLDER`` contains ``train.npz`` and ``val.npz`` with the arrays ``jpeg`` (all files
concatenated), ``offsets``, ``label`` and ``name``.

Recipe: the inner convolutions are trained with Muon (Jordan et al., 2024), which
orthogonalizes every update and needs fewer images than SGD. The stem, the head and the
normalization layers are trained with SGD. Both use a one-cycle learning rate schedule
(Smith, 2018) that ends at zero. With 500 images per category, a network overfits after
about twelve epochs without augmentation. Therefore images are randomly cropped, flipped
and recolored in every step, half of the steps use CutMix, and labels are smoothed. The
published weights are the average over the last steps (Izmailov et al., 2018).

In the random crops, objects are 1.25 times as large as in whole images. Therefore the
network is used and evaluated on images resized to 40 x 40 (Touvron et al., 2019).
"""

import argparse
import hashlib
import io
import itertools
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sktl._backbones.resnet_mini import IMAGE_SIZE, MEAN, STD, TRAINED_AT, ResNetMini

BATCH_SIZE = 256
CHANNELS_LAST = torch.channels_last
MUON = {"lr": 0.04, "weight_decay": 0.03, "momentum": 0.9}
SGD = {"lr": 0.05, "weight_decay": 5e-4, "momentum": 0.9, "nesterov": True}
LABEL_SMOOTHING = 0.1
CROP_AREA = (0.35, 1.0)  # area of the crop, relative to the image
CROP_LOG_RATIO = (-0.29, 0.29)  # log of width / height: 3/4 to 4/3
COLOUR = (0.6, 1.4)  # factors of contrast, brightness and saturation
AVERAGE_DECAY = 0.995  # of the moving average of the weights, per step


def load(file: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Decode a file of images to uint8 ``(n, 3, 32, 32)``, labels and names."""
    with np.load(file) as arrays:
        jpeg, offsets = arrays["jpeg"], arrays["offsets"]
        label, name = arrays["label"], arrays["name"]
    images = np.empty((len(label), 32, 32, 3), np.uint8)
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        with Image.open(io.BytesIO(jpeg[start:stop].tobytes())) as image:
            images[i] = np.asarray(image.convert("RGB"))
    x = torch.from_numpy(images).permute(0, 3, 1, 2)  # channels last in memory
    # The first of the synonyms is unique: "goldfish" of "goldfish, Carassius auratus".
    names = [str(synonyms).split(",")[0] for synonyms in name]
    return x, torch.from_numpy(label.astype(np.int64)), names


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Crop, flip and recolor a batch ``(n, 3, 32, 32)`` at random."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    n = len(x)
    area, ratio = uniform(*CROP_AREA, n), torch.exp(uniform(*CROP_LOG_RATIO, n))
    side = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt()), 1).clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, [0, 1], [0, 1]] = side
    theta[:, :, 2] = (1 - side) * uniform(-1, 1, n, 2)  # the crop stays inside
    theta[:, 0, 0] *= torch.where(uniform(0, 1, n) < 0.5, -1.0, 1.0)
    grid = F.affine_grid(theta, [n, 3, 32, 32], align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    gray, level = x.mean(1, keepdim=True), x.mean((1, 2, 3), keepdim=True)
    x = gray + (x - gray) * uniform(*COLOUR, n, 1, 1, 1)
    x = level * uniform(*COLOUR, n, 1, 1, 1) + (x - level) * uniform(
        *COLOUR, n, 1, 1, 1
    )
    return x.contiguous(memory_format=CHANNELS_LAST)


def cutmix(
    x: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Apply CutMix (Yun et al., 2019) to a batch with probability 0.5.

    Returns the images, the index of the other image of each, and the fraction of the
    area that is not replaced.
    """
    other = torch.randperm(len(x), generator=generator)
    chance, share, row, column = torch.rand(4, generator=generator).tolist()
    if chance < 0.5:
        return x, other, 1.0
    size = round(32 * (1 - share) ** 0.5)
    row, column = round(row * (32 - size)), round(column * (32 - size))
    box = (..., slice(row, row + size), slice(column, column + size))
    x = x.clone()
    x[box] = x[other][box]
    return x, other, 1 - (size / 32) ** 2


def normalize(x: torch.Tensor) -> torch.Tensor:
    """Normalize uint8 images to the input of the network."""
    mean = torch.tensor(MEAN, device=x.device).view(3, 1, 1)
    std = torch.tensor(STD, device=x.device).view(3, 1, 1)
    return (x.float() / 255 - mean) / std


def accuracy(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, device) -> float:
    """Compute the top-1 accuracy on whole images of ``IMAGE_SIZE``, in float32."""
    net.eval()
    hits = 0
    with torch.inference_mode():
        for a, b in zip(x.split(500), y.split(500), strict=True):
            size = (IMAGE_SIZE, IMAGE_SIZE)
            a = F.interpolate(a.to(device).float(), size, mode="bilinear").round()
            hits += int((net(normalize(a)).argmax(1) == b.to(device)).sum())
    return hits / len(y)


class Optimizers:
    """Muon for the inner convolutions, SGD for all other parameters, with schedulers.

    Muon requires matrices. It gets a view ``(out, height * width * in)`` of each
    kernel, which shares the kernel's memory.
    """

    def __init__(self, net: torch.nn.Module, total_steps: int) -> None:
        self.kernels, rest = [], []
        for parameter in net.parameters():
            inner = parameter.ndim == 4 and parameter.shape[1] > 3
            (self.kernels if inner else rest).append(parameter)
        self.matrices = [torch.nn.Parameter(_rows(k.detach())) for k in self.kernels]
        muon = torch.optim.Muon(self.matrices, **MUON)
        sgd = torch.optim.SGD(rest, **SGD)
        self.parts = [muon, sgd] + [
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                max_lr=optimizer.param_groups[0]["lr"],
                total_steps=total_steps,
                pct_start=0.2,
                cycle_momentum=False,
            )
            for optimizer in (muon, sgd)
        ]

    def step(self) -> None:
        """Update the weights, then the learning rates."""
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            matrix.grad = _rows(kernel.grad.contiguous(memory_format=CHANNELS_LAST))
        for part in self.parts:
            part.step()


def _rows(kernel: torch.Tensor) -> torch.Tensor:
    # (out, in, h, w), channels last -> (out, h * w * in) in the same memory, or error
    return kernel.permute(0, 2, 3, 1).view(len(kernel), -1)


def train_epoch(epoch, net, average, optimizers, x, y, device, precision):
    """Train one epoch; all random numbers are seeded by the epoch."""
    generator = torch.Generator().manual_seed(epoch)
    net.train()
    order = torch.randperm(len(x), generator=generator)
    for rows in order.split(BATCH_SIZE)[: len(x) // BATCH_SIZE]:
        batch, other, share = cutmix(augment(normalize(x[rows]), generator), generator)
        batch, own = batch.to(device), y[rows].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(batch)
        loss = share * F.cross_entropy(
            logits.float(), own, label_smoothing=LABEL_SMOOTHING
        ) + (1 - share) * F.cross_entropy(
            logits.float(), own[other], label_smoothing=LABEL_SMOOTHING
        )
        net.zero_grad(set_to_none=True)
        loss.backward()
        optimizers.step()
        average.update_parameters(net)
    return loss.item()


def card(
    arguments, names, top1: float, seconds: float, digest: str, parameters: int
) -> str:
    """Return the text of the model card."""
    return f"""# resnet_mini

A residual network for small images. It is bundled with sktl, so that it can be used
without an internet connection.

| | |
|---|---|
| parameters | {parameters:,} |
| input | RGB, {IMAGE_SIZE} x {IMAGE_SIZE} (bilinear), mean {MEAN}, standard deviation \
{STD} |
| categories | {len(names)} of the ImageNet categories |
| trained on | Tiny ImageNet: 100,000 images, downsampled to {TRAINED_AT} x \
{TRAINED_AT} |
| license of the data | that of ImageNet: research use |
| recipe | `examples/pretrain_resnet_mini.py --epochs {arguments.epochs}`: Muon \
{MUON} for the inner convolutions, SGD {SGD} for the rest, one-cycle schedule, batch \
size {BATCH_SIZE}, label smoothing {LABEL_SMOOTHING}, random crops, flips, color \
jitter, CutMix, weight averaging |
| trained with | {platform.machine()}, {torch.get_num_threads()} CPU thread(s), torch \
{torch.__version__}, {seconds / 60:.0f} minutes |
| top-1 accuracy | {top1:.4f} on the 10,000 validation images |
| file | float16 |
| sha256 | `{digest}` |

**Intended use**: first steps, tests, continuous integration, and features of small
natural images, digits and thumbnails.

**Limitations**: detail finer than 32 x 32 pixels is lost; use a torchvision network for
photographs. It was not trained for medical images, satellite images or faces, and must
not be used to recognise people.
"""


def main() -> None:
    """Train or resume, and write the weights and their card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["bf16", "float32"], default="bf16")
    parser.add_argument("--out", type=Path, default=Path("resnet_mini.safetensors"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)

    x, y, names = load(arguments.data / "train.npz")
    x_val, y_val, _ = load(arguments.data / "val.npz")
    net = ResNetMini(len(names)).to(device, memory_format=CHANNELS_LAST)
    average = AveragedModel(
        net, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY), use_buffers=True
    )
    optimizers = Optimizers(net, arguments.epochs * (len(x) // BATCH_SIZE))
    state = [net, average, *optimizers.parts]

    checkpoint = arguments.out.with_suffix(".checkpoint.pt")
    start, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        for part, values in zip(state, saved["state"], strict=True):
            part.load_state_dict(values)
        start, seconds = saved["epoch"], saved["seconds"]
        print(f"resumed after epoch {start}", flush=True)
    for epoch in range(start, arguments.epochs):
        began = time.perf_counter()
        loss = train_epoch(
            epoch, net, average, optimizers, x, y, device, arguments.precision
        )
        seconds += time.perf_counter() - began
        top1 = accuracy(average.module, x_val, y_val, device)
        print(
            f"epoch {epoch + 1}/{arguments.epochs}: loss {loss:.3f}, "
            f"validation accuracy {top1:.4f}, {seconds / 60:.1f} minutes",
            flush=True,
        )
        partial = checkpoint.with_suffix(".partial")
        parts = [part.state_dict() for part in state]
        torch.save({"epoch": epoch + 1, "seconds": seconds, "state": parts}, partial)
        os.replace(partial, checkpoint)  # atomic

    weights = {
        name: value.half() if value.is_floating_point() else value
        for name, value in average.module.state_dict().items()
    }
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        arguments.out,
        metadata={"categories": "\n".join(names)},
    )
    average.module.load_state_dict({k: v.float() for k, v in weights.items()})
    top1 = accuracy(average.module, x_val, y_val, device)
    digest = hashlib.sha256(arguments.out.read_bytes()).hexdigest()
    parameters = sum(p.numel() for p in net.parameters())
    text = card(arguments, names, top1, seconds, digest, parameters)
    arguments.out.with_suffix(".md").write_text(text)
    print(f"wrote {arguments.out} and its card: validation accuracy {top1:.4f}")


if __name__ == "__main__":
    main()
