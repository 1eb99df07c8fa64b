"""When stacking pays: what operators cost, one member at a time and all members in one call.

An operator takes `call` seconds to start, and then its arithmetic or its memory traffic, whichever is longer. One call
for `n` members saves `n - 1` starts and costs the copies that put the inputs side by side. The figures for a CPU were
measured on one core (AMD EPYC, torch 2.13): stacks beyond a core's cache lose more than the calls are worth, so that
there the members are taken a few at a time. Those for a GPU are estimates; nothing was run on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from graphlocal.live_memory import tensor_bytes
from graphlocal.targets.simplify import VIEWS


@dataclass(frozen=True)
class Stacking:
    """call, view: seconds that an operator and a view take at least. bytes, flops: a second.

    most: bytes of the largest stack, beyond which members are divided. least: members worth stacking. margin: the
    share of the separate time below which stacking is chosen; `inf` takes all that can be stacked.
    """

    call: float = 2.5e-6
    view: float = 0.8e-6
    bytes: float = 4e10
    flops: float = 8e10
    most: float = 2.0**20
    least: int = 8
    margin: float = 0.85

    def seconds(self, nodes: Iterable[fx.Node], members: int = 1) -> float:
        """The time of operators, each working on so many members at once."""
        return sum(self._seconds(node, members) for node in nodes if node.op == "call_function")

    def _seconds(self, node: fx.Node, members: int) -> float:
        if not isinstance(node.target, torch._ops.OpOverload):
            return 0.0  # an item of a tuple
        if node.target in VIEWS:
            return self.view * (members if node.target is torch.ops.aten.unbind.int else 1)
        return self.call + members * max(self._flops(node) / self.flops, _traffic(node) / self.bytes)

    def stacks(self, values: Iterable[Any], members: int) -> float:
        """The time of stacking values of one member each."""
        return sum(self.call + members * 2 * tensor_bytes(value) / self.bytes for value in values)

    def at_a_time(self, nodes: Sequence[fx.Node], members: int) -> int:
        """How many members to stack, so that no stack of one operator's results is too large; at least 2."""
        largest = max((tensor_bytes(node.meta.get("val")) for node in nodes), default=0)
        return min(members, max(2, int(min(self.most / max(largest, 1), members))))

    def _flops(self, node: fx.Node) -> int:
        assert isinstance(node.target, torch._ops.OpOverload)
        formula: Any = flop_registry.get(node.target.overloadpacket)
        if formula is None:
            return 0
        values: Any = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
        try:
            return int(formula(*values[0], **values[1], out_val=node.meta.get("val")))
        except (TypeError, ValueError, AttributeError, AssertionError):  # an argument whose value is not known
            return 0


ALL = Stacking(least=2, margin=inf)
"""Whatever can be stacked, in stacks that a core's cache holds."""

GPU = Stacking(call=6e-6, view=1.5e-6, bytes=2e12, flops=3e13, most=2.0**28)


def _traffic(node: fx.Node) -> int:
    return sum(tensor_bytes(n.meta.get("val")) for n in (node, *node.all_input_nodes))
