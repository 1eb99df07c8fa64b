"""The boxes and edges of a drawing as GraphML, for networkx, Gephi, yEd and the like."""

from __future__ import annotations

import io

import networkx as nx

from graphlocal.ir import LocalGraph
from graphlocal.targets.show.view import Errors, view


def graphml(graph: LocalGraph, *, operations: bool = False, errors: Errors = "all") -> str:
    """A directed multigraph. Nodes have a `kind` (input, subgraph, operation, output) and a `name`.

    Edges have a `kind` (data, loss, vjp, feedback), an identifier, and the value that they carry or reach.
    operations, errors: as in `graphlocal.targets.show.dot.dot`. Raises InputError as that does.
    """
    drawing = view(graph, operations=operations, errors=errors)
    groups = {group.key: group.title for group in drawing.groups}
    found = nx.MultiDiGraph(title=" | ".join(drawing.title))
    for box in drawing.boxes:
        found.add_node(box.key, kind=box.kind, group=groups.get(box.group, ""), **box.facts)
    for number, edge in enumerate(drawing.edges):
        found.add_edge(edge.source, edge.target, key=f"e{number}", kind=edge.kind, exact=edge.exact, **edge.facts)
    file = io.BytesIO()
    nx.write_graphml_xml(found, file)
    return file.getvalue().decode()
