"""Compiled models: networks prepared for inference on a device by an engine.

Before an engine is used, its output for random images is compared with that of torch.
If the output differs, or the engine does not support the network, torch is the
fallback, with a warning.
"""

import contextlib
import re
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sktl._backbones.feature_extractor import reraise_invalid_size
from sktl._images.preprocessing import Normalization, Preprocessing
from sktl._inference.execution import PRECISIONS, ExecutionConfig, import_openvino
from sktl._inference.fuse_batch_norm import fuse_batch_norm
from sktl._inference.openvino_conversion import convert_to_openvino
from sktl._utils.default_dtype import float32_default, float32_default_if_needed
from sktl._utils.keyed_cache import KeyedCache

Pixels = NDArray[np.uint8]
Rows = NDArray[np.float32]

_MAX_SHAPES = 2  # batch shapes per network: one image, and a full batch
# Largest difference between an engine and torch: relative to the largest output, and
# absolute, for the rounding of small sums of large numbers.
_TOLERANCE = {"float32": (1e-4, 1e-5), "bfloat16": (0.1, 0.01), "float16": (0.1, 0.01)}

# Clones of an estimator and repeated calls share a compiled model.
compiled_models: KeyedCache[Hashable, "CompiledModel"] = KeyedCache(max_size=4)
# torch.export patches torch for the whole process while it runs.
_export_lock = threading.Lock()


class CompiledModel(Protocol):
    """A network prepared for inference; threads may use it at the same time.

    Attributes
    ----------
    execution : ExecutionConfig
        Device, precision and engine.
    n_ahead : int
        Number of batches to start before the result of the first is requested. Above 0
        on devices that compute asynchronously.
    """

    execution: ExecutionConfig
    n_ahead: int

    def start(self, pixels: Pixels) -> Callable[[], Rows]:
        """Start to compute a batch.

        Parameters
        ----------
        pixels : ndarray of shape (n, side, side, 3), uint8
            May be overwritten as soon as this method returns.

        Returns
        -------
        callable
            Waits for the output and returns it: ``(n, n_outputs)``, float32.

        Raises
        ------
        MemoryError
            If the batch does not fit into memory.
        """


def get_compiled_model(
    key: Hashable,
    build: Callable[[], nn.Module],
    preprocessing: Preprocessing,
    execution: ExecutionConfig,
    *,
    name: str,
) -> CompiledModel:
    """Return a compiled model, from the cache if it was compiled before.

    Threads wait only for a model with the same key, preprocessing and execution.

    Parameters
    ----------
    key : hashable
        Everything that determines the network that `build` returns. The last used
        models are cached by this key, `preprocessing` and `execution`.
    build : callable
        Returns a network that is not shared, since it is modified here. The network
        takes ``(n, n_channels, side, side)`` and returns ``(n, n_outputs)``.
    preprocessing : Preprocessing
        Determines size and normalization of the images.
    execution : ExecutionConfig
        Device, precision and engine.
    name : str
        Name of the network in a warning.

    Returns
    -------
    CompiledModel
        Shared by all callers with the same arguments.

    Raises
    ------
    ValueError
        If the network does not support the size of the images.
    MemoryError
        If one image does not fit into memory.

    Warns
    -----
    RuntimeWarning
        If the engine does not support the network.
    """
    return compiled_models.get_or_create(
        (key, preprocessing, execution),
        lambda: _compile(build().eval(), preprocessing, execution, name),
    )


def _compile(
    network: nn.Module,
    preprocessing: Preprocessing,
    execution: ExecutionConfig,
    name: str,
) -> CompiledModel:
    """Compile a network with its engine, or with torch as the fallback."""
    side = preprocessing.crop_size
    with (
        torch.no_grad(),
        float32_default_if_needed(),
        reraise_invalid_size(side),
        reraise_out_of_memory(1),
    ):
        fuse_batch_norm(network, side, preprocessing.n_channels)
    model: CompiledModel | None = None
    if execution.engine != "torch":
        try:
            model = _compile_and_compare(network, preprocessing, execution)
        except Exception as error:
            # Broad on purpose: compilers raise exceptions of many types for networks
            # that they do not support, and torch can compute each of these networks.
            warnings.warn(
                f"engine={execution.engine!r} does not support {name}, so torch is "
                "used instead. Set engine='torch' to silence this warning. Reason: "
                f"{str(error) or type(error).__name__}",
                RuntimeWarning,
                stacklevel=2,
            )
    return model or TorchNetwork(network, preprocessing, execution)


def _compile_and_compare(
    network: nn.Module, preprocessing: Preprocessing, execution: ExecutionConfig
) -> CompiledModel:
    """Compile a network with an engine and compare its output with that of torch."""
    side = preprocessing.crop_size
    # Another number of images than the network is traced with: tracing may have
    # turned the number of images into a constant.
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    exact = replace(execution, precision="float32", engine="torch")
    expected = TorchNetwork(network, preprocessing, exact).start(images)()
    model = _ENGINES[execution.engine](network, preprocessing, execution)
    got = model.start(images)()
    if got.shape != expected.shape:
        raise ArithmeticError(
            f"its output has shape {got.shape}, not {expected.shape}."
        )
    difference = np.abs(got - expected).max()
    relative, absolute = _TOLERANCE[execution.precision]
    if not difference <= relative * np.abs(expected).max() + absolute:
        raise ArithmeticError(
            f"its output differs from that of torch by {difference:.2g}."
        )
    return model


class _PixelInput(nn.Module):
    """A network with normalization in front, for decoded pixels; returns float32."""

    def __init__(
        self, network: nn.Module, preprocessing: Preprocessing, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.network = network.to(dtype).to(memory_format=torch.channels_last)
        self.normalization = Normalization(preprocessing)
        self._dtype = dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """Map ``(n, side, side, 3)``, uint8, to ``(n, n_outputs)``, float32."""
        # (n, side, side, 3) -> (n, n_channels, side, side) -> (n, n_outputs)
        out: Tensor = self.network(self.normalization(pixels).to(self._dtype))
        return out.float()


class TorchNetwork:
    """Compute a network eagerly with torch; see `CompiledModel`."""

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        execution: ExecutionConfig,
    ) -> None:
        self.execution = execution
        self.n_ahead = 1 if execution.device.type == "cuda" else 0
        dtype = PRECISIONS[execution.precision]
        self._module = _PixelInput(network, preprocessing, dtype).eval()
        self._module.to(execution.device)
        self._uses_default_dtype = True  # until it is known

    def start(self, pixels: Pixels) -> Callable[[], Rows]:
        """Start to compute a batch; see `CompiledModel`."""
        with reraise_out_of_memory(len(pixels)), self.execution.exact_inference_mode():
            x = torch.from_numpy(pixels)
            if self.execution.device.type != "cuda":
                out: Rows = self._run(x.to(self.execution.device)).cpu().numpy()
                return lambda: out
            # Copies from and to pinned memory are asynchronous. Both buffers come from
            # torch's caching allocator, which reuses them when the copies are done.
            x = x.pin_memory().to(self.execution.device, non_blocking=True)
            on_device = self._run(x)
            host = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            host.copy_(on_device, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self.execution.device))

        def wait() -> Rows:
            with reraise_out_of_memory(len(pixels)):
                done.synchronize()
            rows: Rows = host.numpy()
            return rows

        return wait

    def _run(self, x: Tensor) -> Tensor:
        out: Tensor
        if self._uses_default_dtype and torch.get_default_dtype() != torch.float32:
            with float32_default() as mode:
                out = self._module(x)
            if mode.was_needed:
                return out
            # Without the mode, torch may choose faster kernels, which round otherwise.
            self._uses_default_dtype = False
        out = self._module(x)
        return out


class CompiledNetwork(TorchNetwork):
    """Compute a network with ``torch.compile``, compiled once per batch shape."""

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        execution: ExecutionConfig,
    ) -> None:
        super().__init__(network, preprocessing, execution)
        self._programs: KeyedCache[torch.Size, Callable[[Tensor], Tensor]]
        self._programs = KeyedCache(_MAX_SHAPES)
        self._lock = threading.Lock()

    def _run(self, x: Tensor) -> Tensor:
        with self._lock:
            program = self._programs.get_or_create(x.shape, partial(self._program, x))
            return program(x)

    def _program(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        # Exported first: torch.compile counts the compilations of a function and stops
        # after a few. Each export is a new function.
        with _export_lock, float32_default_if_needed():
            exported = torch.export.export(self._module, (x,)).module()
        program: Callable[[Tensor], Tensor] = torch.compile(
            exported, fullgraph=True, dynamic=False, options={"freezing": True}
        )
        return program


class OpenVINONetwork:
    """Compute a network with OpenVINO on the CPU; see `CompiledModel`.

    Tracing, conversion and compilation of a ResNet take 0.2 s, so nothing is cached on
    disk, where it would have to be verified.
    """

    n_ahead = 0

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        execution: ExecutionConfig,
    ) -> None:
        self.execution = execution
        side = preprocessing.crop_size
        example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
        module = _PixelInput(network, preprocessing, torch.float32).eval()
        with float32_default_if_needed():  # the constants of the traced graph
            self._model = convert_to_openvino(module, example)
        self._core = import_openvino().Core()
        self._requests: KeyedCache[tuple[tuple[int, ...], int], Any]
        self._requests = KeyedCache(_MAX_SHAPES)
        self._lock = threading.Lock()

    def start(self, pixels: Pixels) -> Callable[[], Rows]:
        """Compute a batch; see `CompiledModel`."""
        with reraise_out_of_memory(len(pixels)), self._lock:
            request = self._request(pixels.shape, torch.get_num_threads())
            rows: Rows = request.infer([pixels], share_inputs=True)[0]
        return lambda: rows

    def _request(self, shape: tuple[int, ...], n_threads: int) -> Any:
        """Return the inference request for a batch shape and a number of threads."""
        return self._requests.get_or_create(
            (shape, n_threads), partial(self._new_request, shape, n_threads)
        )

    def _new_request(self, shape: tuple[int, ...], n_threads: int) -> Any:
        self._model.reshape(list(shape))
        options = {
            "INFERENCE_PRECISION_HINT": _OPENVINO_TYPES[self.execution.precision],
            "INFERENCE_NUM_THREADS": n_threads,
            "NUM_STREAMS": 1,
            # Otherwise all workers of joblib are pinned to the same processors.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = self._core.compile_model(self._model, "CPU", options)
        return compiled.create_infer_request()


_OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_ENGINES: dict[
    str, Callable[[nn.Module, Preprocessing, ExecutionConfig], CompiledModel]
] = {
    "compile": CompiledNetwork,
    "openvino": OpenVINONetwork,
}


@contextlib.contextmanager
def reraise_out_of_memory(batch_size: int) -> Iterator[None]:
    """Raise out-of-memory errors of any engine and device as a MemoryError.

    Parameters
    ----------
    batch_size : int
        Number of images in the batch, for the message.

    Raises
    ------
    MemoryError
        Instead of a RuntimeError that reports a lack of memory.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is a subclass
        if not re.search("out of memory|can't allocate|ALLOC_FAILED", str(error)):
            raise
        raise MemoryError(
            f"A batch of {batch_size} images does not fit into memory. Reduce "
            "batch_size or image_size, choose precision='bfloat16', or select fewer "
            "features."
        ) from error
