"""Recomputation on the lowered training graph: values that the error pass works out again instead of keeping them.

Two kinds. **Subgraphs** that are chosen keep what they read and nothing of their interior, which their error neuron and
their update recompute. **Elementwise results** are dropped from what is kept wherever the value that they were made of
is kept anyway, such as z = phi(h) beside h.

What is recomputed is bit-equal: the same operators on the same values. Operators that draw random numbers or change
memory never run again, their results are kept; BatchNorm in training mode runs again without its running statistics.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphlocal.live_memory import tensor_bytes
from graphlocal.targets.accesses import annotate
from graphlocal.targets.shared_errors import SUMMED
from graphlocal.targets.simplify import VIEWS
from graphlocal.targets.training_graph import TrainingGraph, assemble, roots_of

aten = torch.ops.aten

SMALL = 1 << 20
"""Bytes below which an elementwise result is kept: an operator more would cost time and save next to nothing."""

_LEGIT = aten._native_batch_norm_legit
_BATCH_NORMS = {
    aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default, _LEGIT.default,
}  # fmt: skip
_RUNNING, _TRAINING = (3, 4), 5
"""The places of the running statistics, and of the flag, among the arguments of `_BATCH_NORMS`."""


def recompute(
    training: TrainingGraph, numbers: Iterable[int] = (), small: int = SMALL, apart: bool = False
) -> TrainingGraph:
    """A lowered training graph that keeps less.

    numbers: of the subgraphs whose interior is not kept. small: bytes below which an elementwise result is kept.
    apart: every subgraph's update makes what it needs by itself, so that updates do not wait for each other.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(training.module.graph, copied))
    roots = roots_of(training.module)
    module = assemble(graph, {}, roots, type(training.module).__name__)
    loss = next(new.name for old, new in copied.items() if old.name == training.loss)
    result = TrainingGraph(module, training.weights, training.feedback, loss)
    annotate(result)
    _Recomputation(result, {f"F{number}" for number in numbers}, small, apart).run()
    graph.eliminate_dead_code()
    module.recompile()
    return result


class _Recomputation:
    """One graph while it is changed. chosen: the forward actions whose interior is not kept."""

    def __init__(self, training: TrainingGraph, chosen: set[str], small: int, apart: bool) -> None:
        self.graph, self.chosen, self.small, self.apart = training.module.graph, chosen, small, apart
        nodes = list(self.graph.nodes)
        at = next(i for i, node in enumerate(nodes) if node.name == training.loss)
        self.position = {node: i for i, node in enumerate(nodes[:at])}
        self.after = nodes[at + 1 : -1]
        self.returned = set(nodes[at].all_input_nodes)
        self.last_write: dict[str, int] = {}
        for node, i in self.position.items():
            for root in self._writes(node):
                self.last_write[root] = i
        self.again: dict[Any, fx.Node] = {}

    def run(self) -> None:
        for consumer in self.after if self.chosen else ():
            self._read(consumer, partial(self._interior, consumer=consumer))
        self.again.clear()
        self._drop_elementwise()

    def _read(self, consumer: fx.Node, source: Callable[[fx.Node], fx.Node]) -> None:
        """Let a node read other nodes; those that are made for it come right before it."""
        with self.graph.inserting_before(consumer):
            consumer.args = fx.map_arg(consumer.args, source)
            consumer.kwargs = fx.map_arg(consumer.kwargs, source)

    # Subgraphs.

    def _interior(self, node: fx.Node, consumer: fx.Node) -> fx.Node:
        """What the consumer reads in place of a value of the forward pass."""
        if node not in self.position or self._kept(node, consumer):
            return node
        return self._repeat(node, consumer)

    def _kept(self, node: fx.Node, consumer: fx.Node) -> bool:
        """Whether a value is kept, as it is none of a chosen subgraph's interior."""
        action = _action(node)
        if action not in self.chosen or self._fixed(node) or SUMMED in node.meta:
            return True
        if not any(user in self.position and _action(user) != action for user in node.users):
            return False  # nobody else reads it
        if _action(consumer)[1:] != action[1:]:
            return True
        others = (user for user in node.users if _action(user)[1:] != action[1:])
        return any(user not in self.position or _action(user) in self.chosen for user in others)

    def _repeat(self, node: fx.Node, consumer: fx.Node) -> fx.Node:
        """The node once more, in the error pass, with whatever of its subgraph it needs."""
        key = self._key(node, consumer)
        if key not in self.again:
            action = _action(node)

            def source(other: fx.Node) -> fx.Node:
                inside = other in self.position and _action(other) == action and not self._fixed(other)
                return self._repeat(other, consumer) if inside else other

            self.again[key] = self._copy(node, source, consumer)
        return self.again[key]

    def _key(self, node: fx.Node, consumer: fx.Node) -> Any:
        """Equal for consumers that share a copy of the node."""
        return (node, _action(consumer)[1:]) if self.apart else node

    def _copy(self, node: fx.Node, source: Callable[[fx.Node], fx.Node], consumer: fx.Node) -> fx.Node:
        new = self.graph.node_copy(node, source)
        if node.target is _LEGIT.default and node.args[_TRAINING]:
            new.target = _LEGIT.no_stats
            new.args = tuple(x for i, x in enumerate(new.args) if i not in _RUNNING)
        elif node.target in _BATCH_NORMS and node.args[_TRAINING]:
            new.args = tuple(None if i in _RUNNING else x for i, x in enumerate(new.args))
        new.meta["action"] = _action(consumer)
        return new

    def _fixed(self, node: fx.Node) -> bool:
        """Whether a node must not run again: it changes something, or reads what was changed after it."""
        if node.op != "call_function":
            return True
        if node.target is operator.getitem:
            source = node.args[0]
            return not isinstance(source, fx.Node) or self._fixed(source)
        if not isinstance(node.target, torch._ops.OpOverload):
            return True
        if node.target in _BATCH_NORMS:
            read = {r for i, x in enumerate(node.args) if isinstance(x, fx.Node) and not self._statistic(node, i)
                    for r in x.meta["access"].result}  # fmt: skip
        else:
            if node.meta["access"].writes:
                return True
            read = set(node.meta["access"].reads)
        return any(self.last_write.get(root, -1) > self.position[node] for root in read)

    def _statistic(self, node: fx.Node, place: int) -> bool:
        """Whether an argument is a running statistic that the BatchNorm only changes."""
        return place in _RUNNING and bool(node.args[_TRAINING])

    def _writes(self, node: fx.Node) -> frozenset[str]:
        if node.target in _BATCH_NORMS and not node.args[_TRAINING]:
            return frozenset()
        found: frozenset[str] = node.meta["access"].writes
        return found

    # Elementwise results.

    def _drop_elementwise(self) -> None:
        """Let the error pass make each elementwise result anew if what it is made of is kept."""
        after = [node for node in self.graph.nodes if node not in self.position and node.op == "call_function"]
        kept = {source for node in after for source in node.all_input_nodes if source in self.position}
        for consumer in after:
            self._read(consumer, partial(self._elementwise, kept=kept, consumer=consumer))

    def _elementwise(self, node: fx.Node, kept: set[fx.Node], consumer: fx.Node) -> fx.Node:
        """The node, or a copy that is made of another value that is kept."""
        chain = self._chain(node, kept)
        if not chain or node in self.returned:
            return node
        source = self._elementwise(chain[-1].all_input_nodes[0], kept, consumer)
        for link in reversed(chain):
            key = self._key(link, consumer)
            if key not in self.again:
                self.again[key] = self._copy(link, lambda _, source=source: source, consumer)  # type: ignore[misc]
            source = self.again[key]
        return source

    def _chain(self, node: fx.Node, kept: set[fx.Node]) -> list[fx.Node]:
        """The functions of one value that lead from a kept value to this one; empty if nothing would be gained."""
        chain: list[fx.Node] = []
        while node in self.position and (node not in kept or not chain) and self._is_light(node):
            chain.append(node)
            node = node.all_input_nodes[0]
        makes_new = any(self._is_large(link) for link in chain if link.target not in VIEWS)
        return chain if node in kept and makes_new else []

    def _is_light(self, node: fx.Node) -> bool:
        """Whether a node is a view or an elementwise function of one value."""
        if not isinstance(node.target, torch._ops.OpOverload) or len(node.all_input_nodes) != 1 or self._fixed(node):
            return False
        return node.target in VIEWS or torch.Tag.pointwise in node.target.tags

    def _is_large(self, node: fx.Node) -> bool:
        value: Any = node.meta.get("val")
        return isinstance(value, Tensor) and tensor_bytes(value) >= self.small


def _action(node: fx.Node) -> str:
    action: str = node.meta.get("action", "")
    return action
