"""onnxscript's optimizer, kept from taking small numbers for nothing.

Its rules drop `x + c` where c is within 1e-8 of 0, and `x * c` where c is within 1e-5 of 1. That removes the eps of
Adam, 1e-8, after which a weight that never had a gradient is 0 / 0. So such constants are inputs while it runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import onnxscript.optimizer

NEAR = 1e-4
"""Wider than onnxscript's tolerances."""


def optimize(model: Any) -> None:
    """Simplify a model of onnx-ir in place; every number that it computes with stays."""
    onnxscript.optimizer.inline(model)
    hidden = [_hide(model, value) for value in _constants(model) if _nearly_nothing(value)]
    onnxscript.optimizer.optimize(model)
    for value, tensor in hidden:
        model.graph.inputs.remove(value)
        if value.uses():
            value.const_value = tensor
            model.graph.register_initializer(value)


def _constants(model: Any) -> list[Any]:
    nodes = onnx_ir.traversal.RecursiveGraphIterator(model.graph)
    made = [node.outputs[0] for node in nodes if node.op_type == "Constant" and node.domain == ""]
    return [*made, *model.graph.initializers.values()]


def _nearly_nothing(value: Any) -> bool:
    """Whether it holds one number close to, but other than, 0 or 1."""
    tensor = onnx_ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1 or not tensor.dtype.is_floating_point() or value.is_graph_output():
        return False
    number = float(np.asarray(tensor.numpy(), np.float64).item())
    return any(number != neutral and abs(number - neutral) <= NEAR for neutral in (0.0, 1.0))


def _hide(model: Any, value: Any) -> tuple[Any, Any]:
    """Put an input in the constant's place; return both."""
    tensor: Any = onnx_ir.convenience.get_const_tensor(value)
    producer = value.producer()
    given = onnx_ir.Value(name=value.name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype))
    value.replace_all_uses_with(given)
    if producer is None:
        del model.graph.initializers[value.name]
    else:
        producer.graph.remove(producer, safe=True)
    model.graph.inputs.append(given)
    return given, tensor
