"""What a monitor hands to its views: one observed step, or one epoch that ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """One observed training step.

    step: its number, from 1. seconds: since the monitor was made. loss: of the batch before the update. By subgraph:
    local_loss (`graphlocal.observation` defines it), update_norm (of the local update), weight_norm, and step_ratio,
    the norm of what the optimizer changed over that of the weights before. angle: in degrees, between update and true
    gradient, by subgraph, with `overall_angle` of all together; None on steps that don't measure it. credit_depth: of
    how many subgraphs the mean sample's error reached the neuron, for a rule that lets samples stop. updates: the
    local update of each parameter.
    """

    step: int
    seconds: float
    loss: float
    local_loss: dict[str, float]
    update_norm: dict[str, float]
    weight_norm: dict[str, float]
    step_ratio: dict[str, float]
    angle: dict[str, float] | None = None
    overall_angle: float | None = None
    credit_depth: float | None = None
    updates: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def seldom(self) -> bool:
        """Whether this is one of the steps that measure more."""
        return self.angle is not None


@dataclass(frozen=True)
class EpochRecord:
    """An epoch that ended. of: "local", or the name of a model trained beside it. test_error: per cent."""

    of: str
    epoch: int
    step: int
    loss: float
    test_error: float | None = None
    seconds: float | None = None


class View(Protocol):
    """Something that shows or keeps what a monitor sees."""

    def on_step(self, record: StepRecord) -> None: ...

    def on_epoch(self, record: EpochRecord) -> None: ...

    def close(self, status: str) -> None: ...
