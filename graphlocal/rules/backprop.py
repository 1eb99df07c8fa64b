"""Backpropagation on the partition: the oracle that every other rule is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphlocal.ir import Connection, LocalGraph
from graphlocal.rules.base import Rule, loss_connections, reversed_data_edges


@dataclass(frozen=True)
class Backprop(Rule):
    """Exact messages along the reversed data edges.

    Every displacement is the vector-Jacobian product of the subgraphs above, the target is z - d, and the
    updates equal autograd's gradients (LRA paper, Lemma 1).
    """

    name: ClassVar[str] = "backprop"
    feedback: ClassVar[bool] = False
    passes_discrete: ClassVar[bool] = False

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        return (*loss_connections(graph), *reversed_data_edges(graph))
