"""Which updates of a lowered error pass tell whether all of them are numbers.

An update holds NaN if the error or the input that it is made of does, and so does every other update that they reach
through operators which lose no NaN. A bias learns by the sum of the error whose product with the layer's input its
weight learns by; the output layer by the error that the maps E carry to a hidden layer, and by the activations whose
distance from their targets is that layer's error. Such updates need not be looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_WHOLE = frozenset({aten.t.default, aten.transpose.int, aten.view.default, aten._unsafe_view.default,
                    aten.reshape.default, aten.permute.default, aten.expand.default,
                    aten._to_copy.default})  # fmt: skip
"""Operators whose results hold every number of their argument, rounded perhaps, and no other."""

_CARRYING = _WHOLE | {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.addcdiv.default,
    aten.addcmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.sum.dim_IntList,
    aten.linalg_vector_norm.default, aten.clamp_min.default, aten.tanh.default, aten.sigmoid.default, aten.exp.default,
    aten.tanh_backward.default, aten.sigmoid_backward.default,
}  # fmt: skip
"""Operators whose results hold NaN if any of their arguments does."""


def telling(error: fx.GraphModule) -> tuple[int, ...]:
    """The places of the weights' updates in which NaN shows if any update holds it.

    error: an error pass that returns its updates. Sparse ones are let pass. Overflow apart: the sum of an infinity and
    its negative is NaN, too.
    """
    returned: Any = error.graph.output_node().args[0]
    updates = returned[0]
    looked = {i: _carried(update) for i, update in enumerate(updates) if _may_be_dense(update)}
    for i in list(looked):
        made = _made_of(updates[i])
        if made and any(made <= carried for k, carried in looked.items() if k != i):
            del looked[i]
    return tuple(looked)


def _made_of(update: Any) -> set[fx.Node]:
    """The error, and the input, that the update of a linear layer is made of; empty for other updates."""
    node = _base(update)
    if not _is(node, aten.mm.default) and not _is(node, aten.sum.dim_IntList):
        return set()
    return {_base(factor) for factor in node.all_input_nodes}


def _carried(update: fx.Node) -> set[fx.Node]:
    """The values whose NaN shows in an update."""
    found: set[fx.Node] = set()
    waiting = [update]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes if node.target in _CARRYING else ()
    return found


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _may_be_dense(update: Any) -> bool:
    return isinstance(update, fx.Node) and getattr(update.meta.get("val"), "layout", torch.strided) is torch.strided


def _base(value: Any) -> Any:
    """What a value is a view of."""
    while isinstance(value, fx.Node) and value.target in _WHOLE:
        value = value.args[0]
    return value
