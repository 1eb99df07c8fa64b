"""Rules that move a pre-activation to a target and take a local loss between the two: what the LRA rules share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphlocal.errors import InputError
from graphlocal.rules.base import Neuron, Rule


@dataclass(frozen=True)
class EntryLoss:
    """A loss in u = z - y, entry by entry, and its derivative in u."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


LOCAL_LOSSES = {
    "cauchy": EntryLoss(lambda u: torch.log1p(u**2), lambda u: 2 * u / (1 + u**2)),
    "l2": EntryLoss(lambda u: u**2 / 2, lambda u: u),
    "l1": EntryLoss(torch.abs, torch.sign),
}


class AligningRule(Rule):
    """Rules with targets: y = phi(the pre-activation as `move` changes it), and a local loss between z and y.

    The loss's derivative at the pre-activation, `local_loss'(z - y) * phi'(h)`, is the local error.
    """

    local_loss: str
    c1: float | None
    epsilon: float | None

    @property
    def halting(self) -> float | None:
        return self.epsilon

    @abstractmethod
    def move(self, neuron: Neuron, displacement: Tensor) -> Tensor:
        """The pre-activation one step towards the target; `displacement` is that of the representation."""

    def local_error(self, neuron: Neuron, displacement: Tensor) -> Tensor:
        return self.mismatch(neuron, neuron.phi(self.move(neuron, displacement)))

    def mismatch(self, neuron: Neuron, target: Tensor) -> Tensor:
        """The derivative of the local loss at the pre-activation."""
        return through_tail(neuron, LOCAL_LOSSES[self.local_loss].derivative(neuron.z - target))

    def losses(self, neuron: Neuron, displacement: Tensor) -> Tensor:
        """The local loss of each sample at the target that `move` sets, summed over its entries."""
        target = neuron.phi(self.move(neuron, displacement))
        value = LOCAL_LOSSES[self.local_loss].value(neuron.z - target)
        return value.reshape(value.shape[0], -1).sum(1)

    def project(self, update: Tensor) -> Tensor:
        if self.c1 is None:
            return update
        norm: Tensor = torch.linalg.vector_norm(update)
        return update * (self.c1 / norm.clamp_min(self.c1))


def through_tail(neuron: Neuron, error: Tensor) -> Tensor:
    """Error * phi'(h), for an error at the representation."""
    with torch.enable_grad():
        h = neuron.h.detach().requires_grad_()
        z = neuron.phi(h)
        (delta,) = torch.autograd.grad(z, h, error) if z.requires_grad else (error,)
    return delta


def bounded(displacement: Tensor, bound: float | None) -> Tensor:
    """Normalize(d, bound) for each sample: bound * d / ||d|| where ||d|| is at least the bound."""
    if bound is None:
        return displacement
    rows = displacement.reshape(displacement.shape[0], -1)
    factor: Tensor = bound / torch.linalg.vector_norm(rows, dim=1).clamp_min(bound)
    return displacement * factor.view(-1, *[1] * (displacement.dim() - 1))


def scaled(error: Tensor, size: Tensor | float) -> Tensor:
    """An error in the same directions, with samples of norm `size` (root mean square); zeros stay zeros."""
    tiny = torch.finfo(error.dtype).tiny
    return error / sample_rms(error).clamp_min(tiny) * size


def sample_rms(error: Tensor) -> Tensor:
    """The root mean square of the samples' norms, over the samples that have an error; 0 if none has."""
    norms: Tensor = torch.linalg.vector_norm(error.reshape(error.shape[0], -1), dim=1)
    total: Tensor = torch.linalg.vector_norm(norms)
    return total / (norms > 0).sum().clamp_min(1).sqrt()


def require_local_loss(rule: Any) -> None:
    """Raise InputError for a local loss that does not exist."""
    if not isinstance(rule.local_loss, str) or rule.local_loss not in LOCAL_LOSSES:
        raise InputError(
            f"{type(rule).__name__}(local_loss={rule.local_loss!r})", remedy=f"use one of {tuple(LOCAL_LOSSES)}"
        )


def require_reduction(rule: Rule) -> None:
    """Raise InputError for another reduction of the loss than those that are known."""
    if rule.reduction not in ("mean", "sum"):
        raise InputError(f"{type(rule).__name__}(reduction={rule.reduction!r})", remedy="use 'mean' or 'sum'")


def require_positive(rule: Rule, options: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raise InputError unless the options are numbers above 0, or None where they are optional."""
    for option in options:
        value = getattr(rule, option)
        absent = option in optional and value is None
        if not absent and not (isinstance(value, (int, float)) and value > 0 and math.isfinite(value)):
            raise InputError(f"{type(rule).__name__}({option}={value!r})", why="it must be a number above 0")


def require_counts(rule: Rule, options: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raise InputError unless the options are whole numbers, 1 or more, or None where they are optional."""
    for option in options:
        value = getattr(rule, option)
        if option in optional and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{type(rule).__name__}({option}={value!r})", why="it is a whole number, 1 or more")
