"""Local representation alignment along the reversed data edges, with fixed feedback maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graphlocal.errors import InputError
from graphlocal.ir import Connection, LocalGraph
from graphlocal.rules.base import Neuron, Rule
from graphlocal.rules.wiring import feedback_along_data

_DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "cauchy": lambda u: 2 * u / (1 + u**2),
    "l2": lambda u: u,
    "l1": torch.sign,
}
"""Of the local losses log(1 + u^2), u^2 / 2 and |u|, in u = z - y."""


@dataclass(frozen=True)
class LRAFeedback(Rule):
    """LRA-fdbk (Ororbia et al., local representation alignment): every subgraph hands a displacement to those below it.

    d = Normalize(E delta, c2) per sample, with delta the error at the pre-activation of the subgraph above; target
    y = phi(h - beta d); delta = dloss(z, y)/dz * phi'(h); update = Normalize(delta z_in^T, c1).
    Normalize(v, c) = c v / ||v|| where ||v|| is at least c.

    local_loss: `"cauchy"`, `"l2"` or `"l1"`. beta: modulation factor. sigma: standard deviation of E; None is
    1 / sqrt(source features). c1, c2: bounds on the norms of each update and of each sample's displacement, None
    for none. feedback_share, feedback_total, max_source_features: as in RecLRA.

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

    def __post_init__(self) -> None:
        if self.local_loss not in _DERIVATIVES:
            raise InputError(f"LRAFeedback(local_loss={self.local_loss!r})", remedy=f"use one of {tuple(_DERIVATIVES)}")
        for option in ("beta", "sigma", "c1", "c2", "feedback_share", "feedback_total"):
            value = getattr(self, option)
            optional = option in ("sigma", "c1", "c2") and value is None
            if not optional and not (isinstance(value, (int, float)) and value > 0):
                raise InputError(f"LRAFeedback({option}={value!r})", why="it must be a number above 0")

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        return feedback_along_data(graph, self.max_source_features, self.feedback_share, self.feedback_total)

    def initial_feedback(self, connection: Connection, generator: torch.Generator) -> Tensor:
        rows, columns = connection.weight
        sigma = 1 / math.sqrt(max(columns, 1)) if self.sigma is None else self.sigma
        return torch.randn(rows, columns, generator=generator) * sigma

    def local_error(self, neuron: Neuron, displacement: Tensor) -> Tensor:
        d = displacement if self.c2 is None else _bounded(displacement, self.c2)
        u = neuron.z - neuron.phi(neuron.h - self.beta * d)
        error = _DERIVATIVES[self.local_loss](u)
        with torch.enable_grad():
            h = neuron.h.detach().requires_grad_()
            z = neuron.phi(h)
            (delta,) = torch.autograd.grad(z, h, error) if z.requires_grad else (error,)
        return delta

    def project(self, update: Tensor) -> Tensor:
        if self.c1 is None:
            return update
        norm: Tensor = torch.linalg.vector_norm(update)
        return update * (self.c1 / norm.clamp_min(self.c1))


def _bounded(displacement: Tensor, bound: float) -> Tensor:
    """Normalize(d, bound) for each sample."""
    rows = displacement.reshape(len(displacement), -1)
    factor: Tensor = bound / torch.linalg.vector_norm(rows, dim=1).clamp_min(bound)
    return displacement * factor.view(-1, *[1] * (displacement.dim() - 1))
