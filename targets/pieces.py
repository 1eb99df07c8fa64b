"""Cut a pass of a lowered training graph into pieces that may run side by side.

A **piece** is a run of neighbouring operators of one action of the schedule (`D3`), compiled to one function; the
optimizer's update of some parameters is a piece of its own. A piece **needs** another if it reads one of its values,
or if one of the two writes memory that the other reads or writes (buffers, random numbers, parameters), in program
order. Since pieces are runs of one list, edges only lead forward and there can be no cycle. Pieces that follow each
other without an alternative, such as `D3` and `U3`, are then joined: no parallelism is lost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import networkx as nx
from torch import fx

from graphlocal.errors import GraphLocalError
from graphlocal.targets.accesses import Access
from graphlocal.targets.eager import apply_updates
from graphlocal.targets.flat import flatten
from graphlocal.targets.training_graph import assemble, roots_of, take


class OrderError(GraphLocalError):
    """Two pieces that depend on each other could run in another order than the program's."""


@dataclass(frozen=True)
class Piece:
    """name: its actions. nodes: in program order. updates: True if it calls the optimizer.

    reads, writes: the values that come from and go to other pieces, by the names of their nodes.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    updates: bool
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cut:
    """A pass in pieces.

    arguments: names of the pass's arguments. saved: values taken from the list that the forward pass saved, as
    (name, position). needs: for each piece, the places of those that must be over before it starts.
    functions: `functions[i](*reads) -> writes`. returned: the values that `finish(*returned) -> result` reads.
    """

    arguments: tuple[str, ...]
    saved: tuple[tuple[str, int], ...]
    pieces: tuple[Piece, ...]
    needs: tuple[frozenset[int], ...]
    functions: tuple[Callable[..., tuple[Any, ...]], ...]
    returned: tuple[str, ...]
    finish: Callable[..., Any]


def cut(module: fx.GraphModule, join: bool = True, first: Callable[[Piece], int] | None = None) -> Cut:
    """The pieces of a forward or error pass, whose training graph was annotated by `accesses.annotate`.

    join: False leaves every piece to one action. first: puts the pieces, and with them the updates, in another order
    than the program's: of those whose needs come before them, the piece with the smallest value is next.
    """
    nodes = [n for n in module.graph.nodes if n.op == "call_function" and n.target is not take]
    runs = [list(run) for _, run in groupby(nodes, _label)]
    needs = tuple(map(frozenset, _needs(runs)))
    groups = runs
    if join:
        groups, needs = _joined(runs, needs)
    if first is not None:
        groups, needs = _ordered(groups, needs, first)
    needs = _updates_in_order(groups, needs)
    (output,) = module.graph.find_nodes(op="output")
    pieces = tuple(map(_piece, groups))
    taken: Any = [(n.name, n.args[1]) for n in module.graph.find_nodes(op="call_function", target=take)]
    returned = tuple(n.name for n in output.all_input_nodes if n.op != "get_attr")
    result = Cut(
        tuple(n.name for n in module.graph.find_nodes(op="placeholder")),
        tuple(taken),
        pieces,
        needs,
        tuple(_function(module, piece) for piece in pieces),
        returned,
        _finish(module, output),
    )
    check_order(result)
    return result


def _label(node: fx.Node) -> tuple[str, str]:
    """Neighbours with the same label form a run."""
    return node.meta.get("action") or "", node.name if node.target is apply_updates else ""


def _needs(runs: Sequence[Sequence[fx.Node]]) -> list[set[int]]:
    """The runs that each run has to wait for."""
    owner = {node: i for i, run in enumerate(runs) for node in run}
    needs: list[set[int]] = [set() for _ in runs]
    writer: dict[str, int] = {}
    readers: defaultdict[str, set[int]] = defaultdict(set)
    for i, run in enumerate(runs):
        for node in run:
            needs[i].update(owner[source] for source in node.all_input_nodes if source in owner)
            access: Access = node.meta.get("access", Access())
            needs[i].update(writer[root] for root in access.reads | access.writes if root in writer)
            for root in access.writes:
                needs[i] |= readers.pop(root, set())
                writer[root] = i
            for root in access.reads - access.writes:
                readers[root].add(i)
        needs[i].discard(i)
    return needs


def _updates_in_order(
    groups: Sequence[Sequence[fx.Node]], needs: Sequence[frozenset[int]]
) -> tuple[frozenset[int], ...]:
    """Let every update wait for the one before: the optimizer sees its gradients in one order, whatever runs where."""
    updates = [i for i, group in enumerate(groups) if _updates(group)]
    before = dict(zip(updates[1:], updates, strict=False))
    return tuple(n | {before[i]} if i in before else n for i, n in enumerate(needs))


def _ordered(
    groups: Sequence[list[fx.Node]], needs: Sequence[frozenset[int]], first: Callable[[Piece], int]
) -> tuple[list[list[fx.Node]], tuple[frozenset[int], ...]]:
    """The groups, each after those that it needs, with the smallest by `first` as early as can be."""
    dag = nx.DiGraph()
    dag.add_nodes_from(range(len(groups)))
    dag.add_edges_from((j, i) for i, before in enumerate(needs) for j in before)
    rank = [first(_piece(group)) for group in groups]
    order = list(nx.lexicographical_topological_sort(dag, key=lambda i: (rank[i], i)))
    place = {i: k for k, i in enumerate(order)}
    return [groups[i] for i in order], tuple(frozenset(place[j] for j in needs[i]) for i in order)


def _joined(
    runs: Sequence[list[fx.Node]], needs: Sequence[frozenset[int]]
) -> tuple[list[list[fx.Node]], tuple[frozenset[int], ...]]:
    """Runs joined with their only follower, where it waits for nothing else; updates stay alone."""
    followers: list[list[int]] = [[] for _ in runs]
    for i, before in enumerate(needs):
        for j in before:
            followers[j].append(i)
    place: dict[int, int] = {}
    groups: list[list[fx.Node]] = []
    waits: list[set[int]] = []
    for i, run in enumerate(runs):
        (only,) = needs[i] if len(needs[i]) == 1 else (None,)
        if only is not None and followers[only] == [i] and not _updates(run) and not _updates(runs[only]):
            place[i] = place[only]
            groups[place[i]] += run
        else:
            place[i] = len(groups)
            groups.append(list(run))
            waits.append({place[j] for j in needs[i]})
    return groups, tuple(map(frozenset, waits))


def _updates(run: Sequence[fx.Node]) -> bool:
    return run[0].target is apply_updates


def _piece(nodes: list[fx.Node]) -> Piece:
    inside = set(nodes)
    reads = dict.fromkeys(a.name for n in nodes for a in n.all_input_nodes if a not in inside and a.op != "get_attr")
    writes = tuple(n.name for n in nodes if any(user not in inside for user in n.users))
    actions = list(dict.fromkeys(n.meta.get("action") or "error" for n in nodes))
    label = " ".join(actions) if len(actions) < 4 else f"{actions[0]} to {actions[-1]}"
    updates = _updates(nodes)
    return Piece(f"{label} optimizer" if updates else label, tuple(nodes), updates, tuple(reads), writes)


def _function(module: fx.GraphModule, piece: Piece) -> Callable[..., tuple[Any, ...]]:
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    sources = {source.name: source for node in piece.nodes for source in node.all_input_nodes}
    for name in piece.reads:
        copied[sources[name]] = graph.placeholder(name)
    for node in piece.nodes:
        _copy(graph, node, copied)
    named = {node.name: node for node in piece.nodes}
    graph.output(tuple(copied[named[name]] for name in piece.writes))
    return flatten(assemble(graph, {}, roots_of(module), "Piece"))


def _finish(module: fx.GraphModule, output: fx.Node) -> Callable[..., Any]:
    """From the values that a pass returns to its result."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in output.all_input_nodes:
        copied[node] = graph.node_copy(node) if node.op == "get_attr" else graph.placeholder(node.name)
    graph.output(fx.map_arg(output.args[0], copied.__getitem__))
    return flatten(assemble(graph, {}, roots_of(module), "Finish"))


def _copy(graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> None:
    for source in node.all_input_nodes:
        if source not in copied:
            copied[source] = graph.node_copy(source)  # a parameter, buffer or feedback map
    copied[node] = graph.node_copy(node, copied.__getitem__)


def check_order(cut: Cut) -> None:
    """Raise OrderError unless every two pieces that depend on each other are ordered by `needs`.

    It looks at every pair of operators that touch the same memory or value, apart from how `needs` was made.
    """
    before: list[set[int]] = []
    for i, needs in enumerate(cut.needs):
        if any(j >= i for j in needs):
            raise _order_error(cut, i, max(needs), "needs a later piece")
        before.append(set(needs).union(*(before[j] for j in needs)))
    for i, j, cause in _conflicts(cut):
        if i not in before[j]:
            raise _order_error(cut, i, j, cause)


def _conflicts(cut: Cut) -> Iterator[tuple[int, int, str]]:
    """Pairs of pieces (earlier, later) that must keep their order, and why."""
    made = {name: i for i, piece in enumerate(cut.pieces) for name in piece.writes}
    touching: defaultdict[str, list[tuple[int, fx.Node]]] = defaultdict(list)
    for j, piece in enumerate(cut.pieces):
        yield from ((made[name], j, f"{name} is computed by one and read by the other")
                    for name in piece.reads if name in made)  # fmt: skip
        for node in piece.nodes:
            access: Access = node.meta.get("access", Access())
            for root in access.reads | access.writes:
                touching[root].append((j, node))
    for root, found in touching.items():
        writers = [k for k, (_, node) in enumerate(found) if root in node.meta["access"].writes]
        for k in writers:
            for other, (place, node) in enumerate(found):
                first, second = (found[k][0], place) if k < other else (place, found[k][0])
                if first != second:
                    yield first, second, f"{found[k][1].name} writes memory ({root}) that {node.name} uses"
    updates = [i for i, piece in enumerate(cut.pieces) if piece.updates]
    yield from ((a, b, "the optimizer takes its updates in order") for a, b in pairwise(updates))


def _order_error(cut: Cut, i: int, j: int, cause: str) -> OrderError:
    return OrderError(
        f"piece {i} ({cut.pieces[i].name}) and piece {j} ({cut.pieces[j].name}) are not kept in order",
        why=cause,
        remedy="report this, with the model: the pieces of a pass are cut wrongly",
    )
