"""Checks of one architecture for `coverage.py`, which describes them."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from sktl._backbones.backbone import Backbone
from sktl._backbones.feature_extractor import FeatureExtractor
from sktl._backbones.new_head import replace_head, stage_names
from sktl._backbones.registry import declare_without_weights
from sktl._images.preprocessing import Normalization
from sktl._inference.engines import OpenVINONetwork
from sktl._inference.execution import ExecutionConfig
from sktl._training.network import PartiallyFrozen

CHECKS = ("penultimate", "stages", "fine-tunes", "OpenVINO")
SIDES = (96, 128, 160, 192, 224, 256)
N_IMAGES, N_TRAINING = 3, 2
TOLERANCE = 1e-4  # relative to the largest value
MIN_VARIATION = 1e-3  # so that an error in a part of a network changes its output
CONVOLUTIONS_PER_PRODUCT = 4
PRODUCTS = ("matmul", "__matmul__", "bmm", "einsum", "scaled_dot_product_attention")

Result = dict[str, Any]


class Operations(TorchFunctionMode):
    """Counts the operations that define the kind of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.n_products = self.n_convolutions = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count a call of a function of torch."""
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "conv2d":
            stride = args[3] if len(args) > 3 else (kwargs or {}).get("stride", 1)
            stride = stride if isinstance(stride, int) else max(stride)
            self.n_convolutions += max(args[1].shape[2:]) > stride
        elif name in PRODUCTS and not any(isinstance(a, nn.Parameter) for a in args):
            # A sum of all positions, as in attention pooling, is a single column.
            self.n_products += out.ndim > 2 and min(out.shape[-2:]) > 1
        elif name == "multi_head_attention_forward":
            self.n_products += 1
        return out

    @property
    def kind(self) -> str:
        """Return "CNN", "transformer" or "other"."""
        if CONVOLUTIONS_PER_PRODUCT * self.n_products > self.n_convolutions:
            return "transformer"
        return "CNN" if self.n_convolutions else "other"


def family_of(name: str) -> str:
    """Return the module of timm or torchvision that defines an architecture."""
    if name.startswith("timm/"):
        import timm

        entry = timm.models.model_entrypoint(name.removeprefix("timm/"))
        return str(entry.__module__).rpartition(".")[2]
    module = models.get_model_builder(name).__module__
    return f"torchvision {module.rpartition('.')[2]}"


def make_generic(backbone: Backbone, side: int) -> None:
    """Change constant parameters, such as a scale of 0 that would hide a branch.

    Statistics of BatchNorm become those of random images; otherwise many deep networks
    have the same output for all images.
    """
    network = backbone.network
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() and parameter.min() == parameter.max():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.1)
        network.train().eval()  # removes what LeViT has computed from parameters
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train().momentum = 1.0
        network(images_of(backbone, side))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
            # A small variance beside a large mean magnifies rounding errors.
            norm.running_var.add_(norm.running_mean.square())


def smallest_side(backbone: Backbone) -> int:
    """Return the side of the smallest images that are tried and that work."""
    own = backbone.preprocessing.crop_size
    if backbone.has_fixed_image_size:
        return own
    multiple = backbone.structure.side_multiple
    sides = {-(-side // multiple) * multiple for side in SIDES if side < own}
    for side in sorted(sides):
        try:
            backbone.preprocessing_at(side)
            with torch.inference_mode():
                backbone.network(images_of(backbone, side)[:1])
        except Exception:  # code of any architecture fails in its own way
            continue
        return side
    return own


def images_of(backbone: Backbone, side: int) -> Tensor:
    """Return random images as the network takes them."""
    return Normalization(backbone.preprocessing_at(side))(pixels_of(side))


def pixels_of(side: int) -> Tensor:
    """Return the pixels of random images: areas of different colors, and noise."""
    generator = torch.Generator().manual_seed(0)
    shape = (N_IMAGES, 3, side, side)
    areas = torch.rand(N_IMAGES, 3, 4, 4, generator=generator)
    noise = torch.rand(shape, generator=generator)
    pixels = nn.functional.interpolate(areas, shape[2:]) + noise
    return (pixels / 2 * 255).byte().permute(0, 2, 3, 1).contiguous()


def difference(got: Tensor, expected: Tensor) -> str | None:
    """Return how two outputs differ, or None if they are equal."""
    if not expected.isfinite().all():
        return "not comparable: the output is not finite"
    scale = expected.abs().max()
    if (expected - expected[:1]).abs().max() <= MIN_VARIATION * scale:
        return "not comparable: all images have the same output"
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)[1:]} instead of {tuple(expected.shape)[1:]}"
    largest = float((got - expected).abs().max() / scale)
    return None if largest <= TOLERANCE else f"differs by {largest:.1e}"


def check_penultimate(backbone: Backbone, side: int) -> str | None:
    """Compare the features with those of the network's own methods."""
    network: Any = backbone.network
    x = images_of(backbone, side)
    inputs: list[Tensor] = []
    with torch.inference_mode():
        if backbone.name.startswith("timm/"):
            features = network.forward_features(x)
            inputs.append(network.forward_head(features, pre_logits=True))
        else:
            layers = list(network.modules())
            linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
            last = (linear or [m for m in layers if isinstance(m, nn.Conv2d)])[-1]
            hook = last.register_forward_pre_hook(lambda _, each: inputs.append(*each))
            network(x)
            hook.remove()
        expected = inputs[0].mean((2, 3)) if inputs[0].ndim == 4 else inputs[0]
        extractor = FeatureExtractor(backbone, ["penultimate"], "avg").eval()
        return difference(extractor(x), expected)


def check_stages(backbone: Backbone, side: int) -> str | None:
    """Compare the stages and the head with the network."""
    if backbone.staged_model is None:
        return backbone.reason_without_stages
    x = images_of(backbone, side)
    with torch.inference_mode():
        return difference(backbone.staged_model(x), backbone.network(x))


def check_fine_tuning(backbone: Backbone, side: int) -> str | None:
    """Train one step with frozen stages, and one step of all."""
    network = replace_head(backbone, 2)
    n_stages = len(stage_names(network))
    model = PartiallyFrozen(network, n_stages // 2)
    x = images_of(backbone, side)[:N_TRAINING]
    for n_trainable in (n_stages // 2, n_stages):
        model.unfreeze(n_trainable)
        model.train()
        frozen = network[: model.n_frozen]
        before = copy.deepcopy((frozen.state_dict(), network[0].state_dict()))
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.1
        )
        nn.functional.cross_entropy(model(x), torch.arange(N_TRAINING)).backward()
        optimizer.step()
        if any(
            not torch.equal(v, before[0][k]) for k, v in frozen.state_dict().items()
        ):
            return "frozen stages have changed"
    first = dict(network[0].named_parameters())
    if not any(value.isfinite().all() for value in first.values()):
        return "not comparable: the gradient is not finite"
    if all(torch.equal(value, before[1][name]) for name, value in first.items()):
        return "the first stage has not changed"
    return None


def check_openvino(backbone: Backbone, side: int) -> str | None:
    """Compare the features of OpenVINO with those of torch."""
    if backbone.structure.side_multiple > 1:
        # At other sizes positions are interpolated, and OpenVINO rounds differently.
        side = backbone.preprocessing.crop_size
    extractor = FeatureExtractor(backbone, ["penultimate"], "avg").eval()
    with torch.inference_mode():
        expected = extractor(images_of(backbone, side))
    execution = ExecutionConfig(torch.device("cpu"), "float32", "openvino")
    compiled = OpenVINONetwork(extractor, backbone.preprocessing_at(side), execution)
    rows = compiled.start(pixels_of(side).numpy())()
    return difference(torch.from_numpy(rows), expected)


def attempt(check: Callable[[], str | None]) -> str:
    """Return "yes", or the reason why a check fails."""
    try:
        return check() or "yes"
    except Exception as error:  # whatever fails is what is to be found
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:300]}"


def examine(
    name: str, max_parameters: float, checks: Sequence[str] = CHECKS
) -> Iterator[Result]:
    """Check a network; yield what is known so far."""
    start = time.perf_counter()
    result: Result = {"name": name, "family": family_of(name), "kind": "unknown"}
    yield result
    meta = declare_without_weights(name, None, on_meta=True).network
    result["n_parameters"] = sum(p.numel() for p in meta.parameters())
    del meta
    if result["n_parameters"] > max_parameters:
        result["skipped"] = True
        yield result
        return
    backbone = declare_without_weights(name, None, on_meta=False)
    side = result["side"] = smallest_side(backbone)
    make_generic(backbone, side)
    with torch.inference_mode(), Operations() as operations:
        backbone.network(images_of(backbone, side))
    result["kind"] = operations.kind
    result["n_stages"] = (
        len(backbone.staged_model.stages) if backbone.staged_model else 0
    )
    functions = (check_penultimate, check_stages, check_fine_tuning, check_openvino)
    for check, function in zip(CHECKS, functions, strict=True):
        yield result
        if check in checks:
            result[check] = attempt(partial(function, backbone, side))
        result["seconds"] = round(time.perf_counter() - start, 1)
    yield result
