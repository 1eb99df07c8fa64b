"""Backpropagation on the partition: the oracle that every other rule is measured against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graphlocal.errors import InputError
from graphlocal.ir import Connection, LocalGraph, Operation
from graphlocal.rules.base import Rule, loss_connections, reversed_data_edges

ESTIMATORS = ("straight-through", "slope-adjusted", "slope-annealed", "reinforce")


@dataclass(frozen=True)
class Backprop(Rule):
    """Exact messages along the reversed data edges.

    Every displacement is the vector-Jacobian product of the subgraphs above, the target is z - d, and the
    updates equal autograd's gradients (LRA paper, Lemma 1).

    estimator: what passes a discrete or stochastic unit, whose derivative is zero. None keeps that zero, as autograd
    does. For z = g(s(x)) with a squashing s (a sigmoid before `bernoulli`, a tanh before `sign`):

    - `"straight-through"` sends the error of z to x as it is.
    - `"slope-adjusted"` multiplies it with s'(x), which is the sigmoid-adjusted estimator for Bernoulli units.
      Without an s the two are the same.
    - `"slope-annealed"` multiplies it with the derivative of s(a x) in x, where the slope a = min(`slope_limit`,
      1 + `slope_growth` t) grows with the number t of training steps done. A sign without an s takes tanh for s; other
      units without one pass the error as it is. Forward passes stay as they are.
    - `"reinforce"` sends nothing through the unit. x learns from the score function: (z - s(x)) (l - b) for each
      sample, with the loss l of the sample and the baseline b, a running mean of earlier losses (`baseline`: how much
      of it each step keeps; None: b = 0). For `torch.bernoulli` units only, in models that keep samples apart (not by
      BatchNorm). The losses of the samples are needed: `train_step` takes a loss_fn that returns them, elsewhere set
      `local.losses` before each backward pass of their mean.

    Slope and baseline are kept and saved with the feedback maps. Sources: Williams, "Simple statistical
    gradient-following algorithms", 1992; Bengio, Léonard, Courville, "Estimating or propagating gradients through
    stochastic neurons", 2013; Chung, Ahn, Bengio, "Hierarchical multiscale recurrent neural networks", 2016.

    Raises InputError for options out of range; compiling does for a unit that `"reinforce"` has no score of.
    """

    name: ClassVar[str] = "backprop"
    feedback: ClassVar[bool] = False
    estimator: Literal["straight-through", "slope-adjusted", "slope-annealed", "reinforce"] | None = None
    slope_growth: float = 1e-3
    slope_limit: float = 5.0
    baseline: float | None = 0.9

    def __post_init__(self) -> None:
        if self.estimator not in (None, *ESTIMATORS):
            listed = ", ".join(map(repr, ESTIMATORS))
            raise InputError(f"Backprop(estimator={self.estimator!r})", remedy=f"use {listed} or None")
        for option, least in (("slope_growth", 0.0), ("slope_limit", 1.0)):
            value = getattr(self, option)
            if not isinstance(value, (int, float)) or not least <= value < math.inf:
                raise InputError(f"Backprop({option}={value!r})", why=f"it must be a number of {least:g} or more")
        if self.baseline is not None and not (isinstance(self.baseline, (int, float)) and 0 <= self.baseline < 1):
            raise InputError(f"Backprop(baseline={self.baseline!r})", remedy="use None, or a number from 0 to below 1")

    @property
    def passes_discrete(self) -> bool:
        return self.estimator is not None

    @property
    def passes_squashing(self) -> bool:
        return self.estimator in ("straight-through", "slope-annealed")

    @property
    def anneals(self) -> bool:
        return self.estimator == "slope-annealed"

    @property
    def needs_losses(self) -> bool:
        return self.estimator == "reinforce"

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        if self.needs_losses:
            for op in graph.operations:
                if op.discrete_of:
                    _require_score(graph, op)
        return (*loss_connections(graph), *reversed_data_edges(graph))

    def buffers(self, graph: LocalGraph) -> dict[str, Tensor]:
        found = {}
        if self.anneals or self.needs_losses:
            found["estimator_steps"] = torch.zeros((), dtype=torch.int64)
        if self.needs_losses:
            found["estimator_baseline"] = torch.zeros(())
        return found


def _require_score(graph: LocalGraph, op: Operation) -> None:
    """Raise InputError unless the last operation of a discrete unit draws one bit for each probability."""
    if not op.target.startswith("aten.bernoulli."):
        raise InputError(
            f"the unit {op.name} ({op.target}) has no score function",
            where=op.source,
            why="REINFORCE takes the derivative of the probability with which torch.bernoulli drew a sample",
            remedy="write the unit as torch.bernoulli(probability), such as graphlocal.nn.Bernoulli, or use another "
            "estimator",
        )
    batches = [t.shape[:1] for value in graph.outputs if value in graph.operation and (t := graph.type(value))]
    drawn = graph.type(op.name)
    if drawn is None or drawn.shape[:1] not in batches:
        raise InputError(
            f"the first axis of the unit {op.name} is not the batch",
            where=op.source,
            why="REINFORCE rewards each sample's units with the loss of that sample",
            remedy="keep the batch as the first axis",
        )
