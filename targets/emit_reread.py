"""The part of the eager target that wires what the error pass evaluates again."""

from __future__ import annotations

import operator

from torch import fx

from graphlocal.feedback import layout
from graphlocal.ir import Connection, Representation, Subgraph
from graphlocal.rules import AligningRule
from graphlocal.targets.bodies import LocalError, preactivations, sizes_read, tail_function, twins_read
from graphlocal.targets.decoders import Decoded, Decoder, DecoderUpdate, bias_name
from graphlocal.targets.emitter import Emitter
from graphlocal.targets.reread import (
    Body,
    End,
    Reader,
    Snapshot,
    Walk,
    draws_random,
    require_rereadable,
    written_states,
)


def body_of(emitter: Emitter, subgraph: Subgraph) -> Body:
    """A subgraph that has run, to be evaluated again."""
    graph = emitter.graph
    module = emitter.modules[f"F{graph.number[subgraph.name]}"]
    assert isinstance(module, fx.GraphModule)
    before = len(subgraph.inputs) + len(sizes_read(graph, subgraph))
    written = written_states(graph, subgraph)
    return Body(module, tuple(before + subgraph.states.index(name) for name in written))


def arguments_of(emitter: Emitter, subgraph: Subgraph) -> tuple[fx.Node, ...]:
    """What the body was called with in the forward pass."""
    graph = emitter.graph
    values = (emitter.seen[value] for value in (*subgraph.inputs, *sizes_read(graph, subgraph)))
    twins = (emitter.twin(name) for name in twins_read(graph, subgraph))
    return (*values, *map(emitter.attribute, subgraph.states), *twins)


class Rereads:
    """Subgraphs as the error pass evaluates them again, for one emitted graph."""

    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter
        self.snapshots: dict[str, fx.Node] = {}  # of each subgraph whose evaluation changes something
        self.targets: dict[str, fx.Node] = {}  # of each representation
        self.displaced: set[str] = set()
        self.held: list[tuple[list[str], set[str]]] = []  # finished gradients, and the subgraphs that they wait for

    def snapshot(self, subgraph: Subgraph) -> None:
        """Keep what the forward pass of a subgraph that may be evaluated again is about to change."""
        emitter = self.emitter
        if not self._reads_neurons(subgraph):
            return
        require_rereadable(emitter.graph, subgraph, emitter.rule.name)
        written, random = written_states(emitter.graph, subgraph), draws_random(emitter.graph, subgraph)
        if written or random:
            number = emitter.graph.number[subgraph.name]
            states = map(emitter.attribute, written)
            self.snapshots[subgraph.name] = emitter.call_module(f"S{number}", Snapshot(random), *states)

    def _reads_neurons(self, subgraph: Subgraph) -> set[str]:
        """The subgraphs whose targets are formed with this one's help."""
        graph = self.emitter.graph
        sent = (c for c in graph.connections if c.kind != "loss" and not c.exact and c.source == subgraph.name)
        return {c.target for c in sent}

    def walk(self, output: Representation, error: LocalError, displacement: fx.Node, incoming: list[Connection]
             ) -> fx.Node:  # fmt: skip
        """The local error of a representation after several steps of its target."""
        emitter, rule = self.emitter, self.emitter.rule
        assert isinstance(rule, AligningRule)
        value, smooth = output.value, output.smooth or output.value
        readers, given = [], []
        for connection in incoming:
            if connection.kind == "vjp" and not connection.exact:
                source = emitter.graph.subgraph[connection.source]
                reader, values = self._reader(source, value)
                readers.append(reader)
                given.append(values)
        constant = [m for c in incoming if c.kind == "feedback" for m in emitter.message(c)]
        h, z = emitter.attached[output.preactivation], emitter.attached[smooth]
        read = emitter.attached[value] if smooth != value else None
        result = emitter.call_module(
            f"e_{value}",
            Walk(rule, error, readers),
            h,
            z,
            read,
            displacement,
            emitter.sum(constant),
            emitter.batch,
            *given,
        )
        self.targets[value] = emitter.call(operator.getitem, result, 1)
        return emitter.call(operator.getitem, result, 0)

    def _reader(self, subgraph: Subgraph, value: str) -> tuple[Reader, tuple[object, ...]]:
        emitter, graph = self.emitter, self.emitter.graph
        names = [*(output.value for output in subgraph.outputs), *preactivations(subgraph)]
        ends, values = [], []
        for output in subgraph.outputs:
            if output.value in graph.neuron[subgraph.name].values:
                smooth = names.index(output.smooth or output.value)
                h = names.index(output.preactivation)
                phi = tail_function(emitter.traced.module, graph.tail(output), output.preactivation)
                ends.append(End(output.value, names.index(output.value), smooth, h, phi))
                exact, target = emitter.exact.get(output.value), self.targets.get(output.value)
                values.append((emitter.seen[output.value], exact, target))
        reader = Reader(body_of(emitter, subgraph), subgraph.inputs.index(value), tuple(ends))
        return reader, (self.snapshots.get(subgraph.name), arguments_of(emitter, subgraph), tuple(values))

    # Decoders.

    def _decoder(self, connection: Connection) -> Decoder:
        graph, output = self.emitter.graph, self.emitter.graph.representation[connection.value]
        phi = tail_function(self.emitter.traced.module, graph.tail(output), output.preactivation)
        return Decoder(layout(graph, connection), phi)

    def _smooth(self, value: str) -> fx.Node:
        """A representation, before a discrete unit if it has one."""
        return self.emitter.attached[self.emitter.graph.representation[value].smooth or value]

    def decoded(self, connection: Connection, error: fx.Node, factors: list[fx.Node]) -> fx.Node:
        """The message through a decoder."""
        emitter, source = self.emitter, connection.source_value
        bias = emitter.get(f"error_weights.{bias_name(emitter.weight_names[connection.name][0])}")
        module = Decoded(self._decoder(connection), emitter.rule.eta)  # type: ignore[attr-defined]
        return emitter.call_module(
            f"d_{connection.value}_from_{source}", module, error, self._smooth(source), self._smooth(connection.value),
            emitter.batch, *factors, bias,
        )  # fmt: skip

    def decoder_update(self, connection: Connection, parameters: list[fx.Node]) -> fx.Node:
        emitter, graph = self.emitter, self.emitter.graph
        reader, source = graph.subgraph[connection.source], graph.representation[connection.source_value]
        names = [*(output.value for output in reader.outputs), *preactivations(reader)]
        place = reader.inputs.index(connection.value), names.index(source.smooth or source.value)
        noise = emitter.rule.noise  # type: ignore[attr-defined]
        module = DecoderUpdate(self._decoder(connection), body_of(emitter, reader), *place, noise)
        return emitter.call_module(
            f"{connection.value}_from_{connection.source_value}_update", module, self.snapshots.get(reader.name),
            arguments_of(emitter, reader), self._smooth(connection.value), emitter.seen[connection.value],
            emitter.batch, *parameters,
        )  # fmt: skip

    # Parameters that an optimizer may change only when nothing reads them any more.

    def hold(self, names: list[str]) -> None:
        """Hand gradients to the optimizer once their parameters' subgraphs are evaluated no more."""
        graph = self.emitter.graph
        users = [subgraph for subgraph in graph.subgraphs if not set(names).isdisjoint(subgraph.states)]
        self.held.append((names, set().union(*map(self._reads_neurons, users))))

    def release(self, displaced: str = "") -> list[list[str]]:
        """The held names that wait for nothing, after one more subgraph has its error."""
        self.displaced.add(displaced)
        free = [names for names, waiting in self.held if waiting <= self.displaced]
        self.held = [(names, waiting) for names, waiting in self.held if not waiting <= self.displaced]
        return free
