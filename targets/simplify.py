"""Simplification of a lowered graph: the same numbers from fewer nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}
"""Operators that give their argument once autograd is gone."""

VIEWS = {
    aten.t.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.expand.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.select.int,
    aten.slice.Tensor, aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten._unsafe_view.default,
}  # fmt: skip
"""Operators whose results share the memory of their first argument."""


def simplify(graph: fx.Graph) -> None:
    """Take out, in place: detaching; a transposition of a transposition; a cast to wider floats and back that nobody
    needs as a copy; the same view twice; what nobody reads.
    """
    known: dict[Any, fx.Node] = {}
    fixed = _returned_or_written(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _SAME:
            _replace(node, node.args[0])
        elif _undoes_its_argument(node) or _is_round_trip(node, fixed):
            _replace(node, node.args[0].args[0])
        elif node.target in VIEWS:
            key = (node.target, hashable(node.args), hashable(tuple(sorted(node.kwargs.items()))))
            if key in known:
                _replace(node, known[key])
            else:
                known[key] = node
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        _sum_without_the_axis(node)
    graph.eliminate_dead_code()


def _sum_without_the_axis(view: fx.Node) -> None:
    """A sum over the first axis that keeps it, and a view that takes it out, in one: the gradient of a bias."""
    total = view.args[0]
    if not isinstance(total, fx.Node) or total.target is not aten.sum.dim_IntList or len(total.users) > 1:
        return
    if total.args[1:] != ([0], True) or total.kwargs or "val" not in total.meta or "val" not in view.meta:
        return
    if list(total.meta["val"].shape[1:]) != list(view.meta["val"].shape):
        return
    view.target, view.args = total.target, (total.args[0], [0])


def _undoes_its_argument(node: fx.Node) -> bool:
    if node.target not in (aten.t.default, aten.transpose.int):
        return False
    inner = node.args[0]
    if not isinstance(inner, fx.Node) or inner.target is not node.target:
        return False
    return sorted(map(str, node.args[1:])) == sorted(map(str, inner.args[1:]))


_WIDER = {
    torch.bfloat16: (torch.float32, torch.float64), torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}  # fmt: skip
"""The dtypes that have every number of another one."""


def _is_round_trip(node: fx.Node, fixed: set[Any]) -> bool:
    """Whether a node casts back what was cast to a wider dtype, and is no copy of what is returned or written."""
    inner = node.args[0] if node.target is aten._to_copy.default else None
    if not isinstance(inner, fx.Node) or inner.target is not aten._to_copy.default:
        return False
    source = base(inner.args[0])
    before, between = value_of(inner.args[0]), value_of(inner)
    if before is None or between is None or between.dtype not in _WIDER.get(before.dtype, ()):
        return False
    own = isinstance(source, fx.Node) and source.op == "call_function" and source not in fixed and node not in fixed
    return own and _lies_alike(node, inner.args[0])


def _returned_or_written(graph: fx.Graph) -> set[Any]:
    """What the results of a graph, and what it changes in place, are views of."""
    found = set(map(base, graph.output_node().all_input_nodes))
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            found |= set(map(base, node.all_input_nodes))
    return found


def base(value: Any) -> Any:
    """What a value is a view of."""
    while isinstance(value, fx.Node) and (value.target in VIEWS or value.target in _SAME):
        value = value.args[0]
    return value


def _lies_alike(node: fx.Node, other: Any) -> bool:
    """Whether two values have one dtype, device and layout in memory."""
    a, b = value_of(node), value_of(other)
    if a is None or b is None or a.layout is not torch.strided or b.layout is not torch.strided:
        return False
    return (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())


def value_of(node: Any) -> torch.Tensor | None:
    """The tensor without data that was recorded for a node, if it was."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _replace(node: fx.Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def hashable(value: Any) -> Any:
    """Arguments of a node, with tuples for lists."""
    return tuple(map(hashable, value)) if isinstance(value, (list, tuple)) else value
