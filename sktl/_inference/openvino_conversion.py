"""Conversion of a torch module to an OpenVINO model.

This module alone calls private functions of torch and OpenVINO. If one of them is
missing or fails, the public ``openvino.convert_model`` converts the module instead.
"""

import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sktl._inference.execution import import_openvino

# `warnings.catch_warnings` changes the filters of all threads.
_warnings_lock = threading.Lock()


def convert_to_openvino(module: nn.Module, example: Tensor) -> Any:
    """Convert a module to an OpenVINO model.

    Parameters
    ----------
    module : Module
        In evaluation mode, on the CPU. Its parameters are frozen here.
    example : Tensor
        An input with which the module is traced.

    Returns
    -------
    openvino.Model
        Equal to the module for inputs such as `example`; control flow in Python is
        not converted, so the output has to be compared with that of the module.

    Raises
    ------
    ImportError
        If OpenVINO is not installed.
    Exception
        Of any type, if neither torch nor OpenVINO supports the module.
    """
    import_openvino()  # before its submodules are imported, which start its telemetry
    module.requires_grad_(False)  # a constant must not require a gradient
    model = _convert(module, example)
    for operation in model.get_ops():
        # Antialiased bicubic interpolation, which resamples the positions of vision
        # transformers, has the coefficient -0.75 after the conversion; torch's is -0.5.
        attributes = operation.get_attributes()
        if attributes.get("mode") == "bicubic_pillow":
            operation.set_attribute("cube_coeff", -0.5)
    return model


def _convert(module: nn.Module, example: Tensor) -> Any:
    try:
        return _convert_graph(module, example)
    except (ImportError, AttributeError, TypeError, RuntimeError):
        # The private functions have changed, or the module cannot be converted: the
        # public function decides, and raises if it cannot convert it either.
        with torch.no_grad(), _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_openvino().convert_model(module, example_input=example)


def _convert_graph(module: nn.Module, example: Tensor) -> Any:
    """Convert a module as ``openvino.convert_model`` does, in less time.

    ``openvino.convert_model`` takes several times as long, and traces with
    ``torch.jit.trace``, which registers the traced classes until the process ends: a
    leak of 5 MB for each ResNet.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with torch.no_grad(), _warnings_lock, warnings.catch_warnings():
        # Deprecation of tracing, and values that depend on the input in Python.
        warnings.simplefilter("ignore")
        graph = _trace(module, example)
        decoder = TorchScriptPythonDecoder(
            module, graph_element=graph, alias_db=graph.alias_db()
        )
    frontend = FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(decoder))


def _trace(module: nn.Module, example: Tensor) -> Any:
    """Trace a module to a TorchScript graph with its weights as constants."""
    jit: Any = torch.jit  # its stubs lack this function
    # The function is traced, not the module, whose weights would become inputs.
    graph, _ = jit._get_trace_graph(lambda x: module(x), (example,))
    torch._C._jit_pass_inline(graph)  # inline calls of scripted functions
    return graph
