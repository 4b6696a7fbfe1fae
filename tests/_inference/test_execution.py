"""Execution settings: resolution of "auto", and global flags of a GPU."""

import contextlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from sktl import PretrainedFeatures
from sktl._inference import execution
from sktl._inference.execution import (
    ExecutionConfig,
    resolve_device,
    resolve_engine,
    resolve_precision,
    warn_of_slow_precision,
)

CPU = torch.device("cpu")


def test_device_names_are_validated():
    assert resolve_device("cpu") == CPU
    with pytest.raises(ValueError, match=r"'device' parameter must be 'auto' or .*gpu"):
        resolve_device("gpu")
    for device in ("cuda:99", "meta", "hpu"):
        with pytest.raises(ValueError, match=f"Got '{device}' instead"):
            resolve_device(device)


@pytest.mark.parametrize(
    ("accelerator", "expected"), [(None, "cpu"), ("cuda", "cuda"), ("mps", "mps")]
)
def test_the_device_auto_is_the_accelerator_looked_up_once(
    monkeypatch, accelerator, expected
):
    calls = []

    def current_accelerator(check_available):
        calls.append(check_available)
        return accelerator and torch.device(accelerator)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    execution._best_device.cache_clear()
    try:
        for _ in range(2):
            assert resolve_device("auto") == torch.device(expected)
    finally:
        execution._best_device.cache_clear()
    assert calls == [True]


FLAGS = """
import contextlib, torch
from sktl._inference.execution import ExecutionConfig
exec({setting!r})
def flags():
    backends = torch.backends
    return (backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision,
            backends.cudnn.benchmark, backends.cudnn.deterministic)
before = flags()
execution = ExecutionConfig(torch.device("cuda"), "float32", "torch")
first, second = execution.exact_inference_mode(), execution.exact_inference_mode()
first.__enter__()
second.__enter__()
first.__exit__(None, None, None)  # passes of two threads may overlap in this order
assert flags() == ("ieee", "ieee", False, True), flags()
second.__exit__(None, None, None)
assert flags() == before, (flags(), before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.fp32_precision = 'tf32'",  # the newer name of this setting
    ],
)
def test_flags_of_a_gpu_are_set_and_restored(setting):
    code = FLAGS.format(setting=setting)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_auto_is_resolved_from_the_hardware(monkeypatch):
    found = ExecutionConfig.from_estimator(
        PretrainedFeatures(device="cpu", precision="auto")
    )
    assert found == ExecutionConfig(CPU, resolve_precision("auto", CPU), "openvino")
    monkeypatch.setattr(execution, "_is_openvino_available", lambda: False)
    assert resolve_engine("auto", CPU) == "torch"
    assert resolve_engine("auto", torch.device("cuda")) == "torch"


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"avx512_f": True, "avx512_bf16": False}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_precision_on_a_cpu(monkeypatch, has, expected):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: has, raising=False)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("auto", torch.device("mps")) == "float32"
    assert resolve_precision("float16", CPU) == "float16"


def test_auto_precision_without_information_about_the_cpu(monkeypatch):
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    assert resolve_precision("auto", CPU) == "float32"


@pytest.mark.parametrize(("major", "expected"), [(7, "float32"), (8, "bfloat16")])
def test_auto_precision_on_a_gpu(monkeypatch, major, expected):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (major, 0))
    assert resolve_precision("auto", torch.device("cuda:0")) == expected


@pytest.mark.parametrize(
    ("precision", "has", "is_slow"),
    [
        ("bfloat16", {"avx512_f": True, "avx512_bf16": False}, True),
        ("bfloat16", {"neon": True}, True),
        ("bfloat16", {"avx512_bf16": True}, False),
        ("bfloat16", {"amx_bf16": True}, False),
        ("bfloat16", {"neon": True, "bf16": True}, False),
        ("auto", {}, False),
        ("float32", {}, False),
    ],
)
def test_warning_for_bfloat16_without_native_support(
    monkeypatch, precision, has, is_slow
):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: has, raising=False)
    expected = contextlib.nullcontext()
    if is_slow:
        expected = pytest.warns(UserWarning, match="12 to 18 times .*'auto'")
    with expected:
        warn_of_slow_precision(precision, "cpu")


def test_no_warning_for_bfloat16_without_information(monkeypatch):
    monkeypatch.setattr(execution, "resolve_device", torch.device)
    warn_of_slow_precision("bfloat16", "cuda")
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    warn_of_slow_precision("bfloat16", "cpu")


def test_a_missing_or_broken_openvino(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install 'sktl\[openvino\]'"):
        resolve_engine("openvino", CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "broken")
    execution._is_openvino_available.cache_clear()
    try:
        with pytest.warns(
            RuntimeWarning, match="OpenVINO is installed but fails to start"
        ):
            assert resolve_engine("auto", CPU) == "torch"
    finally:
        execution._is_openvino_available.cache_clear()


SILENT = """
import socket, sys, threading
def refuse(*_): raise AssertionError("a network connection")
socket.socket.connect = socket.getaddrinfo = refuse
import numpy as np
from sktl import PretrainedFeatures
image = np.zeros((1, 40, 40, 3), np.uint8)
PretrainedFeatures("resnet_mini", engine="openvino").transform(image)
assert "openvino" in sys.modules and "openvino_telemetry" not in sys.modules
assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]
import openvino_telemetry  # is installed, so it could have been used
"""


@pytest.mark.slow
def test_openvino_sends_no_telemetry():
    subprocess.run([sys.executable, "-c", SILENT], check=True, timeout=60)


def test_openvino_requires_a_cpu():
    with pytest.raises(
        ValueError, match=r"requires the device 'cpu'.*Got the device 'cuda"
    ):
        resolve_engine("openvino", torch.device("cuda:0"))


def test_namespaces_differ_by_precision_and_engine():
    namespaces = [
        ExecutionConfig(CPU, precision, engine).cache_namespace()
        for precision in ("float32", "bfloat16")
        for engine in ("torch", "compile", "openvino")
    ]
    assert len({tuple(namespace.items()) for namespace in namespaces}) == 6
    expected = {"precision": "float32", "engine": "torch 2", "device": "cpu"}
    assert namespaces[0] == expected


def test_from_estimator_reads_all_settings():
    estimator = PretrainedFeatures(device="cpu", engine="torch", precision="bfloat16")
    estimator.set_params(batch_size=5, n_jobs=3, verbose=1)
    got = ExecutionConfig.from_estimator(estimator)
    assert (got.device, got.precision, got.engine) == (CPU, "bfloat16", "torch")
    assert (got.batch_size, got.n_jobs, got.verbose) == (5, 3, 1)


@pytest.mark.parametrize(
    ("n_samples", "expected"), [(1, 1), (7, 1), (8, 8), (9, 8), (100, 8)]
)
def test_small_calls_use_batches_of_one_image(n_samples, expected):
    execution = ExecutionConfig(CPU, "float32", "torch", batch_size=8, n_jobs=3)
    got = execution.for_n_samples(n_samples)
    assert (got.batch_size, got.n_jobs, execution.batch_size) == (expected, 3, 8)
    assert got.for_n_samples(n_samples) == got


@pytest.mark.parametrize(
    ("engine", "n_samples", "width", "expected"),
    [
        ("auto", 7, 7000, "torch"),
        ("auto", 7, 5000, "openvino"),  # small networks are compiled
        ("auto", 8, 7000, "openvino"),  # and full batches
        ("openvino", 7, 7000, "openvino"),
        ("compile", 7, 7000, "compile"),
        ("torch", 7, 7000, "torch"),
    ],
)
def test_engine_of_few_images_and_a_large_network(engine, n_samples, width, expected):
    estimator = PretrainedFeatures(device="cpu", engine=engine, batch_size=8)
    network = nn.Linear(width, width, device="meta")
    got = ExecutionConfig.from_estimator(estimator).for_n_samples(n_samples)
    assert got.for_network(network).engine == expected
    assert got.for_network(network).for_network(network) == got.for_network(network)
    assert got.eager().engine == "torch"


def test_batch_size_threads_and_verbosity_do_not_change_equality():
    one = ExecutionConfig(CPU, "float32", "torch")
    other = ExecutionConfig(CPU, "float32", "torch", batch_size=1, n_jobs=2, verbose=1)
    assert one == other
    assert hash(one) == hash(other)
    assert one.cache_namespace() == other.cache_namespace()
    assert one != ExecutionConfig(CPU, "float32", "compile")
