"""Engines give the output of torch; unsupported networks fall back to torch."""

import copy
import functools
import gc
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from reference import normalized
from torch import nn
from torchvision.models import VisionTransformer

from sktl._backbones.feature_extractor import FeatureExtractor
from sktl._backbones.register import register_backbone
from sktl._backbones.registry import load_backbone
from sktl._images.preprocessing import Preprocessing
from sktl._inference import engines
from sktl._inference.engines import OpenVINONetwork, TorchNetwork, get_compiled_model
from sktl._inference.execution import ExecutionConfig

SMALL = Preprocessing(resize_size=64, crop_size=64)
PIXELS = np.random.default_rng(1).integers(0, 256, (4, 64, 64, 3), np.uint8)
# The smallest member of each family of convolutional networks in torchvision.
FEW_FAMILIES = ["squeezenet1_1"]
FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "vgg11",
]


def on_cpu(engine="torch", precision="float32"):
    return ExecutionConfig(torch.device("cpu"), precision, engine)


def compiled(name, preprocessing=SMALL, layer="penultimate", **execution):
    backbone = load_backbone(name, None)
    return get_compiled_model(
        (name, layer),
        lambda: FeatureExtractor(backbone, [layer], "avg"),
        preprocessing,
        on_cpu(**execution),
        name=name,
    )


def run(net, pixels=PIXELS):
    return net.start(pixels)()


def expected_features(name, pixels, layer="penultimate"):
    """Compute features with torch alone, without fused BatchNorm."""
    extractor = FeatureExtractor(load_backbone(name, None), [layer], "avg").eval()
    sized = SMALL.with_image_size(pixels.shape[1])
    with torch.inference_mode():
        return extractor(normalized(pixels, sized)).numpy()


@pytest.mark.parametrize(
    "name",
    [
        *FEW_FAMILIES,
        *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES),
    ],
)
def test_openvino_computes_every_family(name):
    side = max(64, load_backbone(name, None).min_size)
    sized = Preprocessing(side, side)
    pixels = np.random.default_rng(2).integers(0, 256, (2, side, side, 3), np.uint8)
    expected = expected_features(name, pixels)
    exact = compiled(name, sized, engine="openvino")
    assert isinstance(exact, OpenVINONetwork)
    got = run(exact, pixels)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    close = compiled(name, sized, engine="openvino", precision="bfloat16")
    assert cosines(run(close, pixels), expected).min() >= 0.999


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is here")
# Of torch 2.10 to itself, when it is imported for this.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_torch_compile_computes_the_same(precision):
    expected = expected_features("five stages", PIXELS)
    net = compiled("five stages", engine="compile", precision=precision)
    got = run(net)
    if precision == "float32":
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    assert cosines(got, expected).min() >= 0.999
    assert set(net._programs.keys()) == {(3, 64, 64, 3), (4, 64, 64, 3)}


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_layers_inside_a_network(engine):
    net = compiled("resnet18", layer="layer2.0.conv1", engine=engine)
    expected = expected_features("resnet18", PIXELS, "layer2.0.conv1")
    np.testing.assert_allclose(run(net), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "pooling"),
    [
        ("penultimate", "avg"),
        pytest.param("stage1", 2, marks=pytest.mark.slow),
        pytest.param("encoder", "cls", marks=pytest.mark.slow),
    ],
)
def test_openvino_interpolates_positions(layer, pooling):
    register_backbone(
        "small vit",
        lambda: VisionTransformer(32, 8, 4, 2, 16, 24, num_classes=3),
        preprocessing=Preprocessing(32, 32),
    )
    backbone = load_backbone("small vit")
    sized = backbone.preprocessing_at(64)
    extractor = FeatureExtractor(backbone, [layer], pooling).eval()
    with torch.inference_mode():
        expected = extractor(normalized(PIXELS, sized)).numpy()
    # As many images as it is traced with, and more.
    net = OpenVINONetwork(extractor, sized, on_cpu("openvino"))
    for n in (2, 4):
        np.testing.assert_allclose(run(net, PIXELS[:n]), expected[:n], atol=1e-4)


class CreatesTensors(nn.Module):
    """Its forward method creates tensors of the default data type."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        weight = torch.linspace(0.1, 1, 3) / torch.arange(1, 4)
        return self.linear(x.mean((2, 3)) * weight + torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize(
    "engine", ["torch", "openvino", pytest.param("compile", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_default_data_type_is_not_used(engine):
    network, rows = CreatesTensors(), []
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            build = functools.partial(copy.deepcopy, network)
            rows.append(
                run(
                    get_compiled_model(
                        (engine, dtype), build, SMALL, on_cpu(engine), name="mine"
                    )
                )
            )
    finally:
        torch.set_default_dtype(torch.float32)
    assert rows[1].dtype == np.float32
    # torch.compile rounds constants that the network computes once.
    rtol = 1e-6 if engine == "compile" else 0
    np.testing.assert_allclose(rows[1], rows[0], rtol=rtol, atol=0)


class Odd(nn.Module):
    """A network that only torch computes correctly."""

    def forward(self, x):
        rows = x.mean((2, 3))
        return rows + rows.detach().numpy().max().item()  # traced as a constant


@pytest.mark.parametrize("engine", ["openvino", "compile"])
def test_unsupported_networks_fall_back_to_torch(engine):
    with pytest.warns(
        RuntimeWarning, match=rf"{engine}' does not support odd.*so torch"
    ):
        net = get_compiled_model(
            ("odd", engine), Odd, SMALL, on_cpu(engine), name="odd"
        )
    expected = run(TorchNetwork(Odd(), SMALL, on_cpu()))
    np.testing.assert_array_equal(run(net), expected)
    assert net.execution.engine == engine  # the one requested
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_compiled_model(("odd", engine), Odd, SMALL, on_cpu(engine), name="odd")


class Unusual(nn.Module):
    """A network with shared, unused and plain tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.tied = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.tied.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(5))
        self.register_buffer("saved", torch.tensor([[1.0, 2, 3]]))
        self.register_buffer("passing", torch.tensor([[4.0, 5, 6]]), persistent=False)
        self.plain = torch.tensor([[7.0, 8, 9]])

    def get_extra_state(self):
        return {"version": 1}

    def forward(self, x):
        x = self.tied(self.first(x).relu()).mean((2, 3))
        return x * self.saved + self.passing + self.plain


def test_openvino_supports_shared_unused_and_plain_tensors():
    mine = Unusual()
    expected = run(TorchNetwork(mine, SMALL, on_cpu()))
    got = run(OpenVINONetwork(mine, SMALL, on_cpu("openvino")))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def doubled(x: torch.Tensor) -> torch.Tensor:
    """Branch on the shape; TorchScript keeps the branch."""
    return 2 * x if x.shape[1] > 2 else x


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_openvino_supports_functions_of_torchscript():
    mine, scripted = Average(), torch.jit.script(doubled)
    expected = 2 * run(TorchNetwork(mine, SMALL, on_cpu()))
    mine.register_forward_hook(lambda *given: scripted(given[-1]))
    got = run(OpenVINONetwork(mine, SMALL, on_cpu("openvino")))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


class Counts(nn.Module):
    """Uses the number of images as a Python number, a constant when traced."""

    def forward(self, x):
        return x.mean((2, 3)).reshape(len(x), -1) * 1.0


@pytest.mark.parametrize(
    "engine", ["openvino", pytest.param("compile", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore:engine=:RuntimeWarning")
def test_a_network_that_uses_the_number_of_images(engine):
    net = get_compiled_model(
        ("counts", engine), Counts, SMALL, on_cpu(engine), name="counts"
    )
    expected = run(TorchNetwork(Counts(), SMALL, on_cpu()))
    np.testing.assert_allclose(run(net), expected, rtol=1e-4, atol=1e-5)


def test_an_engine_with_wrong_output_is_not_used(monkeypatch):
    right = OpenVINONetwork.start
    monkeypatch.setattr(
        OpenVINONetwork, "start", lambda *given: lambda: right(*given)() * 1.001
    )
    with pytest.warns(RuntimeWarning, match=r"output differs from that of torch by"):
        net = get_compiled_model(
            "wrong", Average, SMALL, on_cpu("openvino"), name="average"
        )
    assert isinstance(net, TorchNetwork)


class Average(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_openvino_is_compiled_for_two_shapes_at_most():
    net = compiled("squeezenet1_1", engine="openvino")
    rows = run(net)
    for n in (3, 2, 1):
        np.testing.assert_allclose(run(net, PIXELS[:n]), rows[:n], rtol=1e-4)
    assert len(net._requests) == 2


def test_openvino_uses_the_threads_that_torch_has():
    net = compiled("squeezenet1_1", engine="openvino")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = run(net)
    finally:
        torch.set_num_threads(n_threads)
    np.testing.assert_allclose(one, run(net), rtol=1e-4, atol=1e-6)
    assert {n for _, n in net._requests.keys()} == {1, n_threads}


def test_out_of_memory_in_openvino(monkeypatch):
    net = compiled("squeezenet1_1", engine="openvino")

    def full(*_):
        raise RuntimeError("[CPU] std::bad_alloc: can't allocate 42 bytes")

    monkeypatch.setattr(net, "_request", full)
    with pytest.raises(MemoryError, match="batch of 4 images"):
        net.start(PIXELS)


def test_models_are_shared_and_only_the_last_used_cached():
    assert compiled("squeezenet1_1") is compiled("squeezenet1_1")
    lower = compiled("squeezenet1_1", precision="bfloat16")
    assert lower is not compiled("squeezenet1_1")
    for layer in ("stem", "stage1", "stage2", "stage3", "penultimate"):
        compiled("squeezenet1_1", layer=layer)
    assert len(engines.compiled_models) == engines.compiled_models.max_size


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.slow
def test_dropped_models_free_their_memory(engine):
    def after(numbers):
        for n in numbers:
            layers = [nn.ReLU() for _ in range(100)]
            build = functools.partial(nn.Sequential, *layers, Average())
            get_compiled_model(("deep", n), build, SMALL, on_cpu(engine), name="deep")
        gc.collect()
        return psutil.Process().memory_info().rss

    before = after(range(2 * engines.compiled_models.max_size))
    assert after(range(100, 116)) - before < 10e6  # each trace takes 2.5 MB


def test_threads_share_one_compiled_model():
    nets = []
    threads = [
        threading.Thread(target=lambda: nets.append(compiled("mobilenet_v2")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(net) for net in nets}) == 1


def test_a_compilation_does_not_delay_another_network():
    started, finish = threading.Event(), threading.Event()

    def build_slowly():
        started.set()
        assert finish.wait(30)
        return Average()

    def get(key, build):
        return get_compiled_model(key, build, SMALL, on_cpu(), name="average")

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(get, "slow", build_slowly)
        assert started.wait(30)
        quick = get("quick", Average)
        assert not slow.done()
        finish.set()
        np.testing.assert_array_equal(run(slow.result(30)), run(quick))
