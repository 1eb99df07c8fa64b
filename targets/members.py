"""The operators of one subgraph's displacement and update in a lowered training graph, as a function of its own.

Members of a batch are compared by their **form**: the same operators with the same options, on inputs of the same
shapes, strides and dtypes. Views (`t`, `expand`) are written out in every member that reads them, since simplification
lets members share them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphlocal.targets.lowered import attribute
from graphlocal.targets.simplify import VIEWS, hashable
from graphlocal.targets.training_graph import TrainingGraph


@dataclass(frozen=True, eq=False)
class Member:
    """nodes: in program order, copied views before their reader. own: those that no other member copies.

    inputs: what they read from outside, each once. form: equal for members that compute the same.
    """

    number: int
    nodes: tuple[fx.Node, ...]
    own: frozenset[fx.Node]
    inputs: tuple[fx.Node, ...]
    form: Any

    def read_outside(self) -> list[int]:
        """The places of the nodes that others read."""
        return [i for i, n in enumerate(self.nodes) if n in self.own and any(user not in self.own for user in n.users)]


def member(training: TrainingGraph, number: int, own: Sequence[fx.Node]) -> Member | None:
    """A subgraph's operators `own`, or None where they read something without a known shape."""
    nodes: dict[fx.Node, None] = {}
    inputs: dict[fx.Node, None] = {}
    inside = frozenset(own)

    def visit(node: fx.Node) -> None:
        if node in nodes or node in inputs:
            return
        if node not in inside and node.target not in VIEWS:
            inputs[node] = None
            return
        for source in node.all_input_nodes:
            visit(source)
        nodes[node] = None

    for node in own:
        visit(node)
    values = [value_of(training, node) for node in inputs]
    if any(value is None for value in values):
        return None
    known: dict[fx.Node, Any] = {node: ("input", i) for i, node in enumerate(inputs)}
    known |= {node: ("node", i) for i, node in enumerate(nodes)}
    calls = tuple((n.target, _written(n.args, known), _written(tuple(sorted(n.kwargs.items())), known)) for n in nodes)
    form = (calls, tuple(map(_type, values)), tuple(node in inside for node in nodes))
    return Member(number, tuple(nodes), inside, tuple(inputs), form)


def value_of(training: TrainingGraph, node: fx.Node) -> Any:
    """What stands for the value of a node: a tensor of its shape, strides and dtype, or a number; None if unknown."""
    return attribute(training.module, str(node.target)) if node.op == "get_attr" else node.meta.get("val")


def piece(training: TrainingGraph, first: Member, outputs: Collection[int]) -> fx.GraphModule:
    """function(*inputs) -> the nodes at the places `outputs`."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for i, node in enumerate(first.inputs):
        copied[node] = graph.placeholder(f"input{i}")
    for node in first.nodes:
        copied[node] = copy = graph.node_copy(node, copied.__getitem__)
        if node.target is torch.ops.aten.view.default:  # a stack may lie in memory in another order
            copy.target = torch.ops.aten.reshape.default
    graph.output(tuple(copied[first.nodes[i]] for i in outputs))
    return fx.GraphModule({}, graph, class_name="Member")


def _written(arguments: Any, known: dict[fx.Node, Any]) -> Any:
    return hashable(fx.map_arg(arguments, known.__getitem__))


def _type(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return type(value), value
    return tuple(value.shape), tuple(value.stride()), value.dtype, value.device, value.layout is torch.strided
