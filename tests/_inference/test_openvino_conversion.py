"""Conversion to OpenVINO, with and without private functions."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from sktl._inference.execution import import_openvino
from sktl._inference.openvino_conversion import convert_to_openvino


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return models.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], num_classes=9).eval()


def assert_converted(module):
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = module(x).numpy()
    model = convert_to_openvino(module, torch.zeros(2, 3, 64, 64))
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = import_openvino().Core().compile_model(model, "CPU", options)
    got = compiled([x.numpy()])[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def count_public_conversions(monkeypatch):
    openvino, calls = import_openvino(), []
    convert_model = openvino.convert_model

    def count(*args, **kwargs):
        calls.append(1)
        return convert_model(*args, **kwargs)

    monkeypatch.setattr(openvino, "convert_model", count)
    return calls


def test_converts_with_private_functions(module, monkeypatch):
    calls = count_public_conversions(monkeypatch)
    assert_converted(module)
    assert not calls


def remove_trace(patch):
    patch.delattr(torch.jit, "_get_trace_graph")


def change_trace(patch):
    patch.setattr(torch.jit, "_get_trace_graph", lambda: None)


def change_inlining(patch):
    fail_once(patch, torch._C, "_jit_pass_inline", RuntimeError)


def change_decoder(patch):
    import_openvino()
    from openvino.frontend.pytorch import ts_decoder

    fail_once(patch, ts_decoder, "TorchScriptPythonDecoder", TypeError)


def remove_frontend(patch):
    import_openvino()
    from openvino import frontend

    fail_once(patch, frontend, "FrontEndManager", ImportError)


def fail_once(patch, owner, name, error):
    """Let the first call raise; the public function may need the original."""
    original = getattr(owner, name)

    def fail(*args, **kwargs):
        setattr(owner, name, original)
        raise error("not as before")

    patch.setattr(owner, name, fail)


@pytest.mark.parametrize(
    "damage",
    [
        remove_trace,
        *(
            pytest.param(damage, marks=pytest.mark.slow)
            for damage in (
                change_trace,
                change_inlining,
                change_decoder,
                remove_frontend,
            )
        ),
    ],
)
def test_falls_back_to_the_public_function(module, monkeypatch, damage):
    calls = count_public_conversions(monkeypatch)
    with monkeypatch.context() as patch:
        damage(patch)
        assert_converted(module)
    assert calls == [1]


def test_an_unsupported_module_raises():
    class Unsupported(nn.Module):
        def forward(self, x):
            return x[0].numpy()

    with pytest.raises(Exception, match=r"tensors|Tensor"):
        convert_to_openvino(Unsupported(), torch.zeros(2, 3, 4, 4))


class Resampled(nn.Module):
    """Add an array that is resampled to the size of the images."""

    def __init__(self, mode, antialias):
        super().__init__()
        self.options = {"mode": mode, "antialias": antialias}
        generator = torch.Generator().manual_seed(0)
        self.positions = nn.Parameter(torch.randn(1, 3, 20, 20, generator=generator))

    def forward(self, x):
        positions = self.positions
        return x + nn.functional.interpolate(positions, x.shape[2:], **self.options)


@pytest.mark.parametrize("has_private_functions", [True, False])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_interpolation(mode, antialias, has_private_functions, monkeypatch):
    if not has_private_functions:
        remove_trace(monkeypatch)
    assert_converted(Resampled(mode, antialias).eval())
