"""Stacks of gradients are computed in memory that is kept from step to step, and lent to the optimizer.

A fused step is done with a batch's gradients as soon as the optimizer has seen them, so that the next batch's may take
their place: memory that a core's cache still holds, tensors that need not be made, and nothing to look at anew. What is
kept is as large as the largest stack of each shape. Whoever wants to keep a lent gradient copies it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from graphlocal.targets.stacked_updates import apply_stacks

aten = torch.ops.aten

_OUT: dict[Any, Callable[..., Any]] = {
    aten.bmm.default: torch.bmm, aten.mm.default: torch.mm, aten.sum.dim_IntList: torch.sum
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Lent:
    """Stacks, and their members one after another: `stacks[i][k]` is the gradient of `groups[i][k]`."""

    groups: tuple[tuple[str, ...], ...]
    stacks: tuple[Tensor, ...]
    names: tuple[str, ...]
    gradients: tuple[Tensor, ...]


class ApplyLent(Protocol):
    """Where lent gradients go: `apply.lent(lent)`."""

    def lent(self, lent: Lent) -> None: ...


def apply_lent(apply: ApplyLent, lent: Lent, *stacks: Tensor) -> None:
    """Lend stacks of finished gradients to the optimizer."""
    apply.lent(lent)


@dataclass(eq=False)
class _Slot:
    """Memory for stacks of one kind. free: the place in the program after which another stack may use it."""

    name: str
    memory: Tensor
    free: int


def lend(graph: fx.Graph, bound: SimpleNamespace) -> None:
    """Let a fused, batched error pass lend its stacks, in place. bound: gets the memory, as attributes."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    slots: list[_Slot] = []
    for node in list(graph.find_nodes(op="call_function", target=apply_stacks)):
        apply, groups, *stacks = node.args
        if not all(_may_lie_anywhere(stack, node) for stack in stacks):
            continue
        memories = []
        for stack in stacks:
            slot = _slot(slots, stack, place[stack], bound)
            slot.free = place[node]
            memories.append(slot.memory)
            with graph.inserting_before(stack):
                stack.kwargs = {**stack.kwargs, "out": graph.get_attr(slot.name)}
            stack.target = _OUT[stack.target]
        names = tuple(name for group in groups for name in group)
        gradients = tuple(row for memory in memories for row in memory.unbind(0))
        name = f"lent{len(vars(bound))}"
        setattr(bound, name, Lent(groups, tuple(memories), names, gradients))
        with graph.inserting_before(node):
            node.args = (apply, graph.get_attr(name), *stacks)
        node.target = apply_lent


def _may_lie_anywhere(stack: Any, reader: fx.Node) -> bool:
    value = stack.meta.get("val")
    known = stack.target in _OUT and isinstance(value, Tensor) and value.is_contiguous()
    return known and list(stack.users) == [reader]


def _slot(slots: list[_Slot], stack: fx.Node, place: int, bound: SimpleNamespace) -> _Slot:
    value: Tensor = stack.meta["val"]
    for slot in slots:
        memory = slot.memory
        alike = (memory.shape, memory.dtype, memory.device) == (value.shape, value.dtype, value.device)
        if alike and slot.free < place:
            return slot
    name = f"scratch{len(vars(bound))}"
    slots.append(_Slot(name, torch.empty(value.shape, dtype=value.dtype, device=value.device), place))
    setattr(bound, name, slots[-1].memory)
    return slots[-1]
