"""A network made ready to compute: folded, converted, on its device.

Every engine computes what torch would. Before an engine is used, its answer to a
random image is compared with torch's; a network that it cannot take, or gets wrong,
is computed by torch, with a warning.
"""

import contextlib
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sktl._images.preprocessing import Normalization, Preprocessing
from sktl._inference.execution import PRECISIONS, ExecutionConfig, import_openvino
from sktl._inference.fuse_batch_norm import fuse_batch_norm

Pixels = NDArray[np.uint8]
Rows = NDArray[np.float32]

_MAX_PREPARED = 4
_MAX_SHAPES = 2  # of batches, that one network is compiled for: one image, and many
# How far an engine may be from torch: a share of the largest output, and as much more
# as rounding makes where large numbers add up to a small one.
_SAME = {"float32": (1e-4, 1e-5), "bfloat16": (0.1, 0.01), "float16": (0.1, 0.01)}

_prepared: OrderedDict[Hashable, "CompiledModel"] = OrderedDict()
_prepared_lock = threading.Lock()


class CompiledModel(Protocol):
    """A network ready to compute; several threads may use it at once.

    Attributes
    ----------
    execution : ExecutionConfig
        How it computes.
    widths : tuple of int or None
        Of a `FeatureExtractor`, the number of columns of each layer.
    n_ahead : int
        How many batches to start before the first is asked for: more than 0 where a
        device computes while the processor goes on.
    """

    execution: ExecutionConfig
    widths: tuple[int, ...] | None
    n_ahead: int

    def start(self, pixels: Pixels) -> Callable[[], Rows]:
        """Start on a batch.

        Parameters
        ----------
        pixels : ndarray of shape (n, side, side, 3), uint8
            Free to be changed as soon as this returns.

        Returns
        -------
        callable
            Waits, and gives the output ``(n, n_outputs)``, float32.

        Raises
        ------
        MemoryError
            If the batch does not fit; it says what to change.
        """


def get_compiled_model(
    key: Hashable,
    build: Callable[[], nn.Module],
    preprocessing: Preprocessing,
    execution: ExecutionConfig,
    *,
    name: str,
) -> CompiledModel:
    """Make the network that `build` gives ready to compute.

    Parameters
    ----------
    key : hashable
        What `build` depends on. The last few networks are kept under it and what
        follows, so that clones of an estimator and repeated calls share one. (The
        cache of backbones is another one: of each, several may be made.)
    build : callable
        Gives a network that nobody else holds; it is changed here. It turns ``(n, 3,
        side, side)`` into ``(n, n_outputs)``.
    preprocessing : Preprocessing
        Of the images that it is made for: their size and normalization.
    execution : ExecutionConfig
        How it is to compute.
    name : str
        Of the network, for a warning.

    Returns
    -------
    CompiledModel
        Shared.

    Raises
    ------
    ValueError
        If the network does not run on images of that size.

    Warns
    -----
    RuntimeWarning
        If the engine cannot compute this network.
    """
    key = (key, preprocessing, execution)
    with _prepared_lock:
        if key not in _prepared:
            _prepared[key] = _prepare(build().eval(), preprocessing, execution, name)
            while len(_prepared) > _MAX_PREPARED:
                _prepared.popitem(last=False)
        _prepared.move_to_end(key)
        return _prepared[key]


def _prepare(
    network: nn.Module,
    preprocessing: Preprocessing,
    execution: ExecutionConfig,
    name: str,
) -> CompiledModel:
    side = preprocessing.crop_size
    with torch.no_grad(), _reraise_invalid_size(side), reraise_out_of_memory(1):
        fuse_batch_norm(network, side)
    widths = getattr(network, "widths", None)  # before anything traces the network
    made: CompiledModel | None = None
    if execution.engine != "torch":
        try:
            made = _checked(network, preprocessing, execution)
        except Exception as error:
            # Broad on purpose: what a compiler stumbles over is as various as networks
            # are, and each of them can be computed without one.
            warnings.warn(
                f"engine={execution.engine!r} cannot compute {name}, so torch does; "
                "engine='torch' has it so without a warning. The reason: "
                f"{str(error) or type(error).__name__}",
                RuntimeWarning,
                stacklevel=2,
            )
    made = made or TorchNetwork(network, preprocessing, execution)
    made.widths = widths
    return made


def _checked(
    network: nn.Module, preprocessing: Preprocessing, execution: ExecutionConfig
) -> CompiledModel:
    """Let another engine than torch take a network, if its answers are torch's."""
    side = preprocessing.crop_size
    # Different ones, and not as many as a network was traced with: one that counts its
    # images may have had the number written into it.
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    exact = replace(execution, precision="float32", engine="torch")
    expected = TorchNetwork(network, preprocessing, exact).start(images)()
    made = _OTHERS[execution.engine](network, preprocessing, execution)
    got = made.start(images)()
    if got.shape != expected.shape:
        raise ArithmeticError(
            f"its output has shape {got.shape}, not {expected.shape}."
        )
    distance = np.abs(got - expected).max()
    share, more = _SAME[execution.precision]
    if not distance <= share * np.abs(expected).max() + more:
        raise ArithmeticError(f"its output differs from torch's by {distance:.2g}.")
    return made


class _PixelInput(nn.Module):
    """A network that takes pixels as they are decoded, and gives float32."""

    def __init__(
        self, network: nn.Module, preprocessing: Preprocessing, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.network = network.to(dtype).to(memory_format=torch.channels_last)
        self.normalization = Normalization(preprocessing)
        self._dtype = dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn ``(n, side, side, 3)``, uint8, into ``(n, n_outputs)``, float32."""
        out: Tensor = self.network(self.normalization(pixels).to(self._dtype))
        return out.float()


class TorchNetwork:
    """A network that torch computes step by step. See `CompiledModel`."""

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        execution: ExecutionConfig,
    ) -> None:
        self.execution = execution
        self.widths: tuple[int, ...] | None = None
        self.n_ahead = 1 if execution.device.type == "cuda" else 0
        dtype = PRECISIONS[execution.precision]
        self._module = _PixelInput(network, preprocessing, dtype).eval()
        self._module.to(execution.device)

    def start(self, pixels: Pixels) -> Callable[[], Rows]:
        """Start on a batch; see `CompiledModel`."""
        with reraise_out_of_memory(len(pixels)), self.execution.exact_inference_mode():
            x = torch.from_numpy(pixels)
            if self.execution.device.type != "cuda":
                out: Rows = self._run(x.to(self.execution.device)).cpu().numpy()
                return lambda: out
            # From pinned memory the copies need no processor. The two buffers come
            # from torch's cache, which gives them out again when the copies are done.
            x = x.pin_memory().to(self.execution.device, non_blocking=True)
            on_device = self._run(x)
            host = torch.empty(on_device.shape, pin_memory=True)
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
        out: Tensor = self._module(x)
        return out


class CompiledNetwork(TorchNetwork):
    """A network that ``torch.compile`` has made one program of, for each shape."""

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        execution: ExecutionConfig,
    ) -> None:
        super().__init__(network, preprocessing, execution)
        self._programs: OrderedDict[torch.Size, Callable[[Tensor], Tensor]]
        self._programs = OrderedDict()
        self._lock = threading.Lock()

    def _run(self, x: Tensor) -> Tensor:
        with self._lock:
            if x.shape not in self._programs:
                self._programs[x.shape] = self._compiled(x)
                while len(self._programs) > _MAX_SHAPES:
                    self._programs.popitem(last=False)
            self._programs.move_to_end(x.shape)
            return self._programs[x.shape](x)

    def _compiled(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        # Exported first: torch.compile counts how often it compiled a function, whoever
        # called it, and gives up after a few; each export is a function of its own.
        exported = torch.export.export(self._module, (x,)).module()
        program: Callable[[Tensor], Tensor] = torch.compile(
            exported, fullgraph=True, dynamic=False, options={"freezing": True}
        )
        return program


class OpenVINONetwork:
    """A network that OpenVINO computes on the CPU. See `CompiledModel`.

    Tracing, converting and compiling take 0.2 s for a ResNet: the frontend is called
    itself, since ``openvino.convert_model`` takes several times as long around it. So
    nothing is kept on disk, where it would have to be trusted.
    """

    n_ahead = 0

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        execution: ExecutionConfig,
    ) -> None:
        openvino = import_openvino()
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        self.execution = execution
        self.widths: tuple[int, ...] | None = None
        side = preprocessing.crop_size
        images = torch.zeros(2, side, side, 3, dtype=torch.uint8)
        module = _PixelInput(network, preprocessing, torch.float32).eval()
        with torch.no_grad(), warnings.catch_warnings():
            # Of tracing being old, and of Python values in it; the result is checked.
            warnings.simplefilter("ignore")
            graph = _traced(module, images)
            decoder = TorchScriptPythonDecoder(
                module, graph_element=graph, alias_db=graph.alias_db()
            )
        frontend = FrontEndManager().load_by_framework("pytorch")
        self._model = frontend.convert(frontend.load(decoder))
        self._core = openvino.Core()
        self._requests: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, pixels: Pixels) -> Callable[[], Rows]:
        """Compute a batch; see `CompiledModel`."""
        with reraise_out_of_memory(len(pixels)), self._lock:
            request = self._request(pixels.shape, torch.get_num_threads())
            rows: Rows = request.infer([pixels], share_inputs=True)[0]
        return lambda: rows

    def _request(self, shape: tuple[int, ...], n_threads: int) -> Any:
        key = (shape, n_threads)
        if key not in self._requests:
            self._model.reshape(list(shape))
            compiled = self._core.compile_model(
                self._model,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": _OPENVINO_TYPES[
                        self.execution.precision
                    ],
                    "INFERENCE_NUM_THREADS": n_threads,
                    "NUM_STREAMS": 1,
                    # Workers of joblib would all be pinned to the same processors.
                    "ENABLE_CPU_PINNING": False,
                },
            )
            self._requests[key] = compiled.create_infer_request()
            while len(self._requests) > _MAX_SHAPES:
                self._requests.popitem(last=False)
        self._requests.move_to_end(key)
        return self._requests[key]


def _traced(module: nn.Module, images: Tensor) -> Any:
    """Write down what a network does, with its weights as constants.

    ``torch.jit.trace`` would do, but it enters what it makes of a network, and of each
    of its layers, in a list that lasts as long as the process: 5 MB for a ResNet.
    """
    module.requires_grad_(False)  # what has a gradient may not be a constant
    jit: Any = torch.jit  # whose types lack it
    # Of a function, and not of a module, whose weights would be inputs of the graph.
    graph, _ = jit._get_trace_graph(lambda x: module(x), (images,))
    torch._C._jit_pass_inline(graph)  # functions of TorchScript
    return graph


_OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_OTHERS: dict[
    str, Callable[[nn.Module, Preprocessing, ExecutionConfig], CompiledModel]
] = {
    "compile": CompiledNetwork,
    "openvino": OpenVINONetwork,
}


@contextlib.contextmanager
def _reraise_invalid_size(side: int) -> Iterator[None]:
    """Turn what torch says of an image that is too small, or not its size."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"The network must run on images of {side} pixels a side, and does not: "
            f"{str(error).splitlines()[0]} Choose another image_size."
        ) from error


@contextlib.contextmanager
def reraise_out_of_memory(batch_size: int) -> Iterator[None]:
    """Turn errors of an engine about memory, on any device, into Python's own."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not re.search("out of memory|can't allocate|ALLOC_FAILED", str(error)):
            raise
        raise MemoryError(
            f"A batch of {batch_size} images does not fit into memory. Reduce "
            "batch_size or image_size, choose precision='bfloat16', or ask for fewer "
            "features."
        ) from error
