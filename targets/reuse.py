"""Elementwise operators write over an argument that nobody reads again: the same numbers, in memory that is warm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphlocal.targets.accesses import shares_memory

aten = torch.ops.aten

IN_PLACE: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: Tensor.add_, aten.sub.Tensor: Tensor.sub_, aten.mul.Tensor: Tensor.mul_,
    aten.div.Tensor: Tensor.div_, aten.addcdiv.default: Tensor.addcdiv_, aten.addcmul.default: Tensor.addcmul_,
    aten.tanh.default: Tensor.tanh_, aten.sigmoid.default: Tensor.sigmoid_, aten.relu.default: Tensor.relu_,
    aten.neg.default: Tensor.neg_, aten.exp.default: Tensor.exp_, aten.clamp_min.default: Tensor.clamp_min_,
}  # fmt: skip
"""What writes its result over its first argument."""

NEW: set[Any] = set(IN_PLACE.values())
"""Functions that are no operators, and whose results lie in memory of their own, or of an argument that ends there."""


def reuse(graph: fx.Graph) -> None:
    """Let the elementwise operators of a pass work in place where they may; in place."""
    for target, function in IN_PLACE.items():
        for node in graph.find_nodes(op="call_function", target=target):
            if ends_in(node.args[0], node):
                node.target = function


def ends_in(value: Any, reader: fx.Node) -> bool:
    """Whether a value is the pass's own, lies like the reader's result, and is read by it alone, and once."""
    if not isinstance(value, fx.Node) or value.op != "call_function" or len(value.users) > 1:
        return False
    if [*reader.args, *reader.kwargs.values()].count(value) > 1 or not makes_new(value):
        return False
    mine, result = value.meta.get("val"), reader.meta.get("val")
    if not isinstance(mine, Tensor) or not isinstance(result, Tensor):
        return False
    return mine.dtype == result.dtype and mine.shape == result.shape and mine.stride() == result.stride()


def makes_new(node: fx.Node) -> bool:
    """Whether an operator's result lies in memory of its own."""
    if node.target in NEW:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or shares_memory(node):
        return False
    return len(node.target._schema.returns) == 1 and not node.target.is_view
