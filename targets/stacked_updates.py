"""Hand over the gradients of a batch as the stacks that they were computed in, not one by one.

What looks at every gradient then looks at one tensor for all members of the batch.
"""

from __future__ import annotations

import operator
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from graphlocal.targets.eager import apply_updates
from graphlocal.targets.training_graph import TrainingGraph

aten = torch.ops.aten


class ApplyStacks(Protocol):
    """Where finished gradients go: `apply.stacks(names, stacks)`, with stacks[i][k] that of names[i][k]."""

    def stacks(self, names: tuple[tuple[str, ...], ...], stacks: tuple[Tensor, ...]) -> None: ...


def apply_stacks(apply: ApplyStacks, names: tuple[tuple[str, ...], ...], *stacks: Tensor) -> None:
    """Hand stacks of finished gradients to the optimizer; nothing else holds them afterwards."""
    apply.stacks(names, stacks)


def stack_updates(training: TrainingGraph) -> None:
    """Let a fused, batched training graph hand over stacks, in place, wherever a whole one is handed over together."""
    graph = training.module.graph
    for node in list(graph.find_nodes(op="call_function", target=apply_updates)):
        found = _stacks(node)
        if found:
            groups, stacks = zip(*found, strict=True)
            taken = {name for names in groups for name in names}
            pairs = list(zip(node.args[1], node.args[2:], strict=True))
            rest = [pair for pair in pairs if pair[0] not in taken]
            with graph.inserting_before(node):
                graph.call_function(apply_stacks, (node.args[0], groups, *stacks)).meta.update(node.meta)
                if rest:
                    names, gradients = zip(*rest, strict=True)
                    graph.call_function(apply_updates, (node.args[0], names, *gradients)).meta.update(node.meta)
            graph.erase_node(node)
            _erase_unread([gradient for name, gradient in pairs if name in taken])
    training.module.recompile()


def _erase_unread(items: list[fx.Node]) -> None:
    for item in items:
        unbound: Any = item.args[0]
        if not item.users:
            item.graph.erase_node(item)
        if not unbound.users:
            unbound.graph.erase_node(unbound)


def _stacks(node: fx.Node) -> list[tuple[tuple[str, ...], fx.Node]]:
    """The stacks of which a node takes all members, each with their names."""
    members: dict[fx.Node, dict[int, str]] = {}
    names: Any = node.args[1]
    for name, gradient in zip(names, node.args[2:], strict=True):
        if isinstance(gradient, fx.Node) and gradient.target is operator.getitem:
            unbound, place = gradient.args
            if isinstance(unbound, fx.Node) and unbound.target is aten.unbind.int and unbound.args[1:] in ((), (0,)):
                members.setdefault(unbound, {})[int(place)] = name  # type: ignore[arg-type]
    found = []
    for unbound, mine in members.items():
        stack: Any = unbound.args[0]
        if sorted(mine) == list(range(stack.meta["val"].shape[0])):
            found.append((tuple(mine[place] for place in sorted(mine)), stack))
    return found
