"""Rules on the operations of the model: each name once, nothing read before it is defined."""

from __future__ import annotations

from collections.abc import Iterator

from graphlocal.ir import OUTPUT, LocalGraph
from graphlocal.verify.rule import Broken, Rule, place, repeated


def _unique_names(graph: LocalGraph) -> Iterator[Broken]:
    operations = (*graph.sizes, *graph.operations)
    values = [*(item.name for item in graph.inputs), *(op.name for op in operations)]
    states = [state.name for state in graph.states]
    subgraphs = [subgraph.name for subgraph in graph.subgraphs]
    for what, names in (("values", values), ("states", states), ("subgraphs", subgraphs)):
        for name in repeated(names):
            yield Broken(f"{names.count(name)} {what} are called {name!r}")
    if OUTPUT in subgraphs:
        yield Broken(f"a subgraph is called {OUTPUT!r}, as the gradient of the loss is in the error graph")


def _program_order(graph: LocalGraph) -> Iterator[Broken]:
    defined = {item.name for item in graph.inputs}
    for op in (*graph.sizes, *graph.operations):
        for value in op.inputs:
            if value not in defined:
                what = "which comes no earlier" if value in graph.operation else "which nothing defines"
                yield Broken(f"operation {op.name!r} reads {value!r}, {what}", where=place(graph, op.name))
        written = (effect.removeprefix("writes ") for effect in op.effects if effect.startswith("writes "))
        for state in dict.fromkeys((*op.states, *written)):
            if state not in graph.state:
                message = f"operation {op.name!r} uses the state {state!r}, which the graph does not have"
                yield Broken(message, where=place(graph, op.name))
        defined.add(op.name)
    for value in graph.outputs:
        if value not in defined:
            yield Broken(f"the model returns {value!r}, which nothing defines")


RULES = (
    Rule("unique-names", _unique_names, why="values, states and subgraphs are known by their names"),
    Rule("program-order", _program_order, needs=("unique-names",), why="operations run one after another"),
)
