"""`train_step`: the fused form of a training step, in which each subgraph is updated as soon as its error is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphlocal.arguments import call_of, empty_batch, holds_no_sample
from graphlocal.compiler import Compiled
from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.finite import require_finite
from graphlocal.goals import ClassCodes
from graphlocal.norms import UpdateNorms
from graphlocal.overlap import overlapped
from graphlocal.partial_optimizer import Gathering, PartialOptimizer
from graphlocal.rules import Rule
from graphlocal.runtime import LocalModule
from graphlocal.targets.nodes import StepCall

ERROR_WEIGHTS = "error_weights."
"""What the names of the feedback maps start with."""

LossFunction = Callable[[Any, Any], Tensor]


def train_step(
    local: LocalModule,
    loss_fn: LossFunction | ClassCodes | Sequence[ClassCodes],
    optimizer: torch.optim.Optimizer | None,
) -> TrainStep:
    """The fused form of a training step: `step(x, y) -> loss`.

    loss_fn: `loss_fn(output, y)`, a scalar; for `Backprop(estimator="reinforce")` the loss of each sample, [batch]; for
    the rule nlp also a goal, or several. optimizer (None for rules that
    need none): any of torch.optim's that can update some parameters
    without the others. Every subgraph's parameters are updated, and its gradients and activations freed, as
    soon as its error is known (small ones together, at most 2.4 MB of float32 gradients or half of the model's);
    `p.grad` is never set. Parameters that several subgraphs share are updated after the last of them. Learning-rate
    schedulers and optimizer hooks work as ever; clipping the norm of all gradients does not, since they never exist at
    one time.

    Raises InputError for an optimizer that needs a closure (LBFGS), or one without the model's parameters.
    """
    return TrainStep(local, loss_fn, optimizer)


class TrainStep:
    """Made by `train_step`; call it once a batch."""

    def __init__(
        self,
        local: LocalModule,
        loss_fn: LossFunction | ClassCodes | Sequence[ClassCodes],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        if not isinstance(local, LocalModule):
            raise InputError("train_step needs a compiled model", remedy="pass graphlocal.compile(model, ...)")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise InputError("LBFGS evaluates the loss several times a step, which a fused step can't")
        rule = local.options.rule
        self.local, self.optimizer = local, optimizer
        self.goals, self.loss_fn = _goals(loss_fn, rule)
        self._parts: dict[tuple[Compiled, tuple[str, ...]], PartialOptimizer] = {}
        self.memory: dict[str, Any] = {}
        self._losses: Tensor | None = None  # of each sample, for rules that need them
        if optimizer is None and not rule.needs_optimizer:
            return
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InputError(
                f"the optimizer is a {type(optimizer).__name__}", remedy="pass one, such as torch.optim.Adam(...)"
            )
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in owned for p in local.parameters()):
            raise InputError(
                "the optimizer holds none of the model's parameters",
                remedy="make it from local.parameters() (or model.parameters())",
            )

    def __call__(self, x: Any, y: Any, *, index: Tensor | None = None) -> Tensor:
        """Train on one batch; x: a tensor, a tuple (or list) of positional inputs, or a dict of keyword inputs.

        index: the samples' numbers in the data set, int64 [batch]; rules without a memory for each sample ignore it.
        Returns the loss (detached). Raises LocalTrainingError if the loss, or after the step an update, is not a
        number; InputError if that is because the batch is empty.
        """
        if not self.local.training:
            raise InputError("the model is in evaluation mode", remedy="call local.train() before training")
        args, kwargs = call_of(x, "x")
        with torch.enable_grad():
            leaves, spec = self.local._binder.flatten(args, kwargs)
            leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            if self.local.options.rule.engine != "schedule":
                return self._run_engine(leaves, spec, y, index)
            compiled, run = self.local._forward_pass(leaves, spec, fused=True)
            loss, errors = self._loss(compiled, run.outputs, y, run.empty)
            run.outputs = []
        norms = self._norms(compiled)
        with torch.no_grad():
            rule = self.local.options.rule
            labels = (y,) if rule.needs_labels else (self._losses,) if rule.needs_losses else ()
            apply = self._updates(compiled, norms, compiled.together)
            run.error_pass(errors, apply, labels=labels)
            apply.flush()
            require_finite(compiled, errors, norms, run.empty)
        return loss

    def _norms(self, compiled: Compiled) -> UpdateNorms:
        """The norms of a step's updates, those of feedback maps apart."""
        return UpdateNorms(compiled.training.feedback)

    def _updates(self, compiled: Compiled, norms: UpdateNorms, together: int = 0) -> Gathering:
        """`apply` for an error pass: takes note of the updates' norms, and hands on so many numbers `together`."""
        return Gathering(partial(self._apply, compiled), together, norms if self.local.check_finite else None)

    def run(self, batches: Iterable[tuple[Any, Any]], *, staleness: int = 0) -> Iterator[Tensor]:
        """Train on one (x, y) after another, and yield the loss of each, once its updates are made.

        With target="streams" on a CPU, the next batch enters each subgraph as soon as that is updated, while others
        still learn; the next batch is fetched meanwhile. What a loop over `step(x, y)` gives, this gives bit for bit;
        while a loss is looked at, no thread works, and the model, its buffers and torch's random numbers stand as they
        would then. Changes of the model are found, and the next batch begins anew (not those made through `.data`).

        staleness: by how many updates, at most, the forward pass may be behind (with target="streams"): the forward
        passes of so many further batches come before the updates, in an order that is always the same. A first batch
        of its shape is trained on by itself, after those before it.

        Raises InputError for a staleness that can't be (also in the turn of a batch that can't overlap with others, as
        under autocast), and what step(x, y) raises.
        """
        return overlapped(self, batches, staleness)

    def _run_engine(self, leaves: list[Any], spec: Any, y: Any, index: Tensor | None) -> Tensor:
        empty = holds_no_sample(leaves)

        def run(compiled: Compiled) -> tuple[Tensor, dict[str, Tensor]]:
            assert compiled.engine is not None
            call = StepCall(lambda flat: self._loss(compiled, flat, y, empty), self.goals, y, index, self.memory)
            return compiled.engine.step(leaves, call)

        loss: Tensor
        compiled, (loss, gradients) = self.local._run_fitting(leaves, spec, run)
        if self.local.check_finite:
            norms = UpdateNorms()
            norms.add(tuple(gradients), tuple(gradients.values()))
            require_finite(compiled, (), norms, empty)
        with torch.no_grad():
            if (compiled, tuple(gradients)) in self._parts or not self._parts:
                self._apply(compiled, tuple(gradients), tuple(gradients.values()))
            else:  # other subgraphs are drawn in every step: one part for each parameter, not for each draw
                for name, gradient in gradients.items():
                    self._apply(compiled, (name,), (gradient,))
        return loss

    def _loss(
        self, compiled: Compiled, outputs: Any, y: Any, empty: bool = False
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The loss, and its gradients at the outputs. empty: whether the batch is, for the message of a NaN."""
        flat = [
            x.detach().requires_grad_() if taken else x
            for x, taken in zip(outputs, compiled.differentiable, strict=True)
        ]
        assert self.loss_fn is not None
        loss = self.loss_fn(self.local._unflatten(compiled, flat), y)
        if self.local.options.rule.needs_losses:
            self._losses, loss = sample_losses(loss)
        if not isinstance(loss, Tensor) or loss.dim() > 0 or not loss.requires_grad:
            raise InputError(
                "loss_fn must return a scalar tensor that depends on the model's output",
                why=f"it returned {type(loss).__name__}"
                + (f" of shape {list(loss.shape)}" if isinstance(loss, Tensor) else ""),
            )
        if self.local.check_finite and math.isnan(loss.item()):
            if empty:
                raise empty_batch("the loss, a mean over no samples, is not a number")
            raise LocalTrainingError("the loss is not a number", remedy="lower the learning rate, or check the inputs")
        wanted = [x for x, taken in zip(flat, compiled.differentiable, strict=True) if taken]
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
        return loss.detach(), tuple(next(found) if taken else None for taken in compiled.differentiable)

    def _apply(
        self, compiled: Compiled, names: tuple[str, ...], gradients: tuple[Tensor | None, ...], lent: bool = False
    ) -> None:
        key = (compiled, names)
        if not names:
            return
        if key not in self._parts or self._parts[key].whole is not self.optimizer:
            assert self.optimizer is not None
            parameters = [self._parameter(name) for name in names]
            self._parts[key] = PartialOptimizer(self.optimizer, parameters)
        self._parts[key].step(gradients, lent)

    def _parameter(self, name: str) -> nn.Parameter:
        if name.startswith(ERROR_WEIGHTS):
            return self.local.get_parameter(name)
        return self.local.original.get_parameter(name)


def sample_losses(losses: Any) -> tuple[Tensor, Tensor]:
    """The losses of the samples, and their mean. Raises InputError for anything else than a vector."""
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        raise InputError(
            "loss_fn must return the loss of each sample, a tensor of shape [batch]",
            why=f"it returned {type(losses).__name__}"
            + (f" of shape {list(losses.shape)}" if isinstance(losses, Tensor) else "")
            + ", and REINFORCE rewards each sample's units with its own loss",
            remedy="use reduction='none', such as functools.partial(cross_entropy, reduction='none')",
        )
    return losses.detach(), losses.mean()


def _goals(
    loss_fn: LossFunction | ClassCodes | Sequence[ClassCodes], rule: Rule
) -> tuple[tuple[ClassCodes, ...], LossFunction | None]:
    """The goals that stand in the place of a loss function, or that function."""
    goals = (loss_fn,) if isinstance(loss_fn, ClassCodes) else loss_fn
    if not isinstance(goals, (tuple, list)):
        if not callable(goals):
            raise InputError(f"loss_fn is a {type(goals).__name__}", remedy="pass a function of (output, y)")
        return (), goals
    if not goals or not all(isinstance(goal, ClassCodes) for goal in goals):
        raise InputError("loss_fn is a list that holds other things than goals", remedy="pass ClassCodes(...) alone")
    if rule.engine != "nonlinear":
        raise InputError(f"the rule {rule.name!r} learns from a loss, not from goals", remedy="pass a loss function")
    return tuple(goals), None
