"""On what a network computes, how exactly, and by which library.

Three parameters of every estimator are settled here, from what the machine has and
never from the data, so that equal calls on one machine compute equally.
"""

import contextlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ENGINES = ("torch", "compile", "openvino")
_REPORTER = "openvino_telemetry"
_importing = threading.Lock()


@dataclass(frozen=True)
class Execution:
    """On what a network computes, how exactly, and by which library.

    Attributes
    ----------
    device : torch.device
        With its index, where it has one.
    precision : {"float32", "bfloat16", "float16"}
        What the network's numbers are.
    engine : {"torch", "compile", "openvino"}
        What computes.
    """

    device: torch.device
    precision: str
    engine: str

    @classmethod
    def of(cls, estimator: Any) -> Self:
        """Settle what the parameters of an estimator ask for on this machine.

        Parameters
        ----------
        estimator : object
            Whose `device`, `precision` and `engine` are read; each may be "auto".

        Returns
        -------
        Execution
            None of which is "auto".

        Raises
        ------
        ValueError
            If the device is not there, or the engine does not run on it.
        ImportError
            If the engine is not installed.
        """
        device = resolve_device(estimator.device)
        precision = resolve_precision(estimator.precision, device)
        return cls(device, precision, resolve_engine(estimator.engine, device))

    def space(self) -> dict[str, str]:
        """Say what of it decides the bits of a row, for a store."""
        versions: Any = torch if self.engine != "openvino" else import_openvino()
        return {
            "precision": self.precision,
            "engine": f"{self.engine} {versions.__version__.split('.')[0]}",
            "device": self.device.type,
        }

    @contextlib.contextmanager
    def exact_inference_mode(self) -> Iterator[None]:
        """No gradients, and on a GPU no TensorFloat-32, which keeps 10 bits of 23."""
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
    """Turn ``"auto"`` into the accelerator of this machine, or its CPU.

    Raises
    ------
    ValueError
        If the name is not one of torch's, or the device is not there.
    """
    if device == "auto":
        return _best_device()
    try:
        # With its index, which another thread may choose differently: "cuda:0".
        probe = torch.empty(0, device=device)
        probe.cpu()  # what computes nothing, such as "meta", has nothing to give back
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"The 'device' parameter must be 'auto' or a device of this machine. Got "
            f"{str(device)!r} instead: {str(error).splitlines()[0]}"
        ) from error


@lru_cache(maxsize=1)
def _best_device() -> torch.device:
    # Asked for once: what a machine has stays in it, and torch takes long to look.
    found = torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """Turn ``"auto"`` into bfloat16 where the processor multiplies it natively."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bfloat16" if major >= 8 else "float32"
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return "float32"  # an older torch does not say what the processor has
    has = torch.cpu.get_capabilities()
    native = has.get("amx_bf16") or has.get("avx512_bf16")
    return "bfloat16" if native else "float32"


def resolve_engine(engine: str, device: torch.device) -> str:
    """Turn ``"auto"`` into OpenVINO where it is installed for this CPU, else torch.

    Raises
    ------
    ValueError
        If OpenVINO is asked for on another device than a CPU.
    ImportError
        If OpenVINO is asked for and not installed.
    """
    if engine == "auto":
        return "openvino" if device.type == "cpu" and _openvino_is_here() else "torch"
    if engine == "openvino":
        if device.type != "cpu":
            raise ValueError(
                "engine='openvino' computes on the CPU. Got the device "
                f"{str(device)!r}. Set device='cpu', or engine='torch' or 'compile'."
            )
        import_openvino()
    return engine


def import_openvino() -> Any:
    """Import OpenVINO, without telling its authors.

    OpenVINO reports each import and each conversion over the network, by a package of
    its own, and does without where that package is missing; so it is missing here. If
    the user has imported OpenVINO before, that is as it is.

    Returns
    -------
    module

    Raises
    ------
    ImportError
        If it is not installed: says how to get it.
    """
    with _importing:
        is_new = _REPORTER not in sys.modules
        if is_new:
            sys.modules[_REPORTER] = None  # type: ignore[assignment]  # cannot be found
        try:
            import openvino
        except ImportError as error:
            raise ImportError(
                f"engine='openvino' needs the package openvino: {error}. Install it by "
                "pip install 'sktl[openvino]', or set engine='torch'."
            ) from error
        finally:
            if is_new:
                del sys.modules[_REPORTER]
    return openvino


@lru_cache(maxsize=1)
def _openvino_is_here() -> bool:
    if importlib.util.find_spec("openvino") is None:
        return False
    try:
        return "CPU" in import_openvino().Core().available_devices
    except (ImportError, RuntimeError) as error:
        warnings.warn(
            f"engine='auto' is torch, for OpenVINO is installed but does not start: "
            f"{error} Repair it, or set engine='torch'.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False


class _ExactFlags:
    """Switches of the process that decide how exactly, and in what way, a GPU computes.

    They belong to all threads, so passes that overlap are counted: the first sets the
    switches, the last puts them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._before: list[Any] = []

    def enter(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._before = [getattr(*where) for where, _ in self._wanted()]
                for where, value in self._wanted():
                    setattr(*where, value)
            self._n_inside += 1

    def leave(self) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                for (where, _), value in zip(self._wanted(), self._before, strict=True):
                    setattr(*where, value)

    def _wanted(self) -> list[tuple[tuple[Any, str], Any]]:
        cudnn: Any = torch.backends.cudnn  # its types lack `conv`
        cuda = torch.backends.cuda
        return [
            ((cudnn.conv, "fp32_precision"), "ieee"),
            ((cuda.matmul, "fp32_precision"), "ieee"),
            ((cudnn, "benchmark"), False),
            ((cudnn, "deterministic"), True),
        ]


_flags = _ExactFlags()
