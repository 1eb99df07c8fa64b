"""The order of boxes along the model."""

from __future__ import annotations

import networkx as nx

from graphlocal.ir import LocalGraph
from graphlocal.passes.boxes import Labels


def boxes_in_order(graph: LocalGraph, boxes: Labels) -> list[str]:
    """Boxes in topological order, ties in program order, those of one cycle side by side."""
    rank: dict[str, int] = {}
    for op in graph.operations:
        rank.setdefault(boxes[op.name], len(rank))
    dag = nx.DiGraph()
    dag.add_nodes_from(rank)
    dag.add_edges_from({(boxes[a], boxes[b]) for a, b in graph.operation_dag.edges if boxes[a] != boxes[b]})
    condensed = nx.condensation(dag)
    first = {c: min(rank[box] for box in data["members"]) for c, data in condensed.nodes(data=True)}
    sequence = nx.lexicographical_topological_sort(condensed, key=first.__getitem__)
    return [box for c in sequence for box in sorted(condensed.nodes[c]["members"], key=rank.__getitem__)]
