"""What each action of a schedule costs: operations and bytes from the IR, seconds by the roofline.

A **roofline** is the simplest model of a device: an operation takes as long as its arithmetic at the peak rate, or as
its memory traffic at the memory's rate, whichever is longer.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from graphlocal.errors import InputError
from graphlocal.ir import ActionKind, LocalGraph, Operation, Subgraph, TensorType

Key = tuple[ActionKind, int]
KINDS: tuple[ActionKind, ...] = ("F", "D", "U")

_BYTES = {"float64": 8, "int64": 8, "complex64": 8, "complex128": 16, "float16": 2, "bfloat16": 2, "int16": 2,
          "bool": 1, "int8": 1, "uint8": 1}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """flops: floating-point operations a second. bytes: of memory traffic a second. launch: seconds per operation."""

    flops: float = 1e12
    bytes: float = 1e11
    launch: float = 0.0

    def seconds(self, flops: float, moved: float) -> float:
        """The roofline's time of one operation."""
        return max(flops / self.flops, moved / self.bytes) + self.launch


@dataclass(frozen=True)
class Sizes:
    """The bytes of a graph's values. dims: the sizes that the graph leaves open, such as {"B": 8}."""

    graph: LocalGraph
    dims: Mapping[str, int]

    def of(self, value: str) -> int:
        """Bytes of an operation's result or an input; 0 for what is no single tensor."""
        return self.of_type(self.graph.type(value))

    def of_type(self, type: TensorType | None) -> int:
        return prod(map(self.dim, type.shape)) * _BYTES.get(type.dtype, 4) if type else 0

    @property
    def batch(self) -> int | None:
        """The first axis of the inputs, of those that leave it open if any do; 1 where none has an axis.

        None where they disagree. Outputs don't tell it: what a model returns may be a mean, or transposed.
        """
        first = [item.type.shape[0] for item in self.graph.inputs if item.type and item.type.shape]
        sizes = {self.dim(dim) for dim in [dim for dim in first if isinstance(dim, str)] or first or [1]}
        return sizes.pop() if len(sizes) == 1 else None

    def dim(self, dim: int | str) -> int:
        """A size as a number. Raises InputError for one that `dims` doesn't tell."""
        try:
            return dim if isinstance(dim, int) else _number(ast.parse(dim, mode="eval").body, self.dims)
        except (SyntaxError, KeyError, TypeError, ZeroDivisionError):
            raise InputError(
                f"the size {dim!r} of a value is not known", remedy="give the sizes of the inputs"
            ) from None


def open_sizes(graph: LocalGraph, leaves: Sequence[Any]) -> dict[str, int]:
    """The sizes that the graph leaves open, as the flattened arguments of a call have them."""
    found: dict[str, int] = {}
    for item, leaf in zip(graph.inputs, leaves, strict=True):
        if item.type is not None and isinstance(leaf, Tensor):
            found |= {d: n for d, n in zip(item.type.shape, leaf.shape, strict=True) if isinstance(d, str)}
    return found


_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
               ast.Mod: operator.mod}  # fmt: skip


def _number(node: ast.expr, dims: Mapping[str, int]) -> int:
    """The value of a size such as `2*B+1`; nothing but this arithmetic is run. Raises KeyError or TypeError."""
    if isinstance(node, ast.Name):
        return dims[node.id]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, dims)
    if isinstance(node, ast.BinOp):
        function: Any = _ARITHMETIC[type(node.op)]
        return int(function(_number(node.left, dims), _number(node.right, dims)))
    raise TypeError(ast.dump(node))


def roofline(graph: LocalGraph, sizes: Sizes, device: Device, exact: bool = False) -> dict[Key, float]:
    """Seconds of every action of the graph; with `exact`, of backpropagation on the same subgraphs (`U` sends back).

    Forward: every operation once. `U`: the gradient of each operation's parameters, and of its inputs where they are
    computed inside the subgraph or a message goes back, each at the cost of the forward. `D`: one product with E, and
    the traffic of five values of the representation's size (target, error, and their parts). What else a rule's actions
    do (inner steps, decoders, twins, normalizations) isn't in the graph: `graphlocal.step_costs` counts the operators
    of those.
    """
    costs: dict[Key, float] = {}
    for subgraph in graph.subgraphs:
        number = graph.number[subgraph.name]
        operations = [graph.operation[name] for name in subgraph.operations]
        costs["F", number] = sum(_forward(graph, op, sizes, device) for op in operations)
        if subgraph.name in graph.neuron or exact:
            sends = any(c.kind == "vjp" and c.source == subgraph.name for c in graph.connections) or exact
            costs["U", number] = sum(_update(graph, subgraph, op, sends, sizes, device) for op in operations)
            costs["D", number] = 0.0 if exact else _displacement(graph, subgraph, sizes, device)
    return costs


def _forward(graph: LocalGraph, op: Operation, sizes: Sizes, device: Device) -> float:
    return device.seconds(op.flops, _traffic(graph, op, sizes))


def _traffic(graph: LocalGraph, op: Operation, sizes: Sizes) -> int:
    read = sum(sizes.of(v) for v in op.inputs if v in graph.operation or v in {i.name for i in graph.inputs})
    return read + sum(sizes.of_type(graph.state[s].type) for s in op.states) + sizes.of_type(op.type)


def _update(graph: LocalGraph, subgraph: Subgraph, op: Operation, sends: bool, sizes: Sizes, device: Device) -> float:
    """Seconds of an operation's part of the vector-Jacobian product."""
    inside = set(subgraph.operations)
    floats = [v for v in op.inputs if graph.is_float(v)]
    wanted = sum(v in inside or (sends and v not in {i.name for i in graph.inputs}) for v in floats)
    wanted += any(graph.state[s].trainable for s in op.states)
    return wanted * device.seconds(op.flops, _traffic(graph, op, sizes))


def _displacement(graph: LocalGraph, subgraph: Subgraph, sizes: Sizes, device: Device) -> float:
    incoming = [c for c in graph.incoming(subgraph.name) if not c.exact]
    if not incoming:
        return 0.0
    total = 5 * sum(device.seconds(0, sizes.of(value)) for value in sorted({c.value for c in incoming}))
    for c in incoming:
        if c.kind == "feedback":
            positions = sizes.of(c.source_value) / 4 / max(c.weight[-1], 1)
            total += device.seconds(2 * positions * c.entries, sizes.of(c.source_value) + 4 * sum(c.weight))
    return total
