"""The forward loop against a plain loop over pictures."""

import copy
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from sktl import _inference
from sktl._backbones import load_backbone
from sktl._inference import fold_batch_norm, forward, prepared, resolve_device
from sktl._layers import LayerExtractor
from sktl._preprocessing import Preprocessing

CPU = torch.device("cpu")
SMALL = Preprocessing(resize_size=32, crop_size=32)


@pytest.fixture(scope="module")
def images(pictures):
    return [Image.fromarray(picture) for picture in pictures]


def network(name, precision="float32", layer="penultimate", weights=None):
    backbone = load_backbone(name, weights)
    return prepared(
        (name, weights, layer),
        lambda: LayerExtractor(backbone, [layer], "avg"),
        side=SMALL.crop_size,
        device=CPU,
        precision=precision,
    )


def run(net, images, batch_size=8, **options):
    options = {"device": CPU, "precision": "float32", **options}
    return forward(net, images, SMALL, batch_size=batch_size, **options)


def trained_batch_norm(net):
    """Give every BatchNorm statistics as if it had seen data."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.bias.data):
                value.copy_(torch.randn(value.shape, generator=generator) / 10)
            for value in (module.running_var, module.weight.data):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return net.eval().requires_grad_(False)


def test_equals_a_plain_loop(images):
    backbone = load_backbone("resnet18", None)
    transform = models.ResNet18_Weights.DEFAULT.transforms(crop_size=32, resize_size=32)
    net = nn.Sequential(*list(backbone.network.children())[:-1], nn.Flatten())
    with torch.inference_mode():
        expected = torch.cat([net(transform(image)[None]) for image in images]).numpy()
    got = run(network("resnet18"), images)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_row_does_not_depend_on_its_neighbours(images):
    net = network("squeezenet1_1")
    rows = run(net, images)
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = run(net, [images[i] for i in order], n_jobs=2)
    np.testing.assert_array_equal(shuffled, rows[order])
    fewer = run(net, images[:11])
    np.testing.assert_array_equal(fewer, rows[:11])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_sizes_agree(images, batch_size):
    net = network("squeezenet1_1")
    rows = run(net, images)
    other = run(net, images, batch_size=batch_size)
    assert np.abs(other - rows).max() <= 1e-5 * np.abs(rows).max()


def test_small_calls_do_not_pay_for_a_whole_batch(images):
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


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_close_and_comes_back_as_float32(images, precision):
    expected = run(network("squeezenet1_1"), images)
    got = run(network("squeezenet1_1", precision), images, precision=precision)
    assert got.dtype == np.float32
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((got * expected).sum(1) / lengths).min() >= 0.999


@pytest.mark.parametrize(
    ("name", "pairs"),
    [("resnet18", 20), ("mobilenet_v2", 52), ("squeezenet1_1", 0), ("googlenet", 57)],
)
def test_folding_merges_every_pair_and_keeps_the_output(name, pairs):
    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": False}
    options = options if name == "googlenet" else {}
    net = trained_batch_norm(models.get_model(name, weights=None, **options))
    x = torch.randn(2, 3, 64, 64)
    expected = net(x)
    assert fold_batch_norm(net, 64) == pairs
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 0
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_folding_gives_up_where_it_is_not_exact():
    class Read(nn.Module):
        """Its convolution is read by a BatchNorm and by an addition."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return x + self.bn(x)

    net = trained_batch_norm(Read())
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    assert fold_batch_norm(net, 8) == 0
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


def test_folding_leaves_what_is_looked_at():
    backbone = copy.deepcopy(load_backbone("resnet18", None))
    trained_batch_norm(backbone.network)
    extractor = LayerExtractor(backbone, ["layer1.0.conv1"], "avg").eval()
    assert fold_batch_norm(extractor, 64) == 20 - 1
    x = torch.randn(1, 3, 64, 64)
    plain = LayerExtractor(backbone, ["layer1.0.conv1"], "avg").eval()
    torch.testing.assert_close(extractor(x), plain(x), rtol=1e-4, atol=1e-5)


def test_folding_skips_convolutions_that_compute_their_weights():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    net = trained_batch_norm(nn.Sequential(conv, nn.BatchNorm2d(4)))
    assert fold_batch_norm(net, 8) == 0


def test_folding_skips_what_has_no_statistics():
    own = nn.BatchNorm2d(4, track_running_stats=False)
    assert fold_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), own).eval(), 8) == 0


def test_global_state_is_left_alone(images):
    state = torch.get_rng_state()
    _inference._prepared.clear()
    net = network("resnet18")
    run(net, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not net.training


FLAGS = """
import contextlib, torch
from sktl._inference import _as_trained
exec({setting!r})
def flags():
    backends = torch.backends
    return (backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision,
            backends.cudnn.benchmark, backends.cudnn.deterministic)
before = flags()
first, second = (_as_trained(torch.device("cuda")) for _ in range(2))
first.__enter__()
second.__enter__()
first.__exit__(None, None, None)  # passes of two threads overlap like this
assert flags() == ("ieee", "ieee", False, True), flags()
second.__exit__(None, None, None)
assert flags() == before, (flags(), before)
"""


@pytest.mark.parametrize(
    "setting",
    [
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.fp32_precision = 'tf32'",  # the newer way to say it
    ],
)
def test_flags_of_a_gpu_are_set_and_put_back(setting):
    code = FLAGS.format(setting=setting)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_threads_share_a_network_without_mixing_rows(images):
    net = network("resnet18", layer="layer1")
    halves = images[:16], images[16:32]
    expected = [run(net, half) for half in halves]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            got = list(pool.map(lambda half: run(net, half), halves))
            for rows, wanted in zip(got, expected, strict=True):
                np.testing.assert_array_equal(rows, wanted)


def test_two_passes_at_once_keep_their_rows_apart():
    both_inside = threading.Barrier(2, timeout=10)
    backbone = copy.deepcopy(load_backbone("tiny"))

    def wait(*_):
        both_inside.wait()

    backbone.network.stages["stage1"].register_forward_pre_hook(wait)
    extractor = LayerExtractor(backbone, ["stages.stem", "penultimate"], "avg").eval()
    x = torch.randn(2, 1, 3, 16, 16)
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        first, second = pool.map(extractor, x)
    stem = backbone.network.stages["stem"]
    for rows, picture in ((first, x[0]), (second, x[1])):
        torch.testing.assert_close(rows[:, :8], stem(picture).mean((2, 3)))


def test_networks_are_shared_and_only_the_last_few_kept():
    assert network("squeezenet1_1") is network("squeezenet1_1")
    assert network("squeezenet1_1") is not network("squeezenet1_1", "bfloat16")
    for layer in ("stem", "stage1", "stage2", "stage3", "penultimate"):
        network("squeezenet1_1", layer=layer)
    assert len(_inference._prepared) == _inference._MAX_PREPARED


def test_pictures_are_decoded_at_most_two_batches_ahead(images):
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
    assert (np.array(furthest[1:-2]) >= done[:-2]).any()  # and it is ahead


class _Broken(list):
    def __init__(self, images, row, error):
        super().__init__(images)
        self._row, self._error = row, error

    def __getitem__(self, i):
        if i == self._row:
            raise self._error
        return super().__getitem__(i)


@pytest.mark.parametrize("error", [ValueError("X[9] is bad"), KeyboardInterrupt()])
def test_errors_come_out_and_threads_end(images, error):
    with pytest.raises(type(error)):
        run(network("tiny"), _Broken(images, 9, error), batch_size=4, n_jobs=3)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("ThreadPoolExecutor")]


def test_no_memory_says_what_to_change(images):
    class Hungry(nn.Module):
        def forward(self, x):
            return torch.empty(2**60)

    with pytest.raises(MemoryError, match=r"batch of 8 pictures .* Reduce batch_size"):
        run(Hungry(), images)
    other = _Raises(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(other, images)


class _Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self._error = error

    def forward(self, x):
        raise self._error


def test_output_that_is_not_finite_is_named(images):
    class Overflow(nn.Module):
        def forward(self, x):
            out = x.mean((2, 3))
            out[3] = float("inf")
            return out

    with pytest.raises(ValueError, match=r"X\[3\] must be finite.*do not fit"):
        run(Overflow(), images)
    with pytest.raises(ValueError, match=r"float16: try 'bfloat16'"):
        run(Overflow(), images, precision="float16")


def test_devices():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in {"cpu", "cuda", "mps", "xpu"}
    with pytest.raises(ValueError, match=r"'device' parameter must be 'auto' or .*gpu"):
        resolve_device("gpu")
    for device in ("cuda:99", "meta", "hpu"):
        with pytest.raises(ValueError, match=f"Got '{device}' instead"):
            resolve_device(device)


@pytest.mark.parametrize("verbose", [0, 1])
def test_a_bar_is_shown_when_asked_for(images, capsys, monkeypatch, verbose):
    # The bar waits for a second, so let the clock run fast.
    clock = iter(np.arange(0.0, 1e6, 2.0))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
    run(network("tiny"), images, verbose=verbose)
    captured = capsys.readouterr()
    assert ("picture" in captured.err) == bool(verbose)
    assert captured.out == ""
