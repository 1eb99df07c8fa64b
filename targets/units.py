"""How errors pass discrete and stochastic units, whose own derivative is zero, and what takes the place of one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from graphlocal.errors import InputError
from graphlocal.ir import LocalGraph, Operation, Subgraph
from graphlocal.rules import Backprop, Rule
from graphlocal.rules.base import normalizes


class ShortCircuit(torch.autograd.Function):
    """The result of a discrete unit g(f), whose error goes to f as if g were the identity, times `factor`."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, f: Tensor, factor: int | Tensor) -> Tensor:
        ctx.shape, ctx.dtype = f.shape, f.dtype
        ctx.factor = factor if isinstance(factor, int) else None
        if ctx.factor is None:
            ctx.save_for_backward(factor)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[None, Tensor, None]:
        factor = ctx.saved_tensors[0] if ctx.factor is None else ctx.factor
        return None, (errors[0].sum_to_size(ctx.shape) * factor).to(ctx.dtype), None


def pass_by(result: Tensor, f: Tensor, sign: int) -> Tensor:
    """`ShortCircuit` as a function."""
    return ShortCircuit.apply(result.detach(), f, sign)  # type: ignore[no-any-return, no-untyped-call]


def pass_with_slope(result: Tensor, x: Tensor, sign: int, squashing: str, slope: Tensor) -> Tensor:
    """The same, times the derivative of s(slope x) in x."""
    scaled = slope.to(x.dtype) * x.detach()
    factor = SLOPES[squashing](scaled) * slope.to(x.dtype) * sign
    return ShortCircuit.apply(result.detach(), x, factor)  # type: ignore[no-any-return, no-untyped-call]


class PassInput(torch.autograd.Function):
    """The result of an operation, whose error goes to the operation's parameters and, as it is, to its input."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, Tensor]:
        return errors[0], errors[0].to(ctx.dtype)


def pass_input(result: Tensor, x: Tensor) -> Tensor:
    """`PassInput` as a function; `result` must have been computed from a detached x."""
    return PassInput.apply(result, x)  # type: ignore[no-any-return, no-untyped-call]


def detached(x: Tensor) -> Tensor:
    """`x.detach()` as a function."""
    return x.detach()


_ACTIVATIONS = re.compile(
    r"aten\.(relu6?|leaky_relu|r?relu|elu|selu|celu|gelu|silu|mish|tanh|sigmoid|log_sigmoid|hardtanh|hardsigmoid|hardswish"
    r"|softplus|threshold)\."
)


def passed_operations(graph: LocalGraph, subgraph: Subgraph, rule: Rule) -> frozenset[str]:
    """The operations inside a subgraph that errors pass without their derivative."""
    if not rule.passes_nonlinear or any(c.kind == "vjp" and c.source == subgraph.name for c in graph.connections):
        return frozenset()
    tails = {name for output in subgraph.outputs for name in graph.tail(output)}
    return frozenset(
        name
        for name in subgraph.operations
        if name not in tails and passes(graph.operation[name]) and graph.operation[name].type is not None
    )


def passes(op: Operation) -> bool:
    """Whether an operation is an activation function or a normalization."""
    return bool((op.pointwise and _ACTIVATIONS.match(op.target)) or normalizes(op))


def _sigmoid_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": _sigmoid_slope,
    "tanh": lambda x: 1 - torch.tanh(x) ** 2,
    "hardtanh": lambda x: (x.abs() < 1).to(x.dtype),
    "hardsigmoid": lambda x: (x.abs() < 3).to(x.dtype) / 6,
}
"""The derivatives of the squashing functions that stand before discrete units."""

_SQUASHING = re.compile(rf"aten\.({'|'.join(SLOPES)})\.")
_SIGN = re.compile(r"aten\.(sign|sgn)\.")


def squashing_of(graph: LocalGraph, unit: Operation) -> str:
    """The squashing function that a unit (its last operation) was marked with; tanh for a bare sign; else ""."""
    x = unit.discrete_input
    for op in graph.operations:
        match = _SQUASHING.match(op.target)
        if match and op.inputs[:1] == (x,) and unit.group and op.group == unit.group:
            return match[1]
    return "tanh" if _SIGN.match(unit.target) else ""


STEPS = "estimator_steps"
"""The buffer among the feedback maps that counts the steps of an estimator that changes."""


class Slope(nn.Module):
    """The slope at this step; counts the step."""

    def __init__(self, rule: Backprop) -> None:
        super().__init__()
        self.growth, self.limit = rule.slope_growth, rule.slope_limit

    def forward(self, steps: Tensor) -> Tensor:
        with torch.no_grad():
            slope = (1 + self.growth * steps.double()).clamp_max(self.limit)
            steps.add_(1)
        return slope


def scored_units(graph: LocalGraph, subgraph: Subgraph, rule: Rule) -> tuple[str, ...]:
    """The last operations of the stochastic units in a subgraph that learn by their score function."""
    if not rule.needs_losses:
        return ()
    return tuple(name for name in subgraph.operations if graph.operation[name].discrete_of)


def score_name(unit: str) -> str:
    """The name of a unit's score among the values of its subgraph."""
    return f"{unit}_score"


def log_probability(drawn: Tensor, probability: Tensor) -> Tensor:
    """The logarithm of the probability of each sample's bits, [batch]; differentiable in `probability`."""
    entries = -binary_cross_entropy(probability, drawn.detach(), reduction="none")
    return entries.flatten(1).sum(1) if entries.dim() > 1 else entries


class Advantage(nn.Module):
    """(l - b) / batch for each sample, [batch]; then the baseline b moves towards the mean of these losses.

    Early on, b is the running mean corrected for its start at zero, so that it is a mean of the losses seen.
    losses: of the samples, or a function that returns them, where the loss is evaluated within the training graph.
    """

    def __init__(self, rule: Backprop) -> None:
        super().__init__()
        self.keep = rule.baseline

    def forward(self, losses: Any, batch: int, baseline: Tensor, steps: Tensor) -> Tensor:
        found = _required_losses(losses() if callable(losses) else losses, batch)
        with torch.no_grad():
            if self.keep is None:
                return found / batch
            weight = (1 - self.keep ** steps.double()).clamp_min(1 - self.keep)  # 1 - keep where b is still 0
            advantage = (found - baseline / weight.to(baseline.dtype)) / batch
            baseline.mul_(self.keep).add_(found.mean().to(baseline.dtype), alpha=1 - self.keep)
            steps.add_(1)
            return advantage.to(found.dtype)


def _required_losses(losses: Any, batch: int) -> Tensor:
    if losses is None:
        raise InputError(
            "REINFORCE learns from the loss of each sample, and got none",
            why="the error of the output does not tell which sample lost how much",
            remedy="train with graphlocal.train_step(local, loss_fn, optimizer) and a loss_fn that returns one loss "
            "for each sample (reduction='none'), or set local.losses to them before each backward pass of their mean",
        )
    if not isinstance(losses, Tensor) or losses.shape != (batch,):
        given = f"of shape {list(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise InputError(
            f"the losses are {given}, where REINFORCE needs one for each sample, [{batch}]",
            remedy="use reduction='none', and the mean over all axes but the batch",
        )
    return losses.detach()
