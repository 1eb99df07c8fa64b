"""The nodes that the page draws, in their places: subgraphs, groups, model inputs and the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphlocal.ir import LocalGraph
from graphlocal.targets.page import layout
from graphlocal.targets.page.groups import Group, short_name, tree
from graphlocal.targets.page.layout import Box, Nest, Size, arrange
from graphlocal.text import type_label

AT_FIRST = 220
"""Nodes and edges that the page opens with; it shows 300, so there is room for errors and one opened subgraph."""
_MOST_INPUTS = 6
_HEIGHT, _ROUND_HEIGHT = 62, 44
_CHARACTER, _SMALL_CHARACTER, _NARROWEST, _WIDEST = 7.8, 6.3, 132, 204

Edge = tuple[str, str, str]
Node = dict[str, Any]


@dataclass(frozen=True)
class Drawing:
    """nodes: with positions relative to their `parent`. edges: (from, to, value) between subgraphs and model ends."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    @classmethod
    def of(cls, graph: LocalGraph) -> Drawing:
        """Lay a graph out, with as many groups open as fit."""
        nodes, members = _nodes(graph)
        ends = [node for node in nodes.values() if node["kind"] in ("input", "output")]
        sources = [node["id"] for node in ends if node["kind"] == "input"]
        members[""] = [*sources, *members[""], *(node["id"] for node in ends if node["kind"] == "output")]
        edges = _edges(graph, sources)
        links = {(a, b) for a, b, _ in edges}
        opened = _opened(members, links)
        types = [type_label(graph.type(s.outputs[0].value)) for s in graph.subgraphs if s.outputs]
        _place(nodes, members, links, opened, max(map(len, types), default=0) + len(" · 100 k"))
        return cls(tuple(nodes.values()), edges)

    @property
    def spacing(self) -> dict[str, int]:
        """What the page needs to make room where something opens."""
        return {
            "x": layout.GAP_X,
            "y": layout.GAP_Y,
            "band": layout.BAND_GAP,
            "padX": layout.PAD_X,
            "padY": layout.PAD_Y,
        }


def _nodes(graph: LocalGraph) -> tuple[dict[str, Node], dict[str, list[str]]]:
    """All nodes by id without positions, and the members of each group; `""` is the root."""
    nodes: dict[str, Node] = {}
    members: dict[str, list[str]] = {}
    inputs = graph.inputs if len(graph.inputs) <= _MOST_INPUTS else ()
    for i, item in enumerate(inputs):
        nodes[f"i{i}"] = {"id": f"i{i}", "kind": "input", "name": item.name, "label": item.name,
                          "detail": type_label(item.type), "parent": ""}  # fmt: skip
    if not inputs:
        label = f"{len(graph.inputs)} inputs"
        nodes["i0"] = {"id": "i0", "kind": "input", "name": label, "label": label, "detail": "", "parent": ""}

    def add(group: Group, id: str, name: str) -> None:
        names = [graph.subgraphs[m].name if isinstance(m, int) else _title(graph, m) for m in group.members]
        members[id] = []
        for member, full in zip(group.members, names, strict=True):
            own = f"s{member}" if isinstance(member, int) else f"g{len(members) - 1}"
            known = {"id": own, "name": full, "parent": id}
            known["label"] = full if "…" in full else short_name(full, names, name)
            members[id].append(own)
            if isinstance(member, int):
                nodes[own] = known | {"kind": "subgraph", "number": member + 1}
            else:
                nodes[own] = known | {"kind": "group", "of": member.kind}
                add(member, own, full if member.kind != "run" else name)

    add(tree(graph), "", "")
    types = [type_label(graph.type(v)) if v in graph.operation else "" for v in graph.outputs]
    nodes["out"] = {"id": "out", "kind": "output", "name": "output", "label": "output", "parent": "",
                    "detail": types[0] if len(types) == 1 else f"{len(types)} values",
                    "values": [list(pair) for pair in zip(graph.outputs, types, strict=True)]}  # fmt: skip
    return nodes, members


def _title(graph: LocalGraph, group: Group) -> str:
    if group.kind != "run":
        return group.name
    inside = group.subgraphs()
    return f"{graph.subgraphs[inside[0]].name} … {graph.subgraphs[inside[-1]].name}"


def _edges(graph: LocalGraph, sources: Sequence[str]) -> tuple[Edge, ...]:
    """Which value goes where; the sizes of inputs are left out, every subgraph may read them."""
    place = {item.name: sources[min(i, len(sources) - 1)] for i, item in enumerate(graph.inputs)}
    place |= {op: f"s{i}" for i, subgraph in enumerate(graph.subgraphs) for op in subgraph.operations}
    found = [
        (place[value], f"s{i}", value)
        for i, subgraph in enumerate(graph.subgraphs)
        for value in subgraph.inputs
        if value in place
    ]
    return (*found, *dict.fromkeys((place[value], "out", value) for value in graph.outputs if value in place))


def _opened(members: Mapping[str, Sequence[str]], links: set[tuple[str, str]]) -> set[str]:
    """The groups to show open, level by level, while nodes and edges stay within `AT_FIRST`.

    The first level that does not fit as a whole is opened as far as it goes, so that its neighbours look alike.
    """
    path = _paths(members)
    opened: set[str] = set()
    level = [m for m in members[""] if m in members]
    while level:
        fits = _elements(path, links, opened.union(level)) <= AT_FIRST
        for group in level:
            if fits or _elements(path, links, opened | {group}) <= AT_FIRST:
                opened.add(group)
        level = [m for group in level for m in members[group] if m in members] if fits else []
    return opened


def _elements(path: Mapping[str, tuple[str, ...]], links: set[tuple[str, str]], opened: set[str]) -> int:
    """How many nodes and edges are visible."""
    shown = sum(id != "" and opened.issuperset(above) for id, above in path.items())
    crossing = {(_shown(path, opened, a), _shown(path, opened, b)) for a, b in links}
    return shown + sum(a != b for a, b in crossing)


def _paths(members: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The groups around each node, outermost first, without the root."""
    path: dict[str, tuple[str, ...]] = {"": ()}
    waiting = [""]
    while waiting:
        group = waiting.pop()
        above = (*path[group], group) if group else ()
        path |= dict.fromkeys(members[group], above)
        waiting += [m for m in members[group] if m in members]
    return path


def _shown(path: Mapping[str, tuple[str, ...]], opened: set[str], node: str) -> str:
    """The node itself, or the outermost closed group around it."""
    return next((group for group in path[node] if group not in opened), node)


def _place(
    nodes: dict[str, Node],
    members: Mapping[str, Sequence[str]],
    links: set[tuple[str, str]],
    opened: set[str],
    most_detail: int,
) -> None:
    """Give every node its size and its place in its group. most_detail: characters below a subgraph's name."""
    longest = max((len(n["label"]) for n in nodes.values() if n["kind"] in ("subgraph", "group")), default=0)
    needed = max(longest * _CHARACTER, most_detail * _SMALL_CHARACTER) + 26
    leaves: dict[str, Size] = dict.fromkeys(nodes, (round(min(max(needed, _NARROWEST), _WIDEST)), _HEIGHT))
    for id, node in nodes.items():
        if node["kind"] in ("input", "output"):
            letters = max(len(node["label"]), len(node["detail"]))
            leaves[id] = (round(min(max(letters * 6.6 + 30, 84), _WIDEST)), _ROUND_HEIGHT)
    path = _paths(members)
    between = _between(path, links)

    def nest(group: str, inside: set[str]) -> Nest:
        open_members = {m: nest(m, inside) for m in members[group] if m in inside}
        return Nest(tuple(members[group]), frozenset(between.get(group, ())), leaves, open_members)

    boxes: dict[str, Box] = arrange(nest("", opened))
    for group in members:
        if group and group not in boxes:
            boxes[group] = arrange(nest(group, set()), (layout.OWN_WIDTH,))[""]
    for group, box in boxes.items():
        for id, place in box.places.items():
            size = boxes[id].size if id in opened else leaves[id]
            nodes[id] |= {"x": place.x, "y": place.y, "w": size[0], "h": size[1], "band": place.band,
                          "column": place.column}  # fmt: skip
        if group:
            nodes[group] |= {"open": group in opened, "inner": list(box.size)}
    for id in nodes:
        nodes[id]["closed"] = list(leaves[id])


def _between(path: Mapping[str, tuple[str, ...]], links: set[tuple[str, str]]) -> dict[str, set[tuple[str, str]]]:
    """In each group, the edges between its members that stand for those between what is inside them."""
    found: dict[str, set[tuple[str, str]]] = {}
    for a, b in links:
        up, down = (*path[a], a), (*path[b], b)
        common = next(i for i, (x, y) in enumerate(zip(up, down, strict=False)) if x != y)
        found.setdefault(up[common - 1] if common else "", set()).add((up[common], down[common]))
    return found
