"""Which updates of a lowered error pass tell whether all of them are numbers.

A bias learns by the sum of an error over the batch, beside a weight that learns by the product of the same error with
the layer's input: if the error holds NaN, the product holds it too, and the sum need not be looked at.
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


def telling(error: fx.GraphModule) -> tuple[int, ...]:
    """The places of the weights' updates in which NaN shows if any update holds it.

    error: an error pass that returns its updates. Sparse ones are let pass. Overflow apart: the sum of an infinity and
    its negative is NaN, too.
    """
    returned: Any = error.graph.output_node().args[0]
    updates = returned[0]
    made = [_base(update) for update in updates]
    factors = {_base(factor) for node in made if _is(node, aten.mm.default) for factor in node.args}
    sums = {i for i, node in enumerate(made) if _is(node, aten.sum.dim_IntList) and _base(node.args[0]) in factors}
    return tuple(i for i, update in enumerate(updates) if i not in sums and _may_be_dense(update))


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _may_be_dense(update: Any) -> bool:
    return isinstance(update, fx.Node) and getattr(update.meta.get("val"), "layout", torch.strided) is torch.strided


def _base(value: Any) -> Any:
    """What a value is a view of."""
    while isinstance(value, fx.Node) and value.target in _WHOLE:
        value = value.args[0]
    return value
