"""
==============================================
How the bundled network, resnet_mini, was made
==============================================

The recipe behind ``sktl/data/resnet_mini.safetensors``: a small residual network is
trained on 100,000 pictures of 32 x 32 pixels in 200 ImageNet categories. It stops and
resumes: run the same command again after it was killed, and it goes on after the last
whole epoch with the same numbers it would have had.

::

    python examples/pretrain_resnet_mini.py --data FOLDER --epochs 12

``FOLDER`` holds ``train.npz`` and ``val.npz`` with the arrays ``jpeg`` (all files end
to end), ``offsets``, ``label`` and ``name``.

Recipe: SGD with Nesterov momentum under a one-cycle rate (Smith, 2018), label
smoothing, flips and shifts, the first epochs at 24 x 24 pixels (progressive resizing,
as in fast.ai), and the average of the weights over the last steps (Izmailov et al.,
2018). The average is what is shipped.
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

from sktl._resnet_mini import MEAN, STD, ResNetMini

BATCH_SIZE = 256
PEAK_LR = 0.15
WEIGHT_DECAY = 5e-4
SMALL_SIDE = 24  # pixels; of the epochs before FULL_SIZE_FROM
FULL_SIZE_FROM = 0.55  # fraction of the epochs


def load(file: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Decode a file of pictures to uint8 ``(n, 3, 32, 32)``, labels and names."""
    with np.load(file) as arrays:
        jpeg, offsets = arrays["jpeg"], arrays["offsets"]
        label, name = arrays["label"], arrays["name"]
    pictures = np.empty((len(label), 32, 32, 3), np.uint8)
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        with Image.open(io.BytesIO(jpeg[start:stop].tobytes())) as picture:
            pictures[i] = np.asarray(picture.convert("RGB"))
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2)  # channels last in memory
    # "goldfish, Carassius auratus" is readable, and unique, without its synonyms.
    names = [str(synonyms).split(",")[0] for synonyms in name]
    return x, torch.from_numpy(label.astype(np.int64)), names


def augment(x: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    """Flip half of ``(n, 3, 32, 32)``, shift each by up to 4 pixels, resize."""
    n = len(x)
    flip = torch.rand(n, generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")  # (n, 3, 40, 40)
    shift = torch.randint(0, 9, (2, n), generator=generator)
    rows = shift[0][:, None] + torch.arange(32)  # (n, 32)
    columns = shift[1][:, None] + torch.arange(32)
    every = torch.arange(n)[:, None, None]
    x = padded.permute(0, 2, 3, 1)[every, rows[:, :, None], columns[:, None, :]]
    x = x.permute(0, 3, 1, 2)  # (n, 3, 32, 32), channels last
    if side != 32:
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
    return x.contiguous(memory_format=torch.channels_last)


def normalize(x: torch.Tensor) -> torch.Tensor:
    """Turn uint8 pictures into what the network was built for."""
    mean = torch.tensor(MEAN, device=x.device).view(3, 1, 1)
    std = torch.tensor(STD, device=x.device).view(3, 1, 1)
    return (x.float() / 255 - mean) / std


def accuracy(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, device) -> float:
    """Top-1 accuracy on whole pictures, in float32."""
    net.eval()
    with torch.inference_mode():
        hits = sum(
            int((net(normalize(a.to(device))).argmax(1) == b.to(device)).sum())
            for a, b in zip(x.split(500), y.split(500), strict=True)
        )
    return hits / len(y)


def train_epoch(epoch, state, x, y, device, precision, epochs):
    """One pass over the pictures; everything random comes from the epoch's number."""
    net, average, optimizer, schedule = state
    generator = torch.Generator().manual_seed(epoch)
    side = SMALL_SIDE if epoch < FULL_SIZE_FROM * epochs else 32
    net.train()
    order = torch.randperm(len(x), generator=generator)
    for rows in order.split(BATCH_SIZE)[: len(x) // BATCH_SIZE]:
        batch = augment(normalize(x[rows]), side, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(batch)
        loss = F.cross_entropy(logits.float(), y[rows].to(device), label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(net)
    return loss.item()


def card(
    arguments, names, top1: float, seconds: float, digest: str, parameters: int
) -> str:
    """Text of the card that lies beside the weights."""
    return f"""# resnet_mini

A residual network for 32 x 32 pictures, bundled with sktl so that everything works
without a network connection.

| | |
|---|---|
| parameters | {parameters:,} |
| input | RGB, 32 x 32, mean {MEAN}, standard deviation {STD} |
| categories | {len(names)} of ImageNet's |
| trained on | Tiny ImageNet: 100,000 pictures, reduced to 32 x 32 |
| terms of the data | ImageNet's: research use |
| recipe | `examples/pretrain_resnet_mini.py --epochs {arguments.epochs}`: SGD, \
one cycle to a rate of {PEAK_LR}, batch {BATCH_SIZE}, weight decay {WEIGHT_DECAY}, \
label smoothing 0.1, flips and shifts, {SMALL_SIDE} x {SMALL_SIDE} pixels in the \
first {FULL_SIZE_FROM:.0%} of the epochs, averaged weights |
| made on | {platform.machine()}, {torch.get_num_threads()} CPU thread(s), torch \
{torch.__version__}, {seconds / 60:.0f} minutes |
| top-1 accuracy | {top1:.4f} on the 10,000 validation pictures |
| file | float16 |
| sha256 | `{digest}` |

**Good for** first steps, tests, continuous integration, small natural pictures, and
as features of pictures that are small anyway (digits, thumbnails).

**Bad for** anything that needs detail finer than 32 x 32 pixels: use a network of
torchvision for photographs. It has seen neither medical nor satellite pictures nor
faces, and must not be used to recognise people.
"""


def main() -> None:
    """Train, resume, and write the file and its card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["bf16", "float32"], default="bf16")
    parser.add_argument("--out", type=Path, default=Path("resnet_mini.safetensors"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)

    x, y, names = load(arguments.data / "train.npz")
    x_val, y_val, _ = load(arguments.data / "val.npz")
    net = ResNetMini(len(names)).to(device, memory_format=torch.channels_last)
    average = AveragedModel(
        net, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    decay = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": plain}],
        lr=PEAK_LR,
        momentum=0.9,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=PEAK_LR,
        total_steps=arguments.epochs * (len(x) // BATCH_SIZE),
        pct_start=0.2,
        cycle_momentum=False,
    )
    state = (net, average, optimizer, schedule)

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
            epoch, state, x, y, device, arguments.precision, arguments.epochs
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
        os.replace(partial, checkpoint)  # a kill leaves the old or the new, whole

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
