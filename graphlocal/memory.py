"""What a training step needs of memory: predicted from the training graph, and measured, beside backpropagation.

The step's own memory is counted: what the forward pass keeps, errors, and gradients until the optimizer has them. The
loss and the optimizer's own workspace are left out, of backpropagation's step too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from graphlocal import units
from graphlocal.compiler import Compiled, require_schedule
from graphlocal.errors import InputError
from graphlocal.execution import Execution
from graphlocal.live_memory import peak_bytes, stored_bytes
from graphlocal.partial_optimizer import Gathering, together
from graphlocal.passes.schedule import Schedule
from graphlocal.pipeline import run
from graphlocal.preserve import preserved, training_mode
from graphlocal.rules import Backprop
from graphlocal.targets.compilation import Compilation
from graphlocal.targets.eager import emit
from graphlocal.targets.liveness import Liveness, liveness
from graphlocal.targets.lowered import NotLowered, lower

OptimizerClass = Callable[[list[nn.Parameter]], Optimizer]

OTHERWISE = ("inductor", "streams")
"""Targets whose memory is not measured: operators inside of compiled code are not seen, and that of lanes depends on
their timing."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one way to train, over what lives before the step. predicted: None where the step can't be lowered."""

    predicted: Liveness | None
    measured: int

    @property
    def peak(self) -> int:
        """The predicted peak, or else the measured one."""
        return self.measured if self.predicted is None else self.predicted.peak.total


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step needs, for the batch of the example inputs.

    parameters, buffers, feedback (E, twins and heads), optimizer, lent (memory in which `train_step` stacks gradients):
    what lives between steps. steps: by name, `local` (`train_step`) and `backprop`. not_lowered: why there is no
    prediction. target: the model's, if it was measured as another one.
    """

    parameters: int
    buffers: int
    feedback: int
    optimizer: int
    lent: int
    steps: Mapping[str, StepMemory]
    not_lowered: str = ""
    target: str = ""

    def total(self, name: str) -> int:
        """All that lives at the peak of a step; E and what is lent count for `local` alone."""
        between = self.parameters + self.buffers + self.optimizer
        return between + self.steps[name].peak + (self.feedback + self.lent if name == "local" else 0)

    def __str__(self) -> str:
        rows = [["step", "kept", "peak", "at", "measured", "total"]]
        for name, step in self.steps.items():
            found = step.predicted
            cells = ["-", "-", "-"]
            if found is not None:
                cells = [_label(found.kept), _label(found.peak.total), found.peak.action or "the loss"]
            rows.append([name, *cells, _label(step.measured), _label(self.total(name))])
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        head = (
            f"memory: parameters {_label(self.parameters)}, buffers {_label(self.buffers)}, "
            f"E {_label(self.feedback)}, optimizer {_label(self.optimizer)}"
        )
        head += f", lent stacks {_label(self.lent)}" if self.lent else ""
        notes = ["kept: by the forward pass; peak: predicted, of values, errors and gradients; total: with the above."]
        notes += [f"No prediction: {self.not_lowered}"] if self.not_lowered else []
        notes += [f"As target='auto' runs it, not {self.target!r}."] if self.target else []
        return "\n".join([head, *table, *notes])


def _label(size: int) -> str:
    return units.bytes_label(size)


def memory(compiled: Compiled, optimizer: OptimizerClass) -> Memory:
    """Predict and measure the memory of a step on the example inputs; the model is left as it was.

    optimizer: makes one from parameters, such as `torch.optim.Adam`.

    Raises InputError for a rule that runs no schedule, or takes labels.
    """
    require_schedule(compiled.rule)
    if compiled.rule.needs_labels:
        raise InputError(
            f"the memory of a step of the rule {compiled.rule.name!r} is not measured",
            why="its local heads take labels, and the example inputs hold none",
        )
    model, maps = compiled.model, compiled.error_weights
    leaves = [x.detach() if isinstance(x, Tensor) else x for x in compiled.traced.arguments.leaves]
    with training_mode(model), preserved(model), preserved(maps):
        execution = _execution(compiled)
        measured = {"local": _measured(execution, leaves), "backprop": _measured_backprop(compiled)}
        predictions, reason = _predicted(execution, compiled, leaves)
    steps = {name: StepMemory(predictions.get(name), measured[name]) for name in measured}
    own = [p for p in model.parameters() if p.requires_grad]
    return Memory(
        stored_bytes(model.parameters()),
        stored_bytes(model.buffers()),
        stored_bytes([*maps.parameters(), *maps.buffers()]),
        _optimizer_bytes(optimizer, own),
        execution.scratch.bytes,
        steps,
        reason,
        compiled.options.target if compiled.options.target in OTHERWISE else "",
    )


def _predicted(execution: Execution, compiled: Compiled, leaves: list[Any]) -> tuple[dict[str, Liveness], str]:
    """execution: after it has run."""
    passes = execution.known(leaves)
    if passes is None or passes.updating is None:
        return {}, "" if execution.not_lowered is None else execution.not_lowered.message
    try:
        true = lower(_rewired_for_backprop(compiled).training, leaves, compiled.differentiable)
    except NotLowered as error:
        return {}, error.message
    return {"local": liveness(passes.updating, compiled.together), "backprop": liveness(true)}, ""


def _execution(compiled: Compiled) -> Execution:
    """What runs the compilation, in one thread, of torch's operators."""
    target = compiled.options.target
    return Execution(compiled, "auto" if target in OTHERWISE else target)


def _rewired_for_backprop(compiled: Compiled) -> Compiled:
    """The same subgraphs of the same model, trained by backpropagation."""
    rule = Backprop()
    wired = replace(compiled.graph, rule=rule.name, connections=rule.connect(compiled.graph), twins=(), schedule=())
    graph, _ = run(wired, (Schedule(),))
    emitted = emit(graph, compiled.traced, compiled.model, rule, nn.Module())
    options = replace(compiled.options, rule=rule, recompute=False)
    return replace(compiled, graph=graph, emitted=emitted, options=options, records=(), fits=None)


def _measured(execution: Execution, leaves: list[Any]) -> int:
    """The peak of the fused step."""
    compiled = execution.compiled

    def step() -> None:
        with torch.enable_grad():
            run = execution.run(leaves, fused=True)
        errors = _errors(run.outputs, compiled)
        run.outputs = []
        apply = Gathering(
            lambda names, gradients, lent=False: None, together(compiled.weights, bool(compiled.recomputed))
        )
        with torch.no_grad():
            run.error_pass(errors, apply)
        apply.flush()

    return _peak_of(step, compiled)


def _errors(outputs: list[Any], compiled: Compilation) -> list[Tensor | None]:
    taken = zip(outputs, compiled.differentiable, strict=True)
    return [torch.ones_like(z) if wanted else None for z, wanted in taken]


def _measured_backprop(compiled: Compiled) -> int:
    """The peak of the user's own model's forward and backward pass."""
    arguments = compiled.traced.arguments

    def step() -> None:
        with torch.enable_grad():
            found = compiled.model(*arguments.args, **arguments.kwargs)
        flat = [z for z in pytree.tree_leaves(found) if isinstance(z, Tensor) and z.requires_grad]
        edges = [torch.autograd.graph.get_gradient_edge(z) for z in flat]
        errors = [torch.ones_like(z) for z in flat]
        del found, flat
        torch.autograd.backward(edges, errors)
        for parameter in compiled.model.parameters():
            parameter.grad = None

    return _peak_of(step, compiled)


def _peak_of(step: Callable[[], None], compiled: Compilation) -> int:
    for _ in range(2):  # lowering, and libraries' own preparations
        step()
    return peak_bytes(step, next(compiled.model.parameters()).device)


def _optimizer_bytes(optimizer: OptimizerClass, parameters: list[nn.Parameter]) -> int:
    """What an optimizer remembers of the parameters, by one step on a copy of the smallest of each dtype."""
    total = 0.0
    for dtype in {p.dtype for p in parameters}:
        mine = [p for p in parameters if p.dtype is dtype]
        example = nn.Parameter(min(mine, key=lambda p: p.numel()).detach().clone().flatten()[:1])
        example.grad = torch.zeros_like(example)
        once = optimizer([example])
        once.step()
        kept = [x for x in once.state[example].values() if isinstance(x, Tensor) and x.shape == example.shape]
        total += sum(x.element_size() for x in kept) * sum(p.numel() for p in mine)
    return int(total)
