"""The forward loop, compared with a plain loop over images."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from sktl import PretrainedFeatures
from sktl._backbones.feature_extractor import FeatureExtractor
from sktl._backbones.registry import load_backbone
from sktl._images.preprocessing import Preprocessing
from sktl._images.validation import validate_images
from sktl._inference import engines
from sktl._inference.engines import TorchNetwork, get_compiled_model
from sktl._inference.execution import ExecutionConfig, import_openvino
from sktl._inference.forward import forward

SMALL = Preprocessing(resize_size=32, crop_size=32)
EACH_ENGINE = pytest.mark.parametrize("engine", ["torch", "openvino"])


@pytest.fixture(scope="module")
def images(images):
    """PIL images, as `forward` takes them."""
    return [Image.fromarray(image) for image in images]


def on_cpu(precision="float32", engine="torch", **options):
    return ExecutionConfig(torch.device("cpu"), precision, engine, **options)


def network(name, precision="float32", layer="penultimate", engine="torch"):
    backbone = load_backbone(name, None)
    return get_compiled_model(
        (name, layer),
        lambda: FeatureExtractor(backbone, [layer], "avg"),
        SMALL,
        on_cpu(precision, engine),
        name=name,
    )


def run(net, images, batch_size=8, precision="float32", **options):
    if isinstance(net, nn.Module):
        net = TorchNetwork(net, SMALL, on_cpu(precision))
    execution = on_cpu(precision, batch_size=batch_size, **options)
    return forward(net, images, SMALL, execution.for_n_samples(len(images)))


@EACH_ENGINE
def test_equals_a_plain_loop(images, engine):
    backbone = load_backbone("resnet18", None)
    transform = models.ResNet18_Weights.DEFAULT.transforms(crop_size=32, resize_size=32)
    net = nn.Sequential(*list(backbone.network.children())[:-1], nn.Flatten())
    with torch.inference_mode():
        expected = torch.cat([net(transform(image)[None]) for image in images]).numpy()
    got = run(network("resnet18", engine=engine), images)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@EACH_ENGINE
def test_a_row_does_not_depend_on_other_images(images, engine):
    net = network("squeezenet1_1", engine=engine)
    rows = run(net, images)
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = run(net, [images[i] for i in order], n_jobs=2)
    np.testing.assert_array_equal(shuffled, rows[order])
    fewer = run(net, images[:11])
    np.testing.assert_array_equal(fewer, rows[:11])


@EACH_ENGINE
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_sizes_agree_up_to_rounding(images, batch_size, engine):
    net = network("squeezenet1_1", engine=engine)
    rows = run(net, images)
    other = run(net, images, batch_size=batch_size)
    assert np.abs(other - rows).max() <= 1e-5 * np.abs(rows).max()


def test_small_calls_run_one_image_at_a_time(images):
    seen = []

    class Recorder(nn.Module):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return x.mean((2, 3))

    run(Recorder(), images[:1], batch_size=32)
    run(Recorder(), images[:3], batch_size=32)
    assert seen == [(1, 3, 32, 32)] * 4
    seen.clear()
    assert run(Recorder(), images[:11], batch_size=8).shape == (11, 3)
    assert seen == [(8, 3, 32, 32)] * 2


def openvino_precisions():
    """Return the lower precisions that OpenVINO uses on this processor."""
    names = {"BF16": "bfloat16", "FP16": "float16"}
    core = import_openvino().Core()
    found = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {names[name] for name in found if name in names}


@EACH_ENGINE
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_close_and_returns_float32(images, precision, engine):
    expected = run(network("squeezenet1_1"), images)
    got = run(network("squeezenet1_1", precision, engine=engine), images)
    assert got.dtype == np.float32
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((got * expected).sum(1) / lengths).min() >= 0.999
    if engine == "torch" or precision in openvino_precisions():
        assert not np.array_equal(got, expected)


@EACH_ENGINE
def test_global_state_is_unchanged(images, engine):
    state = torch.get_rng_state()
    engines.compiled_models.clear()
    run(network("resnet18", engine=engine), images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not load_backbone("resnet18", None).network.training


@EACH_ENGINE
def test_threads_may_share_a_model(images, engine):
    net = network("resnet18", layer="layer1", engine=engine)
    halves = images[:16], images[16:32]
    expected = [run(net, half) for half in halves]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            got = list(pool.map(lambda half: run(net, half), halves))
            for rows, wanted in zip(got, expected, strict=True):
                np.testing.assert_array_equal(rows, wanted)


def test_two_passes_at_the_same_time_have_their_own_rows():
    both_inside = threading.Barrier(2, timeout=10)
    backbone = copy.deepcopy(load_backbone("tiny"))

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            both_inside.wait()  # but not where the constructor measures the layout

    backbone.network.stages["stage1"].register_forward_pre_hook(wait)
    extractor = FeatureExtractor(backbone, ["stages.stem", "penultimate"], "avg").eval()
    x = torch.randn(2, 1, 3, 16, 16)
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        first, second = pool.map(extractor, x)
    stem = backbone.network.stages["stem"]
    for rows, image in ((first, x[0]), (second, x[1])):
        torch.testing.assert_close(rows[:, :8], stem(image).mean((2, 3)))


def test_images_are_decoded_at_most_two_batches_ahead(images):
    asked, furthest = [0], [0]

    class Lazy(list):
        def __getitem__(self, i):
            asked.append(i)
            return images[i]

    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.02)
            furthest.append(max(asked))
            return x.mean((2, 3))

    run(Slow(), Lazy(images), batch_size=4)
    done = 4 * np.arange(1, len(furthest))
    assert (np.array(furthest[1:]) - done < 2 * 4 + 2).all()
    assert (np.array(furthest[1:-2]) >= done[:-2]).any()  # and decoding does run ahead


class _Broken(list):
    def __init__(self, images, row, error):
        super().__init__(images)
        self._row, self._error = row, error

    def __getitem__(self, i):
        if i == self._row:
            raise self._error
        return super().__getitem__(i)


@pytest.mark.parametrize("error", [ValueError("X[9] is bad"), KeyboardInterrupt()])
def test_errors_are_raised_and_threads_end(images, error):
    before = set(threading.enumerate())  # other libraries start threads, too
    with pytest.raises(type(error)):
        run(network("tiny"), _Broken(images, 9, error), batch_size=4, n_jobs=3)
    assert set(threading.enumerate()) <= before


def test_out_of_memory_raises_memory_error(images):
    class OutOfMemory(nn.Module):
        def forward(self, x):
            return torch.empty(2**60)

    with pytest.raises(MemoryError, match=r"batch of 8 images .* Reduce batch_size"):
        run(OutOfMemory(), images)
    other = _Raises(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(other, images)


class _Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self._error = error

    def forward(self, x):
        raise self._error


def test_an_output_that_is_not_finite_raises_an_error(images):
    class Overflow(nn.Module):
        def forward(self, x):
            out = x.mean((2, 3))
            out[3] = float("inf")
            return out

    X = validate_images(images, estimator=PretrainedFeatures(), reset=True)
    with pytest.raises(ValueError, match=r"X\[3\] must be finite.*weights do not fit"):
        run(Overflow(), X)
    with pytest.raises(
        ValueError, match=r"X\[14\] must be finite"
    ):  # position 3 of the subset
        run(Overflow(), X.subset(range(8, 40, 2)))
    with pytest.raises(ValueError, match=r"float16: use 'bfloat16'"):
        run(Overflow(), X, precision="float16")


@pytest.mark.parametrize("verbose", [0, 1])
def test_verbose_shows_a_progress_bar(images, capsys, monkeypatch, verbose):
    # The bar appears after a second, so the clock is accelerated.
    clock = iter(np.arange(0.0, 1e6, 2.0))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
    run(network("tiny"), images, verbose=verbose)
    captured = capsys.readouterr()
    assert ("image" in captured.err) == bool(verbose)
    assert captured.out == ""


def test_batches_are_started_ahead_on_an_asynchronous_device(images):
    events = []

    def start(pixels):
        rows = pixels.mean((1, 2), dtype=np.float32)
        events.append("start")

        def wait():
            events.append("wait")
            return rows

        return wait

    device = SimpleNamespace(start=start, n_ahead=1, execution=on_cpu())
    rows = run(device, images[:22])
    assert events == ["start", "start", "wait", "start", "wait", "wait"]
    expected = [np.asarray(SMALL(image)).mean((0, 1)) for image in images[:22]]
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
