"""The part of the eager target that wires variable-depth credit assignment."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphlocal.feedback import layout
from graphlocal.ir import Connection, Dim, Representation, Subgraph
from graphlocal.rules import AligningRule
from graphlocal.targets.bodies import Update, preactivations, sizes_read, tail_function
from graphlocal.targets.emit_reread import arguments_of, body_of
from graphlocal.targets.emitter import Emitter
from graphlocal.targets.halting import CreditDepth, RowsError, RowsFeedback, RowsUpdate, Stop, add_rows


class Halting:
    """Errors of some samples only, for one emitted graph."""

    def __init__(self, emitter: Emitter, depth: CreditDepth) -> None:
        self.emitter, self.depth = emitter, depth
        self.senders: dict[str, fx.Node] = {}  # of each subgraph: the samples that send errors further down
        self.local: dict[str, fx.Node] = {}  # the local part of each value's error
        self.batch = self._batch()
        emitter.add = add_rows

    def _batch(self) -> Dim | None:
        """The size of the batch: the first axis of the first output, or else input, that has one."""
        graph = self.emitter.graph
        known = [value for value in graph.outputs if value in graph.operation]
        types = [*map(graph.type, known), *(item.type for item in graph.inputs)]
        return next((t.shape[0] for t in types if t is not None and t.shape), None)

    def batched(self, value: str) -> bool:
        """Whether axis 0 of a value is the batch."""
        known = self.emitter.graph.type(value)
        return known is not None and bool(known.shape) and known.shape[0] == self.batch

    def local_error(self, output: Representation, displacement: fx.Node) -> fx.Node:
        emitter, rule = self.emitter, self.emitter.rule
        assert isinstance(rule, AligningRule)
        value = output.value
        phi = tail_function(emitter.traced.module, emitter.graph.tail(output), output.preactivation)
        h, z = emitter.attached[output.preactivation], emitter.attached[output.smooth or value]
        module = RowsError(rule, value, phi, self.batched(value))
        self.local[value] = emitter.call_module(f"e_{value}", module, h, z, displacement, emitter.batch)
        return self.local[value]

    def stop(self, subgraph: Subgraph) -> None:
        """Find out which samples send errors further down, once the errors of a subgraph are known."""
        emitter, rule = self.emitter, self.emitter.rule
        assert isinstance(rule, AligningRule)
        values = emitter.graph.neuron[subgraph.name].values
        module = Stop(rule, subgraph.name, self.depth, [self.batched(value) for value in values])
        errors = [(emitter.exact.get(value), self.local.get(value)) for value in values]
        name = f"stop_{emitter.graph.number[subgraph.name]}"
        example = emitter.seen[values[0]]
        self.senders[subgraph.name] = emitter.call_module(name, module, emitter.batch, example, *errors)

    def feedback(self, connection: Connection, error: fx.Node, factors: list[fx.Node]) -> fx.Node:
        emitter, source = self.emitter, connection.source_value
        both = self.batched(source) and self.batched(connection.value)
        module = RowsFeedback(layout(emitter.graph, connection), both)
        return emitter.call_module(
            f"d_{connection.value}_from_{source}", module, error, emitter.attached[connection.value],
            emitter.attached[source], self.senders[connection.source], *factors,
        )  # fmt: skip

    def update(self, subgraph: Subgraph, update: Update, read: list[str], arguments: tuple[Any, ...]) -> fx.Node:
        """arguments: those of `Update`, without `retain`. read: the values whose messages it gives."""
        emitter = self.emitter
        outputs = [output for output, _ in emitter.feeds[subgraph.name]]
        names = [*(output.value for output in subgraph.outputs), *preactivations(subgraph)]
        nodes = [emitter.attached[name] for name in names]
        places = [nodes.index(output) for output in outputs]
        batched = [self.batched(value) for value in read]
        module = RowsUpdate(update, body_of(emitter, subgraph), batched, self._by_sample(subgraph), places)
        return emitter.call_module(
            f"U{emitter.graph.number[subgraph.name]}", module, *arguments, self.senders[subgraph.name], emitter.batch,
            arguments_of(emitter, subgraph), emitter.retain,
        )  # fmt: skip

    def _by_sample(self, subgraph: Subgraph) -> tuple[bool, ...] | None:
        """Of each argument of the body whether it has a row for each sample; None if samples may meet inside."""
        graph = self.emitter.graph
        if sizes_read(graph, subgraph) or not all(map(self.batched, subgraph.inputs)):
            return None
        inside: set[str] = set(subgraph.inputs)  # values that depend on the samples
        for name in subgraph.operations:
            op = graph.operation[name]
            if op.effects or op.target.startswith("opaque"):
                return None
            if not inside.isdisjoint(op.inputs):
                inside.add(name)
                if op.type is not None and not self.batched(name):
                    return None
        others = len(arguments_of(self.emitter, subgraph)) - len(subgraph.inputs)
        return (*[True] * len(subgraph.inputs), *[False] * others)
