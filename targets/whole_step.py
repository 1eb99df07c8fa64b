"""A whole training step as one pure function of tensors: forward, loss, errors, local updates and the optimizer.

`whole_step(...)` gives a `torch.fx.GraphModule` of ATen operators without mutation,

    module(*states, *inputs, *labels, lr) -> (loss, *new states)

whose states are the parameters, the buffers, the feedback maps E, and what the optimizer remembers. It is what is
exported, and what other compilers compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from graphlocal.errors import InputError
from graphlocal.targets.compilation import Compilation
from graphlocal.targets.lowered import NotLowered, WithStates, attribute, lower, record, without_data
from graphlocal.targets.optimizer_math import group_of, initial_state, updated
from graphlocal.targets.quiet import quiet
from graphlocal.targets.simplify import simplify
from graphlocal.targets.training_graph import TrainingGraph
from graphlocal.targets.units import STEPS

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class WholeStep:
    """module(*states, *inputs, *labels, lr) -> (loss, *new states).

    states: the values to start from, by name, in the order of the arguments: `original.` parameters and buffers,
    `error_weights.` feedback maps, `optimizer.` what the optimizer remembers (`optimizer.exp_avg.fc.weight`).
    changed: the names of the states that the step returns anew, in the order of its results.
    inputs, labels: the number of tensors of each.
    """

    module: fx.GraphModule
    states: dict[str, Tensor]
    changed: tuple[str, ...]
    inputs: int
    labels: int


def whole_step(
    compiled: Compilation,
    leaves: list[Any],
    unflatten: Callable[[list[Any]], Any],
    loss_fn: LossFunction,
    optimizer: Optimizer,
    y: Any,
    *,
    any_batch: bool = False,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> WholeStep:
    """The training step for inputs and labels like these.

    leaves: the flattened arguments of the model. unflatten: from the flat outputs to what `loss_fn(output, y)` takes.
    any_batch: leave the size of the first axis of inputs and labels open. decompositions: operators to write as others.

    Raises NotLowered where the step has no fixed list of operators, and InputError for an optimizer other than SGD,
    Adam and AdamW.
    """
    lowered = lower(compiled.training, leaves, compiled.differentiable, any_batch)
    recorder = _Recorder(compiled, lowered, leaves, unflatten, loss_fn, optimizer, y)
    fixed, open_ = list(recorder.states.values()), [*recorder.inputs, *recorder.labels]
    rate = torch.tensor(float(optimizer.param_groups[0]["lr"]))
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            if any_batch:
                (*fixed, rate), open_ = without_data([*fixed, rate], open_)
            arguments = (*fixed, *open_, rate)
            first = record(recorder.step, *arguments)
            pure = record(torch.func.functionalize(first), *arguments, decomposition_table=dict(decompositions or {}))
    except InputError:
        raise
    except Exception as error:  # whatever operators raise on tensors without data
        message = (str(error).splitlines() or [""])[0]
        raise NotLowered(
            "the loss or the optimizer can't be recorded as operators", why=f"{type(error).__name__}: {message}"
        ) from error
    simplify(pure.graph)
    pure.recompile()
    return WholeStep(pure, recorder.states, tuple(recorder.changed), len(recorder.inputs), len(recorder.labels))


@contextmanager
def unfused() -> Iterator[None]:
    """While open, attention is recorded as products and a softmax, recurrent cells step by step."""
    with quiet(), sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        yield


class _Recorder:
    """The step as Python, on the states that it names."""

    def __init__(
        self, compiled: Compilation, lowered: TrainingGraph, leaves: list[Any], unflatten: Callable[[list[Any]], Any],
        loss_fn: LossFunction, optimizer: Optimizer, y: Any,
    ) -> None:  # fmt: skip
        self.compiled, self.lowered, self.leaves = compiled, lowered, leaves
        self.unflatten, self.loss_fn, self.optimizer = unflatten, loss_fn, optimizer
        self.inputs = [x.detach() for x in leaves if isinstance(x, Tensor)]
        self.y, self.y_spec = pytree.tree_flatten(y)
        self.labels = [x.detach() for x in self.y if isinstance(x, Tensor)]
        self.changed: list[str] = []
        self.states: dict[str, Tensor] = {}
        for node in lowered.module.graph.find_nodes(op="get_attr"):
            name = str(node.target)
            if name.split(".")[0] in ("original", "error_weights"):
                self.states[name] = attribute(lowered.module, name).detach()
        self.parameters = self._parameters()
        for name, parameter in self.parameters.items():
            remembered = initial_state(optimizer, parameter)
            self.states |= {f"optimizer.{key}.{_short(name)}": value for key, value in remembered.items()}

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer updates, by the names of their states."""
        weights = [(f"original.{name}", p) for name, p in zip(self.lowered.weights, self.compiled.weights, strict=True)]
        maps = [(name, attribute(self.lowered.module, name)) for name in self.lowered.feedback]
        found = {}
        for name, parameter in (*weights, *maps):
            if isinstance(parameter, nn.Parameter) and group_of(self.optimizer, parameter) is not None:
                found[name] = parameter
                self.states.setdefault(name, parameter.detach())
        return found

    def step(self, *tensors: Tensor) -> list[Tensor]:
        """The loss, then the changed states."""
        count = len(self.states)
        states = dict(zip(self.states, tensors[:count], strict=True))
        *batch, lr = tensors[count:]
        buffers = {name: value.clone() for name, value in states.items() if name in self._written}
        inputs, labels = iter(batch[: len(self.inputs)]), iter(batch[len(self.inputs) :])
        given = [next(inputs) if isinstance(x, Tensor) else x for x in self.leaves]
        y = pytree.tree_unflatten([next(labels) if isinstance(x, Tensor) else x for x in self.y], self.y_spec)
        loss: list[Tensor] = []
        run = WithStates(self.lowered.module, {**states, **buffers})
        _, weights, feedback, _ = run.run(*given, lambda outputs: self._errors(outputs, y, loss), False)
        gradients = dict(zip((f"original.{n}" for n in self.lowered.weights), weights, strict=True))
        gradients |= dict(zip(self.lowered.feedback, feedback, strict=True))
        new = {**buffers, **self._updated(states, gradients, lr)}
        self.changed = list(new)
        return [*loss, *new.values()]

    @property
    def _written(self) -> set[str]:
        """The states that the forward pass changes."""
        effects = (effect for op in self.compiled.graph.operations for effect in op.effects)
        written = {f"original.{e.removeprefix('writes ')}" for e in effects if e.startswith("writes ")}
        return written | ({f"error_weights.{STEPS}"} if self.compiled.rule.anneals else set())

    def _errors(self, outputs: tuple[Any, ...], y: Any, loss: list[Tensor]) -> list[Tensor | None]:
        taken = self.compiled.differentiable
        with torch.enable_grad():
            flat = [z.detach().requires_grad_() if t else z for z, t in zip(outputs, taken, strict=True)]
            value = self.loss_fn(self.unflatten(flat), y)
            wanted = [z for z, t in zip(flat, taken, strict=True) if t]
            found = iter(torch.autograd.grad(value, wanted, allow_unused=True))
        loss.append(value.detach())
        return [next(found) if t else None for t in taken]

    def _updated(self, states: dict[str, Tensor], gradients: dict[str, Any], lr: Tensor) -> dict[str, Tensor]:
        new: dict[str, Tensor] = {}
        rate = self.optimizer.param_groups[0]["lr"]
        for name, parameter in self.parameters.items():
            gradient, group = gradients[name], group_of(self.optimizer, parameter)
            if gradient is None or group is None:
                continue
            kept = {
                key: states[f"optimizer.{key}.{_short(name)}"]
                for key in ("step", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
                if f"optimizer.{key}.{_short(name)}" in states
            }
            scale = group["lr"] / rate if rate else 1.0
            mine = lr if scale == 1.0 else lr * scale
            new[name], remembered = updated(self.optimizer, group, mine, states[name], gradient, kept)
            new |= {f"optimizer.{key}.{_short(name)}": value for key, value in remembered.items()}
        return new


def _short(name: str) -> str:
    return name.removeprefix("original.")
