"""Local representation alignment (LRA) along the reversed data edges: by feedback maps, and by derivatives.

Of both, with the pre-activation h, the representation z = phi(h), a displacement d and the local loss in u = z - y
(log(1 + u^2), u^2 / 2 or |u|): target y = phi(h - beta Normalize(d, c2)), per sample; error at h
delta = loss'(z - y) * phi'(h); update Normalize(delta z_in^T, c1). Normalize(v, c) = c v / ||v|| where ||v|| is at
least c.

Variable depth: with `epsilon`, a sample whose local loss at a subgraph (summed over its representations; at the output
||e||^2 / 2, with its error e) is below epsilon sends no error further down, and `local.credit_depth` tells how far
errors went. What lies below is computed for the other samples alone, on the rows of axis 0. Samples stay together
where that can't be: a subgraph that draws random numbers, writes states (batch normalization), or holds values whose
axis 0 is not the batch gets zeros for the samples that stopped; a representation whose axis 0 is not the batch stops
no sample.

Source: Ororbia, Mali, Kifer, Giles, "Conducting credit assignment by aligning local representations", 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graphlocal.errors import InputError
from graphlocal.ir import Connection, LocalGraph
from graphlocal.rules.aligning import (
    AligningRule,
    bounded,
    require_counts,
    require_local_loss,
    require_positive,
    require_reduction,
    sample_rms,
    scaled,
    through_tail,
)
from graphlocal.rules.base import Neuron
from graphlocal.rules.wiring import derivatives_along_data, feedback_along_data


@dataclass(frozen=True)
class LRAFeedback(AligningRule):
    """LRA-fdbk: every subgraph hands the displacement E delta to those below it, with delta its own error.

    rescale: None is the paper's rule, as above. `"rms"` bounds the batch instead of each sample: the target is set at
    y = phi(h - beta c2 d / rms(d)), and delta is brought to the size rms(d), the root mean square of the samples'
    norms ||d||. Normalize takes from each sample how wrong it is: displacements above c2 become alike, and what phi'
    makes small shrinks further from layer to layer. With units without an upper bound (ReLU, softplus, LWTA), samples
    that are right then push as hard as those that are wrong, always the same way, until the representations of all
    samples are one direction that grows: after 300 steps of Adam on 784-3x256-10 ReLU a norm of 2100, a cosine of 0.99
    between samples and 48 % error on Fashion-MNIST, with `"rms"` 160, 0.86 and 32 %. Feedback alignment has 28 %
    there; the rest to backpropagation's 21 % is what fixed random E costs with such units.

    local_loss: `"cauchy"`, `"l2"` or `"l1"`. beta: modulation factor. sigma: standard deviation of E; None is
    1 / sqrt(source features), which keeps the size of an error. c1, c2: bounds on the norms of each update and of each
    sample's displacement, None for none. c1 makes the steps smaller where it binds (an 8x128 tanh net takes a learning
    rate of 0.03 with c1=1 as it does 0.01 with None) and keeps deep nets of unbounded units from diverging under SGD.
    epsilon: see the module; local losses are those at the paper's targets. reduction: how the model's loss is reduced
    over the batch, `"mean"` or `"sum"` (then updates are sums over the batch too, before c1 bounds them).
    feedback_share, feedback_total, max_source_features: as in RecLRA.

    Raises InputError for options out of range.
    """

    name: ClassVar[str] = "lra-fdbk"
    local_loss: Literal["cauchy", "l2", "l1"] = "cauchy"
    beta: float = 1.0
    sigma: float | None = None
    c1: float | None = 1.0
    c2: float | None = 1.0
    feedback_share: float = 0.25
    feedback_total: float = 1.0
    max_source_features: int = 1024
    epsilon: float | None = None
    reduction: Literal["mean", "sum"] = "mean"
    rescale: Literal["rms"] | None = "rms"

    def __post_init__(self) -> None:
        require_local_loss(self)
        require_reduction(self)
        if self.rescale not in ("rms", None):
            raise InputError(f"LRAFeedback(rescale={self.rescale!r})", remedy="use 'rms' or None")
        options = ("beta", "sigma", "c1", "c2", "feedback_share", "feedback_total", "epsilon")
        require_positive(self, options, optional=("sigma", "c1", "c2", "epsilon"))

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        return feedback_along_data(graph, self.max_source_features, self.feedback_share, self.feedback_total)

    def initial_feedback(self, connection: Connection, generator: torch.Generator) -> Tensor:
        rows, columns = connection.weight
        sigma = 1 / math.sqrt(max(columns, 1)) if self.sigma is None else self.sigma
        return torch.randn(rows, columns, generator=generator) * sigma

    @property
    def homogeneous(self) -> bool:
        own = type(self).local_error is LRAFeedback.local_error and type(self).mismatch is AligningRule.mismatch
        return own and self.rescale is not None and self.c2 is not None

    def move(self, neuron: Neuron, displacement: Tensor) -> Tensor:
        return neuron.h - self.beta * bounded(displacement, self.c2)

    def local_error(self, neuron: Neuron, displacement: Tensor) -> Tensor:
        if self.rescale is None:
            return super().local_error(neuron, displacement)
        step = displacement if self.c2 is None else scaled(displacement, self.c2)
        error = self.mismatch(neuron, neuron.phi(neuron.h - self.beta * step))
        return scaled(error, sample_rms(displacement))


@dataclass(frozen=True)
class LRADiff(AligningRule):
    """LRA-diff: targets descend the local losses of the subgraphs above, by derivatives and in several steps.

    The displacement is the derivative of those losses at the pre-activation, by the vector-Jacobian products of the
    subgraphs that read z, times phi'. From the second step on, these subgraphs are evaluated again at the candidate
    phi(h), and their losses are taken there, against their own targets, which stay. The output has no target but
    the gradient e of the loss at z: its loss is taken to be ||z - (z - e)||^2 / 2, which is exact for a squared error.
    With `steps=1`, `"l2"`, beta 1, no bounds and phi the identity the updates are backpropagation's (Lemma 1).

    A subgraph that is evaluated again draws the random numbers of its forward pass, and the states that it writes
    (running statistics) are written on copies. What is read of a discrete unit is moved by as much as the value before
    the unit. steps: K, how often a target is moved. The other options are those of LRAFeedback.

    Raises InputError for options out of range; compiling with `steps` above 1 does for a subgraph whose data decide
    its path.
    """

    name: ClassVar[str] = "lra-diff"
    feedback: ClassVar[bool] = False
    steps: int = 1
    local_loss: Literal["cauchy", "l2", "l1"] = "cauchy"
    beta: float = 1.0
    c1: float | None = 1.0
    c2: float | None = 1.0
    epsilon: float | None = None
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        require_local_loss(self)
        require_reduction(self)
        require_counts(self, ("steps",))
        require_positive(self, ("beta", "c1", "c2", "epsilon"), optional=("c1", "c2", "epsilon"))
        if self.epsilon is not None and self.steps > 1:
            raise InputError(
                "LRADiff(epsilon, steps above 1)", why="variable depth is there for one step of the target"
            )

    @property
    def inner_steps(self) -> int:
        return self.steps

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        return derivatives_along_data(graph)

    def move(self, neuron: Neuron, displacement: Tensor) -> Tensor:
        return neuron.h - self.beta * bounded(through_tail(neuron, displacement), self.c2)
