"""InsertErrorNeurons: give an error neuron to every subgraph that learns or hands errors on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphlocal.ir import ErrorNeuron, LocalGraph, Subgraph


@dataclass(frozen=True)
class InsertErrorNeurons:
    """One error neuron for each subgraph that

    1. has a trainable parameter, or reads a value of a subgraph with an error neuron, and
    2. has a float representation from which a float output of the model can be reached.
    """

    name: str = "error-neurons"

    def apply(self, graph: LocalGraph) -> LocalGraph:
        reaching = _values_that_reach_an_output(graph)
        learning: set[str] = set()
        neurons = []
        for subgraph in graph.subgraphs:
            reads = (graph.owner.get(value) for value in subgraph.inputs if graph.is_float(value))
            if not graph.trainable(subgraph) and not any(owner in learning for owner in reads):
                continue
            values = tuple(output.value for output in subgraph.outputs if output.value in reaching)
            if values:
                learning.add(subgraph.name)
                neurons.append(ErrorNeuron(subgraph.name, values))
        return replace(graph, error_neurons=tuple(neurons))


def _values_that_reach_an_output(graph: LocalGraph) -> set[str]:
    reaching = {value for value in graph.outputs if graph.is_float(value)}
    for subgraph in reversed(graph.subgraphs):
        if _reached_inside(graph, subgraph, reaching):
            reaching.update(value for value in subgraph.inputs if graph.is_float(value))
    return reaching


def _reached_inside(graph: LocalGraph, subgraph: Subgraph, reaching: set[str]) -> bool:
    return any(output.value in reaching for output in subgraph.outputs)
