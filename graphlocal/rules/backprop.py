"""Backpropagation on the partition: the oracle that every other rule is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from graphlocal.errors import InputError
from graphlocal.ir import Connection, LocalGraph
from graphlocal.rules.base import Rule, loss_connections, reversed_data_edges


@dataclass(frozen=True)
class Backprop(Rule):
    """Exact messages along the reversed data edges.

    Every displacement is the vector-Jacobian product of the subgraphs above, the target is z - d, and the
    updates equal autograd's gradients (LRA paper, Lemma 1).

    estimator: what passes a discrete or stochastic unit, whose derivative is zero. None keeps that zero, as autograd
    does. For z = g(s(x)) with a squashing s (a sigmoid before `bernoulli`, a tanh before `sign`):
    `"straight-through"` sends the error of z to x as it is; `"slope-adjusted"` multiplies it with s'(x), which is the
    sigmoid-adjusted estimator for Bernoulli units. Without an s the two are the same. Sources: Bengio, Léonard,
    Courville, "Estimating or propagating gradients through stochastic neurons", 2013; Chung, Ahn, Bengio,
    "Hierarchical multiscale recurrent neural networks", 2016.

    Raises InputError for another estimator.
    """

    name: ClassVar[str] = "backprop"
    feedback: ClassVar[bool] = False
    estimator: Literal["straight-through", "slope-adjusted"] | None = None

    def __post_init__(self) -> None:
        if self.estimator not in (None, "straight-through", "slope-adjusted"):
            raise InputError(
                f"Backprop(estimator={self.estimator!r})", remedy="use 'straight-through', 'slope-adjusted' or None"
            )

    @property
    def passes_discrete(self) -> bool:
        return self.estimator is not None

    @property
    def passes_squashing(self) -> bool:
        return self.estimator == "straight-through"

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        return (*loss_connections(graph), *reversed_data_edges(graph))
