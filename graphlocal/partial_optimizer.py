"""An optimizer's step on some of its parameters, with its own state, settings and hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

Gradients = Sequence[Tensor | None]


class PartialOptimizer:
    """A view of an optimizer on some of its parameters.

    Where nothing stands against it (SGD, Adam or AdamW with their default implementation, no hooks, dense gradients
    for all), torch's fused kernel updates them in one call: the same formula, equal to rounding.
    """

    def __init__(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.whole = parameters, optimizer
        self.view = object.__new__(type(optimizer))
        self.view.__dict__.update(optimizer.__dict__)
        self.view.__dict__.pop("step", None)  # an lr_scheduler's, which runs the whole optimizer
        self._divide()

    def _divide(self) -> None:
        """Find this part's parameters in each group of the optimizer."""
        wanted = {id(p): i for i, p in enumerate(self.parameters)}
        self.state = self.whole.state
        self.groups = [(group, [p for p in group["params"] if id(p) in wanted]) for group in self.whole.param_groups]
        self.kernels = [
            _Kernel(self.whole, group, mine, [wanted[id(p)] for p in mine]) for group, mine in self.groups if mine
        ]

    def step(self, gradients: Gradients) -> None:
        groups = self.whole.param_groups
        if (
            self.whole.state is not self.state
            or len(groups) != len(self.groups)
            or any(a is not b for a, (b, _) in zip(groups, self.groups, strict=True))
        ):
            self._divide()  # after load_state_dict or add_param_group
        if not _hooked(self.whole) and all(kernel.takes(gradients) for kernel in self.kernels):
            for kernel in self.kernels:
                kernel.step(gradients)
        else:
            self._step_of_the_view(gradients)
        self.whole._opt_called = True  # type: ignore[attr-defined]  # lr_scheduler looks for it

    def _step_of_the_view(self, gradients: Gradients) -> None:
        """The optimizer's own `step`; it also makes the state that the kernels need."""
        self.view.state = self.whole.state
        self.view.param_groups = [{**group, "params": mine} for group, mine in self.groups if mine]
        before = [p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient if gradient is None else _like(gradient, parameter)
        try:
            self.view.step()
        finally:
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient


TOGETHER = 100_000
"""Gradients with fewer numbers than this wait for each other: one call of the optimizer costs as much as they do."""


class Gathering:
    """`apply(names, gradients)` for an error pass: hands gradients on as soon as there are `enough` numbers of them."""

    def __init__(self, hand_on: Callable[[tuple[str, ...], tuple[Tensor | None, ...]], None], enough: int) -> None:
        self.hand_on, self.enough = hand_on, enough
        self.waiting: dict[str, Tensor | None] = {}
        self.count = 0

    def __call__(self, names: tuple[str, ...], gradients: tuple[Tensor | None, ...]) -> None:
        for name, gradient in zip(names, gradients, strict=True):
            self.waiting[name] = gradient
            if gradient is not None:
                self.count += gradient.numel()
        if self.count >= self.enough:
            self.flush()

    def flush(self) -> None:
        """Hand on all that waits."""
        names, gradients = tuple(self.waiting), tuple(self.waiting.values())
        self.waiting.clear()
        self.count = 0
        if names:
            self.hand_on(names, gradients)


def _hooked(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


class _Kernel:
    """torch's fused kernel for the parameters of one group. places: where their gradients stand."""

    def __init__(
        self, optimizer: Optimizer, group: dict[str, Any], parameters: list[nn.Parameter], places: list[int]
    ) -> None:
        self.group, self.parameters, self.places = group, parameters, places
        self.momentum = type(optimizer) is SGD
        self.known = type(optimizer) in (SGD, Adam, AdamW)
        kinds = {(type(p), p.dtype, p.device, p.layout) for p in parameters}
        self.alike = len(kinds) == 1 and parameters[0].is_floating_point() and parameters[0].layout is torch.strided
        self.states = [optimizer.state.get(p, {}) for p in parameters] if self._ready(optimizer) else None
        self.optimizer = optimizer

    def _ready(self, optimizer: Optimizer) -> bool:
        """Whether a first step has made the state."""
        names: tuple[str, ...] = ("step", "exp_avg", "exp_avg_sq")
        if self.momentum:
            names = ("momentum_buffer",) if self.group["momentum"] else ()
        states = [optimizer.state.get(p, {}) for p in self.parameters]
        return self.known and all(
            isinstance(state.get(name), Tensor)
            and (state[name].device == p.device if name == "step" else state[name].stride() == p.stride())
            for p, state in zip(self.parameters, states, strict=True)
            for name in names
        )

    def takes(self, gradients: Gradients) -> bool:
        group = self.group
        if not (self.known and self.alike) or isinstance(group["lr"], Tensor) or group["foreach"] is not None:
            return False
        if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
            return False
        if group["fused"] is False or group["differentiable"] or group.get("capturable"):
            return False
        mine = [gradients[i] for i in self.places]
        if any(g is None or g.layout is not torch.strided or g.dtype != self.parameters[0].dtype for g in mine):
            return False
        if self.states is None and self._ready(self.optimizer):
            self.states = [self.optimizer.state.get(p, {}) for p in self.parameters]
        return self.states is not None

    def step(self, gradients: Gradients) -> None:
        group, states = self.group, self.states or []
        parameters: Any = self.parameters
        mine: Any = [
            _like(gradients[i], p)  # type: ignore[arg-type]  # `takes` has seen that there is one
            for i, p in zip(self.places, self.parameters, strict=True)
        ]
        common: Any = {"lr": group["lr"], "weight_decay": group["weight_decay"], "maximize": group["maximize"]}
        with torch.no_grad():
            if self.momentum:
                buffers = [state["momentum_buffer"] for state in states] if group["momentum"] else []
                torch._fused_sgd_(
                    parameters, mine, buffers, **common, momentum=group["momentum"], dampening=group["dampening"],
                    nesterov=group["nesterov"], is_first_step=False,
                )  # fmt: skip
                return
            steps = [s["step"] for s in states]
            torch._foreach_add_(steps, 1)
            kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            kernel(
                parameters, mine, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
                [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [], steps, **common,
                amsgrad=group["amsgrad"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
            )  # fmt: skip


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the parameter's layout, as `loss.backward()` gives it; fused kernels rely on that."""
    if gradient.layout is not torch.strided or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
