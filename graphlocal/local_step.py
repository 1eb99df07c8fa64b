"""The one node that a compiled model adds to autograd's graph: its backward pass is the error pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graphlocal.compiler import Compiled
from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.execution import Run
from graphlocal.finite import require_finite
from graphlocal.norms import UpdateNorms

Gradients = tuple[Tensor | None, ...]


class Owner(Protocol):
    """What a step reads of the `LocalModule` that it belongs to, when its backward pass begins."""

    check_finite: bool
    labels: Any
    losses: Any

    def get_parameter(self, target: str) -> nn.Parameter: ...


class Step(Protocol):
    """What answers one forward pass."""

    def backward(self, errors: Gradients, retain: bool) -> Gradients:
        """The gradients of the parameters (and inputs) that the outputs were attached to.

        errors: the gradients of the outputs. retain: the step may be asked again.
        """


class LocalStep:
    """The error pass that answers any one forward pass; `Repeat` has that of the commonest ones."""

    def __init__(self, owner: Owner, compiled: Compiled, run: Run, leaves: list[Any]) -> None:
        self.owner, self.compiled, self.run = owner, compiled, run
        self.labels: tuple[Any] | None = None
        self.inputs = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        self.taken = compiled.taken if self.inputs else compiled.differentiable
        if self.inputs:
            _refuse_lost_input_gradients(compiled, leaves)
        self.targets: list[Tensor] = [*compiled.weights]
        self.targets += [owner.get_parameter(name) for name in compiled.training.feedback]
        self.targets += [leaves[i] for i in self.inputs]
        self.count = len(self.targets)

    def attach(self) -> Sequence[Any]:
        """The outputs; the differentiable ones come with the local updates as their `grad_fn`."""
        outputs, targets = self.run.outputs, self.targets
        del self.run.outputs, self.targets
        taken = self.taken
        wanted = tuple([x.detach() for x, differentiable in zip(outputs, taken, strict=True) if differentiable])
        found = attached(self, wanted, targets)
        if len(found) == len(outputs):
            return found
        rest = iter(found)
        return [
            next(rest) if differentiable else v.detach() if isinstance(v, Tensor) else v
            for v, differentiable in zip(outputs, taken, strict=True)
        ]

    def backward(self, errors: Gradients, retain: bool) -> Gradients:
        if self.run.saved is None:
            raise freed()
        aligned = errors
        if len(errors) < len(self.taken):
            given = iter(errors)
            aligned = tuple(next(given) if taken else None for taken in self.taken)
        rule = self.compiled.rule
        if rule.needs_labels and self.labels is None:
            self.labels, self.owner.labels = (self.owner.labels,), None
        if rule.needs_losses and self.labels is None:
            self.labels, self.owner.losses = (self.owner.losses,), None
        if all(error is None for error in errors):  # the loss sends none back
            return (None,) * self.count
        weights, feedback, inputs = self.run.error_pass(aligned, retain=retain, labels=self.labels or ())
        if self.owner.check_finite and not self.run.scaled and not self.run.passes.are_numbers(weights):
            require_numbers(self.compiled, aligned, weights, self.run.empty)
        return (*weights, *feedback, *[inputs[i] for i in self.inputs])


def require_numbers(
    compiled: Compiled, errors: Gradients, updates: Sequence[Tensor | None], empty: bool = False
) -> None:
    """Raise what `require_finite` raises for the weights' `updates`."""
    norms = UpdateNorms()
    norms.add(compiled.training.weights, updates)
    require_finite(compiled, errors, norms, empty)


def freed() -> LocalTrainingError:
    """The error of a second backward pass without what it needs."""
    return LocalTrainingError(
        "backward was called a second time, but the first call freed what it needs",
        remedy="call the first backward with retain_graph=True",
    )


def attached(step: Step, outputs: tuple[Tensor, ...], targets: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs as results of one operation on `targets`, whose backward pass is the step's."""
    transformed = torch._C._are_functorch_transforms_active()
    found: tuple[Tensor, ...]
    found = (_LocalUpdates.apply if transformed else _apply_untransformed)(step, outputs, *targets)
    return found


class _LocalUpdates(torch.autograd.Function):
    """The one node of autograd's graph: from the outputs' gradients to the parameters', by local updates."""

    @staticmethod
    def forward(ctx: Any, step: Step, outputs: tuple[Tensor, ...], *targets: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *errors: Tensor | None) -> Gradients:
        if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            found: Gradients = _backward_once(ctx, *errors)
            return found
        return None, None, *ctx.step.backward(errors, _keeps_graph())


_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", bool)


@torch.compiler.disable  # type: ignore[untyped-decorator]
@once_differentiable
def _backward_once(ctx: Any, *errors: Tensor | None) -> Gradients:
    """The same for `create_graph=True`, and out of reach of `torch.compile`."""
    return None, None, *ctx.step.backward(errors, _keeps_graph())


_apply_untransformed: Any = super(torch.autograd.Function, _LocalUpdates).apply
"""`_LocalUpdates.apply` without what it does for torch.func's transforms in Python."""


def _refuse_lost_input_gradients(compiled: Compiled, leaves: list[Any]) -> None:
    graph = compiled.graph
    for item, leaf in zip(graph.inputs, leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            for reader in graph.readers.get(item.name, ()):
                if reader.name not in graph.neuron:
                    raise InputError(
                        f"the input {item.name!r} requires a gradient, but none would reach it",
                        where=f"subgraph {reader.name}",
                        why="that subgraph trains nothing, so it has no error neuron to send one",
                        remedy="detach the input, or unfreeze the subgraph's parameters",
                    )
