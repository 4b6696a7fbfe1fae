"""Execution settings: device, precision, engine, batch size, threads, verbosity.

The value "auto" is resolved from the hardware, the number of images of a call and the
size of the network, and never from their content or from earlier calls, so that equal
calls on one machine give equal results. A cached row keeps the bits that it was
computed with; small calls also read the rows of torch.
"""

import contextlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Self

import torch
from torch import nn

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ENGINES = ("torch", "compile", "openvino")
_BATCH_SIZE = 32  # if it is "auto"
_MIN_LARGE = 40_000_000  # parameters of a network that takes seconds to compile
# Names in torch.cpu.get_capabilities(), on x86 and on ARM.
_NATIVE_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
_TELEMETRY = "openvino_telemetry"
_import_lock = threading.Lock()


@dataclass(frozen=True)
class ExecutionConfig:
    """Device, precision and engine of a forward pass, and how it is run.

    Attributes
    ----------
    device : torch.device
        With its index, if it has one.
    precision : {"float32", "bfloat16", "float16"}
        Data type of weights and activations.
    engine : {"torch", "compile", "openvino"}
        Library that computes the network.
    batch_size : int
        Number of images in each batch.
    n_jobs : int or None
        Number of decoding threads, see `n_decoding_threads`, or of workers, see
        `is_distributed`.
    verbose : int
        If greater than 0, show a progress bar for anything longer than a second.
    prefers_eager : bool
        Whether torch computes a large network instead of `engine`, see `for_network`.
    """

    device: torch.device
    precision: str
    engine: str
    # The following change neither the compiled model nor a cached row, so that
    # configurations which differ only here compare equal and share both.
    batch_size: int = field(default=_BATCH_SIZE, compare=False)
    n_jobs: int | None = field(default=None, compare=False)
    verbose: int = field(default=0, compare=False)
    prefers_eager: bool = field(default=False, compare=False)

    @classmethod
    def from_estimator(cls, estimator: Any) -> Self:
        """Resolve the parameters of an estimator on this machine.

        Parameters
        ----------
        estimator : estimator
            With the parameters `device`, `precision`, `engine`, `batch_size`, `n_jobs`
            and `verbose`. The first four may be "auto".

        Returns
        -------
        ExecutionConfig
            No attribute is "auto".

        Raises
        ------
        ValueError
            If the device is missing, or the engine does not run on it.
        ImportError
            If the engine is not installed.
        """
        device = resolve_device(estimator.device)
        engine = resolve_engine(estimator.engine, device)
        return cls(
            device,
            resolve_precision(estimator.precision, device),
            engine,
            batch_size=resolve_batch_size(estimator.batch_size),
            n_jobs=estimator.n_jobs,
            verbose=estimator.verbose,
            prefers_eager=estimator.engine == "auto" and engine != "torch",
        )

    def for_n_samples(self, n_samples: int) -> Self:
        """Return a copy with the batch size of a call with `n_samples` images.

        The shape of a batch affects rounding: libraries choose a convolution algorithm
        by it. So it is decided once for a call, whatever part of the images is cached
        or computed elsewhere. Calls with at least `batch_size` images use full batches
        (the last one is padded). Smaller calls use batches of one image, which is also
        the fastest for a single image.

        Parameters
        ----------
        n_samples : int
            Number of images of the whole call.

        Returns
        -------
        ExecutionConfig
            With a `batch_size` of 1 if there are fewer images than that, else without
            `prefers_eager`.
        """
        if n_samples >= self.batch_size:
            return replace(self, prefers_eager=False)
        return replace(self, batch_size=1)

    def for_network(self, network: nn.Module) -> Self:
        """Return a copy with the engine that computes a network.

        To compile a large network takes as long as torch takes for dozens of images, so
        with ``engine="auto"`` torch computes the calls with fewer than `batch_size`
        images.

        Parameters
        ----------
        network : Module
            The network; its number of parameters decides.

        Returns
        -------
        ExecutionConfig
            Without `prefers_eager`.
        """
        if not self.prefers_eager:
            return self
        n_parameters = sum(parameter.numel() for parameter in network.parameters())
        engine = "torch" if n_parameters >= _MIN_LARGE else self.engine
        return replace(self, engine=engine, prefers_eager=False)

    def eager(self) -> Self:
        """Return a copy in which torch computes all networks."""
        return replace(self, engine="torch", prefers_eager=False)

    def cache_namespace(self) -> dict[str, str]:
        """Return the part of a cache namespace that depends on the execution."""
        library: Any = torch if self.engine != "openvino" else import_openvino()
        return {
            "precision": self.precision,
            "engine": f"{self.engine} {library.__version__.split('.')[0]}",
            "device": self.device.type,
        }

    @contextlib.contextmanager
    def exact_inference_mode(self) -> Iterator[None]:
        """Disable gradients and, on a GPU, TensorFloat-32 (10 bits of mantissa)."""
        with torch.inference_mode():
            if self.device.type != "cuda":
                yield
                return
            _flags.enter()
            try:
                yield
            finally:
                _flags.leave()


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device, where ``"auto"`` is the accelerator, if any, or the CPU.

    Raises
    ------
    ValueError
        If torch does not support the name, or the device is missing.
    """
    if device == "auto":
        return _best_device()
    try:
        # Fixes the index ("cuda:0"), which may differ in another thread.
        probe = torch.empty(0, device=device)
        probe.cpu()  # fails for devices without data, such as "meta"
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"The 'device' parameter must be 'auto' or a device of this machine. Got "
            f"{str(device)!r} instead: {str(error).splitlines()[0]}"
        ) from error


@lru_cache(maxsize=1)
def _best_device() -> torch.device:
    # Cached: the lookup is slow in torch, and the hardware does not change.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def resolve_batch_size(batch_size: int | str) -> int:
    """Return the batch size of inference: 32 for ``"auto"``."""
    return _BATCH_SIZE if isinstance(batch_size, str) else int(batch_size)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision, where ``"auto"`` is bfloat16 if supported natively."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bfloat16" if major >= 8 else "float32"
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return "float32"  # older versions of torch do not report the capabilities
    capabilities = torch.cpu.get_capabilities()
    is_native = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return "bfloat16" if is_native else "float32"


def warn_of_slow_precision(precision: str, device: str | torch.device) -> None:
    """Warn if bfloat16 was chosen and the processor has no instructions for it.

    Parameters
    ----------
    precision, device
        Parameters of an estimator.
    """
    if precision != "bfloat16" or resolve_device(device).type != "cpu":
        return
    if not hasattr(torch.cpu, "get_capabilities"):
        return
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name) for name in _NATIVE_BFLOAT16):
        warnings.warn(
            "precision='bfloat16' is slow on this processor, which has no instructions "
            "for it: training takes 12 to 18 times as long as in float32. Set "
            "precision='float32', or 'auto', which selects bfloat16 only where it is "
            "fast.",
            UserWarning,
            stacklevel=4,
        )


def resolve_engine(engine: str, device: torch.device) -> str:
    """Return the engine, where ``"auto"`` is OpenVINO on a CPU if installed, or torch.

    Raises
    ------
    ValueError
        If the engine is "openvino" and the device is not a CPU.
    ImportError
        If the engine is "openvino" and OpenVINO is not installed.
    """
    if engine == "auto":
        return (
            "openvino" if device.type == "cpu" and _is_openvino_available() else "torch"
        )
    if engine == "openvino":
        if device.type != "cpu":
            raise ValueError(
                "engine='openvino' requires the device 'cpu'. Got the device "
                f"{str(device)!r}. Set device='cpu', or engine='torch' or 'compile'."
            )
        import_openvino()
    return engine


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry.

    OpenVINO reports each import and conversion over the network through the optional
    package ``openvino_telemetry``, which is hidden during the import. If the user
    imported OpenVINO before, nothing changes.

    Returns
    -------
    module

    Raises
    ------
    ImportError
        If OpenVINO is not installed.
    """
    with _import_lock:
        is_new = _TELEMETRY not in sys.modules
        if is_new:
            sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # its import fails
        try:
            import openvino
        except ImportError as error:
            raise ImportError(
                f"engine='openvino' requires the package openvino: {error}. Run "
                "pip install 'sktl[openvino]', or set engine='torch'."
            ) from error
        finally:
            if is_new:
                del sys.modules[_TELEMETRY]
    return openvino


@lru_cache(maxsize=1)
def _is_openvino_available() -> bool:
    if importlib.util.find_spec("openvino") is None:
        return False
    try:
        return "CPU" in import_openvino().Core().available_devices
    except (ImportError, RuntimeError) as error:
        warnings.warn(
            "engine='auto' falls back to torch: OpenVINO is installed but fails to "
            f"start: {error} Reinstall it, or set engine='torch'.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False


class _ExactFlags:
    """Global flags of torch for exact, deterministic computation on a GPU.

    They are shared by all threads, so overlapping passes are counted: the first one
    sets the flags, the last one restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_active = 0
        self._saved: list[Any] = []

    def enter(self) -> None:
        with self._lock:
            if self._n_active == 0:
                self._saved = [getattr(*flag) for flag, _ in self._exact_values()]
                for flag, value in self._exact_values():
                    setattr(*flag, value)
            self._n_active += 1

    def leave(self) -> None:
        with self._lock:
            self._n_active -= 1
            if self._n_active == 0:
                for (flag, _), value in zip(
                    self._exact_values(), self._saved, strict=True
                ):
                    setattr(*flag, value)

    def _exact_values(self) -> list[tuple[tuple[Any, str], Any]]:
        cudnn: Any = torch.backends.cudnn  # `conv` is missing from its type hints
        cuda = torch.backends.cuda
        return [
            ((cudnn.conv, "fp32_precision"), "ieee"),
            ((cuda.matmul, "fp32_precision"), "ieee"),
            ((cudnn, "benchmark"), False),
            ((cudnn, "deterministic"), True),
        ]


_flags = _ExactFlags()
