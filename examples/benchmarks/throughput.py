"""
==============================================
Benchmark the throughput of feature extraction
==============================================

The benchmark extracts features from JPEG files on the CPU. These methods run
alternately in one process, on the same photographs with the same network:

- torchvision's network, one image at a time;
- a plain loop, which decodes and stacks 32 images and runs the network: the reference
  for the other methods;
- the same with a ``DataLoader`` of two running workers;
- `PretrainedFeatures`, with all engines and precisions;
- embetter, img2vec_pytorch and thingsvision, if installed, used as in their
  documentation.

The limit of the throughput is 1 / (1 / decoding + 1 / network), where decoding uses all
threads and the network runs on decoded pixels. Both are measured too. Finally, the time
of a single image is measured.

::

    python examples/benchmarks/throughput.py --data FOLDER --backbone resnet18

``--scale ENGINE PRECISION`` measures time and memory for 1,000 to 20,000 images
instead. Weights are random, which does not affect the time, and nothing is downloaded.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import platform
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models

import sktl
from sktl import PretrainedFeatures
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._images.sequence import ImageSequence
from sktl._inference import engines, execution
from sktl._inference.execution import ExecutionConfig
from sktl._inference.model_spec import ModelSpec
from sktl._inference.parallel import map_in_threads

BATCH_SIZE = 32
N_CALLS = 50  # with one image
BASE = "plain loop"
DECODING = "decoding alone"
PLAIN = ("torch", "float32")
PEERS = ("embetter", "img2vec_pytorch", "thingsvision")
TIMM_NAMES = {
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "vit_b_16": "vit_base_patch16_224",
}

Method = Callable[[], Any]  # returns one row per image
Builder = Callable[[], Method]
Setting = tuple[str, str]  # engine and precision


class Photographs(Dataset):
    """Dataset of preprocessed photographs for a network of torchvision."""

    def __init__(self, paths: list[str], backbone: str) -> None:
        self.paths = paths
        self.transform = models.get_model_weights(backbone).DEFAULT.transforms()

    def __len__(self) -> int:
        """Return the number of photographs."""
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        """Decode, resize, crop and normalize one photograph."""
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))


def torchvision_network(backbone: str) -> nn.Module:
    """Return a network without its last linear layer."""
    network = models.get_model(backbone, weights=None).eval()
    linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    if linear:
        network.set_submodule(linear[-1], nn.Identity())
    return network


def in_batches(backbone: str, paths: list[str], batch_size: int) -> Method:
    """Return a loop that decodes and stacks a batch and runs the network."""
    network = torchvision_network(backbone)
    photographs = Photographs(paths, backbone)

    @torch.inference_mode()
    def method() -> torch.Tensor:
        rows = []
        for start in range(0, len(paths), batch_size):
            batch = range(start, min(start + batch_size, len(paths)))
            rows.append(network(torch.stack([photographs[i] for i in batch])))
        return torch.cat(rows)

    return method


def data_loader(backbone: str, paths: list[str]) -> Method:
    """Return a loop over a DataLoader, whose two workers start in the warm-up."""
    network = torchvision_network(backbone)
    loader = DataLoader(
        Photographs(paths, backbone),
        batch_size=BATCH_SIZE,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )

    @torch.inference_mode()
    def method() -> torch.Tensor:
        return torch.cat([network(batch) for batch in loader])

    return method


def ours(backbone: str, engine: str, precision: str) -> PretrainedFeatures:
    """Return the transformer, with defaults for all other parameters."""
    return PretrainedFeatures(
        backbone, weights=None, device="cpu", engine=engine, precision=precision
    )


def features(backbone: str, paths: list[str], engine: str, precision: str) -> Method:
    """Return the `transform` of sktl on the paths."""
    return partial(ours(backbone, engine, precision).transform, paths)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output and warnings of another library."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def embetter(backbone: str, paths: list[str], directory: str) -> Method:
    """Use embetter as documented: a pipeline of ImageLoader and TimmEncoder.

    It has no batch size: the network gets one image at a time. The network is in
    training mode, so BatchNorm normalizes each image by its own statistics.
    """
    import timm
    from embetter.vision import ImageLoader, TimmEncoder
    from sklearn.pipeline import make_pipeline

    # It always loads pretrained weights. Random weights take the same time.
    create = timm.create_model

    def without_weights(name: str, pretrained: bool = False, **keywords: Any) -> Any:
        return create(name, pretrained=False, **keywords)

    with mock.patch.object(timm, "create_model", without_weights):
        encoder = TimmEncoder(name=TIMM_NAMES.get(backbone, backbone))
    pipeline = make_pipeline(ImageLoader(convert="RGB"), encoder)
    return partial(pipeline.fit_transform, paths)


def img2vec_pytorch(backbone: str, paths: list[str], directory: str) -> Method:
    """Use img2vec_pytorch as documented: get_vec of a batch of PIL images."""
    from img2vec_pytorch import Img2Vec
    from torchvision.models._api import WeightsEnum

    # It always downloads pretrained weights, which are replaced by random weights.
    def random_weights(weights: Any, *args: Any, **keywords: Any) -> Any:
        return models.get_model(backbone, weights=None).state_dict()

    with mock.patch.object(WeightsEnum, "get_state_dict", random_weights):
        img2vec = Img2Vec(model=backbone)

    def method() -> np.ndarray:
        rows = []
        for start in range(0, len(paths), BATCH_SIZE):
            batch = paths[start : start + BATCH_SIZE]
            images = [Image.open(path).convert("RGB") for path in batch]
            rows.append(img2vec.get_vec(images))
        return np.concatenate(rows)

    return method


def thingsvision(backbone: str, paths: list[str], directory: str) -> Method:
    """Use thingsvision as documented: get_extractor, DataLoader, extract_features.

    Its DataLoader has no workers. It reads a folder, here of links to the photographs.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # It requires NumPy 1, of which the functions used here need only this name.
    vars(np).setdefault("AxisError", np.exceptions.AxisError)
    # It imports TensorFlow, after which importing Triton crashes the process.
    importlib.import_module("torch._dynamo")
    from thingsvision import get_extractor
    from thingsvision.utils import data

    os.makedirs(f"{directory}/photographs")
    for i, path in enumerate(paths):
        os.symlink(os.path.abspath(path), f"{directory}/photographs/{i:06}.jpg")
    extractor = get_extractor(
        model_name=backbone, source="torchvision", device="cpu", pretrained=False
    )
    backend = extractor.get_backend()

    def method() -> np.ndarray:
        dataset = data.ImageDataset(
            root=f"{directory}/photographs",
            out_path=f"{directory}/order",
            backend=backend,
            transforms=extractor.get_transformations(resize_dim=256, crop_dim=224),
        )
        return extractor.extract_features(
            batches=data.DataLoader(
                dataset=dataset, batch_size=BATCH_SIZE, backend=backend
            ),
            module_name="avgpool",
            flatten_acts=True,
            output_type="ndarray",
        )

    return method


def peer(name: str, *arguments: Any) -> Method:
    """Return the method of another library, without its output."""
    with quiet():
        method = globals()[name](*arguments)

    def quietly() -> Any:
        with quiet():
            return method()

    return quietly


def decoding(backbone: str, paths: list[str]) -> Method:
    """Decode, resize and crop as sktl does, on as many threads as torch has."""
    preprocessing = load_backbone(backbone, None).preprocessing
    images = ImageSequence(paths, "auto")

    def load(i: int) -> np.ndarray:
        return preprocessing(images[i])

    def method() -> list[np.ndarray]:
        n_threads = torch.get_num_threads()
        order = range(len(paths))
        return list(
            map_in_threads(load, order, n_threads=n_threads, n_ahead=2 * BATCH_SIZE)
        )

    return method


def network_alone(
    backbone: str, pixels: np.ndarray, engine: str, precision: str, batch_size: int
) -> Method:
    """Run the network of an engine on pixels ``(n, side, side, 3)``, uint8."""
    loaded = load_backbone(backbone, None)
    transformer = ours(backbone, engine, precision)
    network = ModelSpec(
        BackboneSpec.to(loaded, None),
        ("penultimate",),
        transformer.pooling,
        loaded.preprocessing,
        ExecutionConfig.from_estimator(transformer),
    ).compile()
    batches = [
        pixels[start : start + batch_size]
        for start in range(0, len(pixels), batch_size)
    ]
    return lambda: np.concatenate([network.start(batch)() for batch in batches])


def keep_all_networks() -> contextlib.AbstractContextManager[Any]:
    """Let sktl keep the networks of all methods; by default it keeps the last few."""
    return mock.patch.object(engines.compiled_models, "max_size", 100)


def in_turns(
    builders: dict[str, Builder], n_rounds: int, n_rows: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Build all methods, warm them up, then time each once per round.

    Returns
    -------
    seconds : dict of list of float
        Times of each method that works.
    reasons : dict of str
        Errors of the other methods.
    """
    methods, reasons = {}, {}
    for name, build in builders.items():
        try:
            methods[name] = build()
            rows = methods[name]()
        except Exception as error:  # of a library or engine; the others continue
            reason = f"{type(error).__name__}: {error}"
            reasons[name] = textwrap.shorten(reason, 150)
            methods.pop(name, None)
        else:
            assert len(rows) == n_rows, name
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(n_rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
    return seconds, reasons


def parts_of(
    backbone: str, paths: list[str], settings: list[Setting]
) -> dict[str, Builder]:
    """Return the two parts of every method: decoding, and the network alone."""
    pixels = np.stack(decoding(backbone, paths)())
    return {DECODING: partial(decoding, backbone, paths)} | {
        network_of(setting): partial(
            network_alone, backbone, pixels, *setting, BATCH_SIZE
        )
        for setting in settings
    }


def network_of(setting: Setting) -> str:
    """Return the name of the measurement of a network alone."""
    return f"network alone, {' '.join(setting)}"


def methods_of(
    backbone: str, paths: list[str], settings: list[Setting], directory: str
) -> dict[str, tuple[Setting, Builder]]:
    """Return all methods, each with the engine and precision of its limit.

    Methods other than sktl are compared with the limit of torch in float32.
    """
    others: dict[str, Builder] = {
        "one at a time": partial(in_batches, backbone, paths, 1),
        BASE: partial(in_batches, backbone, paths, BATCH_SIZE),
        "DataLoader": partial(data_loader, backbone, paths),
    }
    peers: dict[str, Builder] = {
        name: partial(peer, name, backbone, paths, directory)
        for name in PEERS
        if importlib.util.find_spec(name)
    }
    of_sktl = {
        f"sktl, {' '.join(setting)}": (
            setting,
            partial(features, backbone, paths, *setting),
        )
        for setting in settings
    }
    return (
        {name: (PLAIN, build) for name, build in others.items()}
        | of_sktl
        | {name: (PLAIN, build) for name, build in peers.items()}
    )


def rates(
    arguments: argparse.Namespace, paths: list[str], settings: list[Setting]
) -> None:
    """Measure all methods and print a table."""
    n = len(paths)
    parts = parts_of(arguments.backbone, paths, list(dict.fromkeys([PLAIN, *settings])))
    with tempfile.TemporaryDirectory() as directory:
        methods = {
            name: method
            for name, method in methods_of(
                arguments.backbone, paths, settings, directory
            ).items()
            if name == BASE or not any(skipped in name for skipped in arguments.skip)
        }
        builders = parts | {name: build for name, (_, build) in methods.items()}
        seconds, reasons = in_turns(builders, arguments.rounds, n)

    rate = {name: n / float(np.median(times)) for name, times in seconds.items()}
    print(
        "| method | images/s | slowest and fastest round | ratio to plain loop "
        "| ratio to limit |"
    )
    print("|---|---|---|---|---|")
    for name, times in seconds.items():
        cells = [f"{rate[name]:.1f}", f"{n / max(times):.1f}, {n / min(times):.1f}"]
        if name in methods:
            network = rate[network_of(methods[name][0])]
            limit = 1 / (1 / rate[DECODING] + 1 / network)
            cells += [f"{rate[name] / rate[BASE]:.2f}", f"{rate[name] / limit:.2f}"]
        print("|", " | ".join([name, *cells, "", ""][:5]), "|")
    for name, reason in reasons.items():
        print(f"not measured: {name}. {reason}")


def latency(arguments: argparse.Namespace, path: str, settings: list[Setting]) -> None:
    """Time one image: `transform`, its two parts, and torchvision's network.

    The first call, which compiles the network, is not measured.
    """
    backbone = arguments.backbone
    pixels = np.stack(decoding(backbone, [path])())
    print(
        "\n| one image | transform, ms | decoding + network, ms | ratio | "
        "torchvision, ms | ratio |\n|---|---|---|---|---|---|"
    )
    for setting in settings:
        builders: dict[str, Builder] = {
            "transform": partial(features, backbone, [path], *setting),
            "decoding": partial(decoding, backbone, [path]),
            "network": partial(network_alone, backbone, pixels, *setting, 1),
            "torchvision": partial(in_batches, backbone, [path], 1),
        }
        seconds, reasons = in_turns(builders, N_CALLS, 1)
        if reasons:
            continue  # reported before
        transform, decode, network, plain = (
            1000 * float(np.median(seconds[name])) for name in builders
        )
        print(
            f"| sktl, {' '.join(setting)} | {transform:.2f} | {decode:.2f} + "
            f"{network:.2f} | {transform / (decode + network):.2f} | {plain:.2f} | "
            f"{transform / plain:.2f} |"
        )


def scaled(
    backbone: str, paths: list[str], engine: str, precision: str
) -> tuple[float, float]:
    """Return the time of `transform` and the peak memory without its rows, in MB."""
    import resource  # not on Windows

    transformer = ours(backbone, engine, precision)
    transformer.transform(paths[:BATCH_SIZE])
    start = time.perf_counter()
    rows = transformer.transform(paths)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    in_bytes = peak * (1 if sys.platform == "darwin" else 1024)
    return seconds, (in_bytes - rows.nbytes) / 1e6


def scale(arguments: argparse.Namespace, paths: list[str]) -> None:
    """Transform increasing numbers of images, each number in a new process."""
    engine, precision = arguments.scale
    print(f"\n| images, {engine} {precision} | s per 1,000 | peak without rows, MB |")
    print("|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    for n in arguments.sizes:
        many = [paths[i % len(paths)] for i in range(n)]
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            job = pool.submit(scaled, arguments.backbone, many, engine, precision)
            seconds, peak = job.result()
        print(f"| {n:,} | {1000 * seconds / n:.2f} | {peak:.0f} |", flush=True)


def processor() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def version(name: str) -> str:
    """Return the name of a package with its version."""
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name} absent"


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description="Images per second")
    parser.add_argument("--data", type=Path, required=True, help="folder with JPEGs")
    parser.add_argument("--backbone", default="resnet18", help="of torchvision")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="add engine 'compile'")
    parser.add_argument("--precisions", nargs="+", help="default: float32 and 'auto'")
    parser.add_argument("--skip", nargs="+", default=[], help="substrings of methods")
    parser.add_argument("--scale", nargs=2, metavar=("ENGINE", "PRECISION"))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000, 5000, 20000])
    arguments = parser.parse_args()

    found = sorted(
        str(path)
        for path in arguments.data.rglob("*")
        if path.suffix.lower() in {".jpg", ".jpeg"}
    )
    n = min(arguments.images, len(found)) // BATCH_SIZE * BATCH_SIZE
    if not n:
        parser.error(f"at least {BATCH_SIZE} images are needed, for a batch")
    paths = found[:n]
    print(
        f"{arguments.backbone}, {n} images, batches of {BATCH_SIZE}, "
        f"{arguments.rounds} rounds\n{processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads\nPython {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"{version('openvino')}, {version('pillow')}, sktl {sktl.__version__}, "
        f"{', '.join(map(version, PEERS))}\n",
        flush=True,
    )
    if arguments.scale:
        scale(arguments, paths)
        return

    engines = ["torch"]
    if importlib.util.find_spec("openvino"):
        engines.append("openvino")
    if arguments.compile:
        engines.append("compile")
    best = execution.resolve_precision("auto", torch.device("cpu"))
    precisions = arguments.precisions or list(dict.fromkeys(["float32", best]))
    settings = [
        setting
        for setting in itertools.product(engines, precisions)
        if not any(
            skipped in f"sktl, {' '.join(setting)}" for skipped in arguments.skip
        )
    ]
    # A fallback to torch must not be reported as another engine.
    warnings.filterwarnings("error", message="engine=", category=RuntimeWarning)
    with keep_all_networks():
        rates(arguments, paths, settings)
        latency(arguments, paths[0], settings)


if __name__ == "__main__":
    main()
