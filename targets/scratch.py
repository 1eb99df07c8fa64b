"""Stacks of gradients are computed in memory that is kept from step to step, and lent to the optimizer.

A fused step is done with a batch's gradients as soon as the optimizer has seen them, so that the next batch's may take
their place: memory that a core's cache still holds, tensors that need not be made, and nothing to look at anew. What is
kept is as large as the stacks that are lent at one time. Whoever wants to keep a lent gradient copies it.
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
    """Memory for one stack at a time.

    size: numbers of the largest. free: the place in the program after which another stack may use it. memory: flat;
    None until the size is known.
    """

    dtype: torch.dtype
    device: torch.device
    size: int
    free: int = -1
    memory: Tensor | None = None

    def __getitem__(self, like: Tensor) -> Tensor:
        """The memory of a stack, in the shape of `like`."""
        if self.memory is None:
            self.memory = torch.empty(self.size, dtype=self.dtype, device=self.device)
        return self.memory[: like.numel()].view(like.shape)


class Scratch:
    """The memory that stacks lie in, the same for all graphs of one model: of these, one runs at a time."""

    def __init__(self) -> None:
        self._slots: list[_Slot] = []

    @property
    def bytes(self) -> int:
        """What is kept between steps."""
        return sum(0 if slot.memory is None else slot.memory.nbytes for slot in self._slots)

    def begin(self) -> None:
        """Start with another graph, which may borrow everything."""
        for slot in self._slots:
            slot.free = -1

    def borrow(self, stack: Tensor, start: int, end: int) -> _Slot:
        """Where a stack may lie between two places in the program; of what fits, what is nearest in size."""
        fitting = [
            slot
            for slot in self._slots
            if slot.free < start
            and (slot.dtype, slot.device) == (stack.dtype, stack.device)
            and (slot.memory is None or slot.size >= stack.numel())
        ]
        if not fitting:
            fitting = [_Slot(stack.dtype, stack.device, stack.numel())]
            self._slots += fitting
        found = min(fitting, key=lambda slot: abs(slot.size - stack.numel()))
        found.size, found.free = max(found.size, stack.numel()), end
        return found


def lend(graph: fx.Graph, bound: SimpleNamespace, scratch: Scratch) -> None:
    """Let a fused, batched error pass lend its stacks, in place. bound: gets the memory, as attributes."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    scratch.begin()
    borrowed = {
        node: [scratch.borrow(stack.meta["val"], place[stack], place[node]) for stack in node.args[2:]]
        for node in lending(graph)
    }
    for node, slots in borrowed.items():
        apply, groups, *stacks = node.args
        memories = []
        for stack, slot in zip(stacks, slots, strict=True):
            name = f"scratch{len(vars(bound))}"
            memories.append(slot[stack.meta["val"]])
            setattr(bound, name, memories[-1])
            with graph.inserting_before(stack):
                stack.kwargs = {**stack.kwargs, "out": graph.get_attr(name)}
            stack.target = _OUT[stack.target]
        names = tuple(name for group in groups for name in group)
        gradients = tuple(row for memory in memories for row in memory.unbind(0))
        name = f"lent{len(vars(bound))}"
        setattr(bound, name, Lent(groups, tuple(memories), names, gradients))
        with graph.inserting_before(node):
            node.args = (apply, graph.get_attr(name), *stacks)
        node.target = apply_lent


def lending(graph: fx.Graph) -> list[Any]:
    """The calls of `apply_stacks` whose stacks may lie in memory that is kept."""
    calls: list[Any] = graph.find_nodes(op="call_function", target=apply_stacks)
    return [node for node in calls if all(_may_lie_anywhere(stack, node) for stack in node.args[2:])]


def _may_lie_anywhere(stack: Any, reader: fx.Node) -> bool:
    value = stack.meta.get("val")
    known = stack.target in _OUT and isinstance(value, Tensor) and value.is_contiguous()
    return known and list(stack.users) == [reader]
