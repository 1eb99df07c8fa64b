"""Rules on the partition: every operation in one subgraph, and subgraphs that can run one after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

import networkx as nx

from graphlocal.ir import LocalGraph, Representation, Subgraph
from graphlocal.verify.rule import Broken, Rule, listed, place, repeated, shortest_cycles, steps


def _coverage(graph: LocalGraph) -> Iterator[Broken]:
    if not graph.subgraphs:
        return
    position = {op.name: index for index, op in enumerate(graph.operations)}
    owners = Counter(op for subgraph in graph.subgraphs for op in subgraph.operations)
    for op in graph.operations:
        if owners[op.name] != 1:
            names = [subgraph.name for subgraph in graph.subgraphs if op.name in subgraph.operations]
            message = f"operation {op.name!r} must be in one subgraph once; it is in {listed(names)}"
            yield Broken(message, where=place(graph, op.name))
    for subgraph in graph.subgraphs:
        unknown = [op for op in subgraph.operations if op not in position]
        if unknown:
            yield Broken(f"subgraph {subgraph.name!r} runs {listed(unknown)}, no operation of the model")
        elif not subgraph.operations:
            yield Broken(f"subgraph {subgraph.name!r} runs no operation")
        elif list(subgraph.operations) != sorted(subgraph.operations, key=position.__getitem__):
            yield Broken(f"subgraph {subgraph.name!r} does not list its operations in program order")


def _groups(graph: LocalGraph) -> Iterator[Broken]:
    members: dict[str, dict[str, str]] = {}
    for op in graph.operations:
        if op.group and op.name in graph.owner:
            members.setdefault(op.group, {}).setdefault(graph.owner[op.name], op.name)
    for group, found in members.items():
        if len(found) > 1:
            parts = ", ".join(f"{op!r} is in subgraph {subgraph!r}" for subgraph, op in found.items())
            where = "; ".join(place(graph, op) for op in found.values())
            yield Broken(f"the group {group!r} is cut: {parts}", where=where)


def _regions(graph: LocalGraph) -> Iterator[Broken]:
    first: dict[str, tuple[Subgraph, tuple[str, ...]]] = {}
    for subgraph in graph.subgraphs:
        for region in repeated(subgraph.regions):
            yield Broken(f"region {region!r} encloses itself at subgraph {subgraph.name!r}")
        for depth, region in enumerate(dict.fromkeys(subgraph.regions)):
            above = subgraph.regions[:depth]
            other, known = first.setdefault(region, (subgraph, above))
            if known != above:
                yield Broken(
                    f"region {region!r} lies in {listed(known)} at subgraph {other.name!r}, "
                    f"but in {listed(above)} at subgraph {subgraph.name!r}"
                )


def _convexity(graph: LocalGraph) -> Iterator[Broken]:
    # A path that leaves a subgraph and comes back is a cycle of the quotient: only its knots need a look.
    knots = [part for part in nx.strongly_connected_components(graph.quotient) if len(part) > 1]
    suspects = frozenset().union(*knots)
    for subgraph in graph.subgraphs:
        path = _path_out_and_back(graph, subgraph) if subgraph.name in suspects else None
        if path:
            shown = steps(f"{place(graph, op)}  [subgraph {graph.owner[op]!r}]" for op in path)
            yield Broken(
                f"subgraph {subgraph.name!r} is not convex: this path leaves it and comes back{shown}",
                remedy=f"move {listed(path[1:-1])} into subgraph {subgraph.name!r}, or cut it in two, "
                f"one part up to {path[0]!r} and one from {path[-1]!r}",
            )


def _path_out_and_back(graph: LocalGraph, subgraph: Subgraph) -> list[str] | None:
    """A shortest path from a member through operations outside to a member."""
    members, dag = frozenset(subgraph.operations), graph.operation_dag
    start, end = "(start)", "(end)"
    outside = nx.DiGraph()
    outside.add_nodes_from((start, end))
    for a, b in dag.edges:
        if a not in members or b not in members:
            outside.add_edge(start if a in members else a, end if b in members else b)
    if not nx.has_path(outside, start, end):
        return None
    path: list[str] = nx.shortest_path(outside, start, end)[1:-1]
    first = next(op for op in subgraph.operations if dag.has_edge(op, path[0]))
    last = next(op for op in subgraph.operations if dag.has_edge(path[-1], op))
    return [first, *path, last]


def _acyclic_quotient(graph: LocalGraph) -> Iterator[Broken]:
    order = [subgraph.name for subgraph in graph.subgraphs]
    for cycle in shortest_cycles(graph.quotient, order):
        yield Broken(
            "the subgraphs wait for each other in a cycle" + steps(_crossing(graph, a, b) for a, b in pairwise(cycle)),
            remedy=f"join {listed(cycle[:-1])} into one subgraph, or cut one where the cycle enters it",
            cycle=cycle,
        )


def _crossing(graph: LocalGraph, before: str, after: str) -> str:
    """The operations because of which subgraph `after` waits for subgraph `before`."""
    owner = graph.owner
    edges = graph.operation_dag.edges
    a, b = next((a, b) for a, b in edges if owner[a] == before and owner[b] == after)
    why = "reads" if a in graph.operation[b].inputs else "draws random numbers or changes a state after"
    return f"{before} -> {after}: {place(graph, b)} {why} {place(graph, a)}"


def _topological(graph: LocalGraph) -> Iterator[Broken]:
    number = graph.number
    for before, after in graph.quotient.edges:
        if number[before] > number[after]:
            yield Broken(
                f"subgraph {after!r} (number {number[after]}) is listed before subgraph {before!r} "
                f"(number {number[before]}), which it waits for" + steps([_crossing(graph, before, after)])
            )


def _boundary(graph: LocalGraph) -> Iterator[Broken]:
    readers: dict[str, set[str]] = {}
    for op in graph.operations:
        for value in op.inputs:
            readers.setdefault(value, set()).add(op.name)
    sizes = {op.name for op in graph.sizes}
    for subgraph in graph.subgraphs:
        members = frozenset(subgraph.operations)
        operations = [graph.operation[name] for name in subgraph.operations]
        inputs = {value for op in operations for value in op.inputs} - members - sizes
        states = {state for op in operations for state in op.states}
        outputs = {name for name in members if name in graph.outputs or readers.get(name, set()) - members}
        yield from _same(subgraph, "inputs", subgraph.inputs, inputs)
        yield from _same(subgraph, "states", subgraph.states, states)
        yield from _same(subgraph, "outputs", tuple(output.value for output in subgraph.outputs), outputs)
    for op in graph.operations if graph.subgraphs else ():
        for value in op.inputs if op.target.endswith("getitem") else ():
            start, end = graph.owner.get(value), graph.owner[op.name]
            if start is not None and start != end and graph.type(value) is None:
                yield Broken(
                    f"the tuple {value!r} leaves subgraph {start!r}: {op.name!r} unpacks it in {end!r}",
                    where=place(graph, value),
                    why="only tensors and numbers cross the boundary of a subgraph",
                    remedy=f"move {op.name!r} into subgraph {start!r}",
                )


def _same(subgraph: Subgraph, what: str, given: tuple[str, ...], implied: set[str]) -> Iterator[Broken]:
    problems = {
        "lacks": sorted(implied.difference(given)),
        "wrongly has": sorted(set(given) - implied),
        "repeats": repeated(given),
    }
    found = ", ".join(f"{problem} {listed(names)}" for problem, names in problems.items() if names)
    if found:
        yield Broken(f"the {what} of subgraph {subgraph.name!r} are not those of its operations: it {found}")


def _tail(graph: LocalGraph) -> Iterator[Broken]:
    for subgraph in graph.subgraphs:
        members = frozenset(subgraph.operations)
        for output in subgraph.outputs:
            problem = _tail_problem(graph, members, output)
            if problem:
                yield Broken(
                    f"in subgraph {subgraph.name!r} the value {output.value!r} is no elementwise function of "
                    f"its pre-activation {output.preactivation!r}: {problem}",
                    where=place(graph, output.value),
                )


def _tail_problem(graph: LocalGraph, members: Iterable[str], output: Representation) -> str | None:
    value, passed = output.value, not output.smooth
    while value != output.preactivation or not passed:
        op = graph.operation.get(value)
        if op is None or value not in members:
            return f"on the way back to it comes {value!r}, which is not in the subgraph"
        if output.smooth and op.discrete_of:
            value, passed = op.discrete_of, op.discrete_of == output.smooth
            continue
        if not op.pointwise or len(op.inputs) != 1 or op.states or op.effects:
            return f"on the way back to it comes {value!r}, which is not an elementwise function of one tensor"
        value = op.inputs[0]
    return None if value in members else f"{value!r} is not in the subgraph"


RULES = (
    Rule(
        "coverage",
        _coverage,
        needs=("program-order",),
        why="every operation of the model must run once, in the model's order",
        remedy="name every operation in exactly one part of the partition",
    ),
    Rule(
        "groups",
        _groups,
        needs=("coverage",),
        why="these operations share what cannot cross a boundary, such as a tuple or a buffer in an update",
        remedy="move the cut, so that all of them are on one side",
    ),
    Rule("regions", _regions, why="the regions of a partition form a tree"),
    Rule(
        "convexity",
        _convexity,
        needs=("coverage",),
        why="a subgraph runs as one unit, so it cannot wait in the middle for a result from outside",
    ),
    Rule(
        "acyclic-quotient",
        _acyclic_quotient,
        needs=("coverage",),
        why="each subgraph runs as one unit, so none of these can run first: the cut is not convex",
    ),
    Rule(
        "topological",
        _topological,
        needs=("acyclic-quotient",),
        why="subgraphs are numbered in the order in which they can run",
    ),
    Rule("boundary", _boundary, needs=("coverage",), why="a subgraph sees nothing but its own boundary"),
    Rule(
        "tail",
        _tail,
        needs=("boundary",),
        why="z = phi(h) with an elementwise phi without parameters, inside the subgraph",
    ),
)
