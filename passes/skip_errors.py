"""InsertSkipErrors: draw the connections of the error graph, as the learning rule wires them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphlocal.errors import InputError, nearest
from graphlocal.ir import OUTPUT, Connection, LocalGraph
from graphlocal.rules import Rule, feedback_connection


@dataclass(frozen=True)
class InsertSkipErrors:
    """Wire the error neurons.

    rule: draws the connections. extra: the user's own skip-errors, as (source, target) pairs; each end is
    `"output"` (sources only), a subgraph, or a region of the partition tree.
    Neurons that no connection reaches and that train nothing are taken out again.
    """

    rule: Rule
    extra: tuple[tuple[str, str], ...] = ()
    name: str = "skip-errors"

    def apply(self, graph: LocalGraph) -> LocalGraph:
        """Raises InputError for a skip-error whose ends do not exist, or a rule that has none."""
        drawn = self.rule.connect(graph)
        known = {connection.name for connection in drawn}
        extra = [c for pair in self.extra for c in self._resolve(graph, drawn, *pair) if c.name not in known]
        connections = (*drawn, *{c.name: c for c in extra}.values())
        reached = {connection.target for connection in connections}
        neurons = tuple(
            neuron
            for neuron in graph.error_neurons
            if neuron.subgraph in reached or graph.trainable(graph.subgraph[neuron.subgraph])
        )
        twins = self.rule.twins(graph)
        return replace(graph, rule=str(self.rule), error_neurons=neurons, connections=connections, twins=twins)

    def _resolve(self, graph: LocalGraph, drawn: Sequence[Connection], source: str, target: str) -> list[Connection]:
        if not self.rule.feedback:
            raise InputError(
                f"skip_errors are given, but the rule {self.rule.name!r} has "
                + ("decoders of what a subgraph reads only" if self.rule.decodes else "exact messages only"),
                remedy="use a rule with feedback maps, such as rule='rec-lra'",
            )
        sources = _output_sources(graph, drawn) if source == OUTPUT else _ends(graph, source, "source")
        return [
            feedback_connection(graph, a, source_value, b, value, depth=1)
            for a in sources
            for source_value in graph.neuron[a].values
            for b in _ends(graph, target, "target")
            for value in graph.neuron[b].values
        ]


def _output_sources(graph: LocalGraph, drawn: Sequence[Connection]) -> list[str]:
    """Where the exact error of the output ends: the subgraphs it reaches that hand it no further exactly."""
    handing = {c.source for c in drawn if c.kind == "vjp" and c.exact}
    return list(dict.fromkeys(c.target for c in drawn if c.exact and c.target not in handing))


def _ends(graph: LocalGraph, name: str, role: str) -> list[str]:
    """The subgraph of that name, or the subgraphs that produce what leaves the region of that name."""
    if name in graph.neuron:
        return [name]
    region = [s for s in graph.subgraphs if name in s.regions and s.name in graph.neuron]
    inside = {s.name for s in region}
    exits = [s.name for s in region if _read_outside(graph, s.name, inside)]
    if exits:
        return exits
    known = [OUTPUT, *graph.neuron] if role == "source" else list(graph.neuron)
    raise InputError(
        f"skip_errors name the {role} {name!r}, which is no subgraph with an error neuron: {nearest(name, known)}",
        remedy="print(local.graph) lists the subgraphs",
    )


def _read_outside(graph: LocalGraph, name: str, inside: set[str]) -> bool:
    readers = (reader.name for value in graph.neuron[name].values for reader in graph.readers.get(value, ()))
    return any(reader not in inside for reader in readers)
