"""From a graph with marked boundaries to one flat ONNX graph in which the marks still stand.

torch's own exporter translates the whole graph at once, so that sizes and types agree throughout. A mark
becomes an operator of its own, `graphlocal::Boundary`, which no optimization looks through; states are turned into
inputs for the time of the optimization, so that none is folded into another tensor and each keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir
import torch
from torch import Tensor, fx

from graphlocal.errors import InputError
from graphlocal.ir import Input, LocalGraph
from graphlocal.targets.evaluation import Evaluation, marked
from graphlocal.targets.onnx.optimize import optimize
from graphlocal.targets.quiet import quiet

BOUNDARY_DOMAIN, BOUNDARY = "graphlocal", "Boundary"


@dataclass(frozen=True)
class Converted:
    """A flat ONNX graph, without weights.

    model: its inputs are the model's, then the states; every value that leaves a subgraph passes through a Boundary
    node with the attribute `value`. inputs: the model's names of its inputs, in that order. states: the tensor of
    each state, in onnx-ir's form.
    """

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    states: dict[str, Any]


def boundary(value: Any, name: str) -> Any:
    """The mark of a value that leaves a subgraph."""
    attributes: dict[str, Any] = {"value": name}
    return torch.onnx.ops.symbolic(
        f"{BOUNDARY_DOMAIN}::{BOUNDARY}", (value,), attributes, dtype=value.dtype, shape=value.shape, version=1
    )


def convert(evaluation: Evaluation, graph: LocalGraph, opset: int | None = None) -> Converted:
    """Translate a graph to ONNX operators.

    opset: version of ONNX's operators; None, what torch's exporter prefers.
    Raises InputError, naming the subgraph and the operation, for one that has no ONNX form.
    """
    types = {item.name: item for item in graph.inputs}
    dynamic = [_open_axes(types[name]) for name in evaluation.inputs]
    try:
        program = _exported(marked(evaluation, graph, boundary), evaluation.example, dynamic, opset)
    except Exception as error:
        raise _blame(evaluation, graph, error) from error
    model = program.model
    states = {name: value.const_value for name, value in model.graph.initializers.items() if name in graph.state}
    _free(model, states)
    with quiet():
        optimize(model)
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()  # stack traces, with the paths of this machine
        for value in node.outputs:
            value.metadata_props.clear()
    proto = onnx_ir.to_proto(model)
    _name_sizes(proto, {name: types[name] for name in evaluation.inputs})
    return Converted(proto, evaluation.inputs, states)


def _name_sizes(proto: onnx.ModelProto, inputs: dict[str, Input]) -> None:
    """Name the sizes that are open as the LocalGraph does: B for the first, in the types of all values."""
    names: dict[str, str] = {}
    for value, item in zip(proto.graph.input, inputs.values(), strict=False):  # the states follow
        assert item.type is not None
        for dim, size in zip(value.type.tensor_type.shape.dim, item.type.shape, strict=True):
            if dim.dim_param.isidentifier() and isinstance(size, str) and size.isidentifier():
                names[dim.dim_param] = size
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), dim.dim_param)


def _open_axes(item: Input) -> dict[int, Any] | None:
    assert item.type is not None
    return {k: torch.export.Dim.AUTO for k, n in enumerate(item.type.shape) if isinstance(n, str)} or None


def _exported(module: fx.GraphModule, example: Sequence[Tensor], dynamic: Sequence[Any], opset: int | None) -> Any:
    inputs = tuple(x.detach().clone() for x in example)
    with quiet(), torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=tuple(dynamic), strict=False)
        return torch.onnx.export(program, (), dynamo=True, verbose=False, optimize=False, opset_version=opset)


def _free(model: Any, states: dict[str, Any]) -> None:
    """Turn the states into inputs."""
    for name in states:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)


# Whose fault it was.


def _blame(evaluation: Evaluation, graph: LocalGraph, error: Exception) -> InputError:
    """The error that names the operation which can't be translated, found by translating each kind alone."""
    operation = next(_untranslatable(evaluation), None)
    text = str(error.__cause__ or error).strip().splitlines()
    why = f"{type(error).__name__}: {text[0] if text else ''}"
    if operation is None or operation.name not in graph.owner:
        return InputError(f"{graph.name} can't be written as ONNX", why=why,
                          remedy="write that part with operations that ONNX has")  # fmt: skip
    op = graph.operation[operation.name]
    return InputError(
        f"subgraph {graph.owner[op.name]!r} can't be written as ONNX: its operation {op.name} ({op.target}) has no "
        "ONNX form",
        where=op.source or op.module,
        why=why,
        remedy="write it with operations that ONNX has",
    )


def _untranslatable(evaluation: Evaluation) -> Iterator[fx.Node]:
    """The operations that fail alone, one of each kind, in program order."""
    recorder = _Recorder(evaluation.module)
    with torch.no_grad():
        recorder.run(*(x.clone() for x in evaluation.example))
    seen = set()
    for node in evaluation.module.graph.nodes:
        kind = str((node.target, fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: None)))
        if node.op != "call_function" or kind in seen:
            continue
        seen.add(kind)
        tensors = [n for n in node.all_input_nodes if isinstance(recorder.values.get(n), Tensor)]
        if tensors and isinstance(recorder.values[node], Tensor):
            try:
                values = [recorder.values[n] for n in tensors]
                _exported(_alone(node, tensors, recorder.values), values, [None] * len(tensors), None)
            except Exception:
                yield node


class _Recorder(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _alone(node: fx.Node, tensors: list[fx.Node], values: dict[fx.Node, Any]) -> fx.GraphModule:
    """One operation as a module."""
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {n: graph.placeholder(n.name) for n in tensors}
    args: Any = fx.node.map_arg(node.args, lambda n: copied.get(n, values[n]))
    kwargs: Any = fx.node.map_arg(dict(node.kwargs), lambda n: copied.get(n, values[n]))
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    graph.output(graph.call_function(target, args, kwargs))
    return fx.GraphModule(torch.nn.Module(), graph)
