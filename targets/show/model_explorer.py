"""The JSON that Google's Model Explorer reads: a collection of two graphs, the model and its error graph.

The model's nodes are its operations; their namespaces, which it folds into boxes, are the regions of the partition
tree and the subgraphs. Its layout is for graphs without cycles, so that the error connections are a graph of their own.
The format is that of its `GraphCollection` (input_graph.ts): nodes with id, label, namespace, attrs, incomingEdges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from graphlocal.ir import LocalGraph
from graphlocal.targets.show.view import Box, Edge, Fact, View, printable, view


def model_explorer(graph: LocalGraph) -> str:
    """The collection, as JSON."""
    opened, closed = view(graph, operations=True, errors="none"), view(graph)
    graphs = [{"id": "model", "nodes": _nodes(opened, opened.data), "groupNodeAttributes": _groups(opened, closed)}]
    if closed.errors:
        graphs.append({"id": "error graph", "nodes": _nodes(closed, closed.errors)})
    return json.dumps({"label": printable(graph.name) or "model", "graphs": graphs}, indent=1) + "\n"


def _nodes(drawing: View, edges: tuple[Edge, ...]) -> list[dict[str, Any]]:
    incoming: dict[str, list[Edge]] = {}
    for edge in edges:
        incoming.setdefault(edge.target, []).append(edge)
    namespaces = _namespaces(drawing)
    return [
        {
            "id": box.key,
            "label": _drawable(box.title),
            "namespace": namespaces[box.group],
            "attrs": _attributes(box.facts),
            "incomingEdges": [_incoming(edge, place) for place, edge in enumerate(incoming.get(box.key, ()))],
            "outputsMetadata": [{"id": "0", "attrs": _outputs(box)}],
        }
        for box in drawing.boxes
    ]


def _incoming(edge: Edge, place: int) -> dict[str, Any]:
    found = {"sourceNodeId": edge.source, "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
    return found if edge.kind == "data" else found | {"metadata": {key: str(edge.facts[key]) for key in edge.facts}}


def _outputs(box: Box) -> list[dict[str, str]]:
    shape = box.facts.get("type") or box.facts.get("types")
    return [{"key": "tensor_shape", "value": str(shape)}] if shape else []


def _attributes(facts: Mapping[str, Fact]) -> list[dict[str, str]]:
    return [{"key": key, "value": str(value)} for key, value in facts.items() if value != ""]


def _namespaces(drawing: View) -> dict[str, str]:
    """The path of each group. A slash would start another level, so that one in a name becomes a bar."""
    paths = {"": ""}
    for group in drawing.groups:
        above = paths[group.parent]
        paths[group.key] = f"{above}/" * bool(above) + _drawable(group.title).replace("/", "|")
    return paths


def _drawable(title: str) -> str:
    """The title without the dot after its number, which Model Explorer's font doesn't have."""
    return title.replace(" · ", ": ", 1)


def _groups(opened: View, closed: View) -> dict[str, dict[str, str]]:
    """What is known of each subgraph, by its namespace; the drawing itself is the empty one."""
    paths = _namespaces(opened)
    group_of = {str(box.facts["subgraph"]): paths[box.group] for box in opened.boxes if box.kind == "operation"}
    found = {"": {f"line {i}": line for i, line in enumerate(opened.title, 1)}}
    for box in closed.boxes:
        if box.kind == "subgraph":
            found[group_of[str(box.facts["name"])]] = {k: str(v) for k, v in box.facts.items() if v != ""}
    return found
