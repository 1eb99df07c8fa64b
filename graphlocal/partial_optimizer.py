"""An optimizer's step on some of its parameters, with its own state, settings and hooks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

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

    def step(self, gradients: Gradients, lent: bool = False) -> None:
        """lent: the same tensors come again in the next step, with other numbers in them."""
        groups = self.whole.param_groups
        if (
            self.whole.state is not self.state
            or len(groups) != len(self.groups)
            or any(a is not b for a, (b, _) in zip(groups, self.groups, strict=True))
        ):
            self._divide()  # after load_state_dict or add_param_group
        has_hooks = hooked(self.whole)
        prepared = [] if has_hooks else [kernel.prepared(gradients, lent) for kernel in self.kernels]
        mine = [taken for taken in prepared if taken is not None]
        if not has_hooks and len(mine) == len(self.kernels):
            for kernel, own in zip(self.kernels, mine, strict=True):
                kernel.step(own)
        else:
            # who is not a kernel may keep them
            self._step_of_the_view([g if g is None else g.clone() for g in gradients] if lent else gradients)
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


TOGETHER = 600_000
"""Gradients with fewer numbers than this, and than half of the model's, wait for each other (2.4 MB of float32): a call
of the optimizer costs tens of microseconds, and what it reads takes the place of the error pass's values in the caches.
"""

SMALL = 100_000
"""Models of so few parameters are updated in one call; where subgraphs recompute, no more gradients wait."""

NEAR = 30_000
"""So many numbers are looked at together: while they are in the caches, and not one small tensor at a time."""


def together(parameters: Iterable[Tensor], sparing: bool) -> int:
    """How many numbers of gradients the updates of a model with these parameters wait for.

    sparing: memory matters more than time.
    """
    return min(TOGETHER, SMALL if sparing else max(SMALL, sum(p.numel() for p in parameters) // 2))


class Norms(Protocol):
    """Takes note of updates; `graphlocal.finite.UpdateNorms` is one."""

    def add(self, names: Sequence[str], gradients: Gradients) -> None: ...

    def add_stack(self, names: Sequence[str], stack: Tensor) -> None: ...


class Stacks(Protocol):
    """Gradients in memory that something else takes later; `graphlocal.targets.scratch.Lent` is one."""

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]: ...
    @property
    def stacks(self) -> tuple[Tensor, ...]: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def gradients(self) -> tuple[Tensor, ...]: ...


class Gathering:
    """`apply(names, gradients)` for an error pass: hands gradients on as soon as there are `enough` numbers of them.

    hand_on: called with names and gradients, and with lent=True if they must be looked at now. norms: takes note of
    all that is handed on.
    """

    def __init__(self, hand_on: Callable[..., None], enough: int, norms: Norms | None = None) -> None:
        self.hand_on, self.enough, self.norms = hand_on, enough, norms
        self.names: list[str] = []
        self.gradients: list[Tensor | None] = []
        self.noted = 0  # of `gradients`, those whose norms are known
        self.count = self.near = 0  # numbers that wait; those whose norms are not known

    def __call__(self, names: tuple[str, ...], gradients: tuple[Tensor | None, ...]) -> None:
        self.names += names
        self.gradients += gradients
        numbers = sum([gradient.numel() for gradient in gradients if gradient is not None])
        self.count += numbers
        self.near += numbers
        if self.count >= self.enough:
            self.flush()
        elif self.near >= NEAR:
            self._note()

    def stacks(self, names: tuple[tuple[str, ...], ...], stacks: tuple[Tensor, ...]) -> None:
        """The same for stacks of gradients: `stacks[i][k]` is that of the parameter `names[i][k]`."""
        self._note()
        for group, stack in zip(names, stacks, strict=True):
            if self.norms is not None:
                self.norms.add_stack(group, stack)
            self.names += group
            self.gradients += stack.unbind(0)
            self.count += stack.numel()
        self.noted = len(self.gradients)
        if self.count >= self.enough:
            self.flush()

    def lent(self, lent: Stacks) -> None:
        """The same for gradients whose memory is needed again; they wait for nothing."""
        self.flush()
        if self.norms is not None:
            for group, stack in zip(lent.groups, lent.stacks, strict=True):
                self.norms.add_stack(group, stack)
        self.hand_on(lent.names, lent.gradients, lent=True)

    def _note(self) -> None:
        if self.norms is not None and self.noted < len(self.gradients):
            self.norms.add(self.names[self.noted :], self.gradients[self.noted :])
        self.noted, self.near = len(self.gradients), 0

    def flush(self) -> None:
        """Hand on all that waits."""
        if not self.names:
            return
        self._note()
        names, gradients = tuple(self.names), tuple(self.gradients)
        self.names, self.gradients, self.noted, self.count = [], [], 0, 0
        self.hand_on(names, gradients)


def hooked(optimizer: Optimizer) -> bool:
    """Whether hooks run before or after the optimizer's steps."""
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
        self.optimizer, self.group, self.parameters, self.places = optimizer, group, parameters, places
        self.momentum = type(optimizer) is SGD
        known = type(optimizer) in (SGD, Adam, AdamW)
        kinds = {(type(p), p.dtype, p.device, p.layout) for p in parameters}
        self.dtype = parameters[0].dtype
        self.able = known and len(kinds) == 1 and self.dtype.is_floating_point and parameters[0].layout is torch.strided
        self.steps: list[Tensor] = []
        self.states = self._find_states() if self.able else None
        self.known: tuple[Gradients, list[Tensor]] | None = None  # what was lent last, and what was prepared of it

    def _find_states(self) -> list[dict[str, Any]] | None:
        """The state of each parameter, or None until a first step has made it."""
        names: tuple[str, ...] = ("step", "exp_avg", "exp_avg_sq")
        if self.momentum:
            names = ("momentum_buffer",) if self.group["momentum"] else ()
        states = [self.optimizer.state.get(p, {}) for p in self.parameters]
        ready = all(
            isinstance(state.get(name), Tensor)
            and (
                (state[name].device, state[name].dtype) == (p.device, states[0]["step"].dtype)
                if name == "step"
                else state[name].stride() == p.stride()
            )
            for p, state in zip(self.parameters, states, strict=True)
            for name in names
        )
        return states if ready else None

    def _settings_allow(self) -> bool:
        group = self.group
        if isinstance(group["lr"], Tensor) or group["foreach"] is not None or group["fused"] is False:
            return False
        if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
            return False
        return not (group["differentiable"] or group.get("capturable"))

    def prepared(self, gradients: Gradients, lent: bool = False) -> list[Tensor] | None:
        """This group's gradients, in the layouts of the parameters; None if the kernel can't take them."""
        if not self.able or not self._settings_allow():
            return None
        if self.states is None or self.optimizer.state.get(self.parameters[0]) is not self.states[0]:
            self.states = self._find_states()  # there is none yet, or the user's code has cleared it
        if self.states is None:
            return None
        if self.known is not None and self.known[0] is gradients and all(map(Tensor.is_contiguous, self.parameters)):
            return self.known[1]
        mine = []
        for i, parameter in zip(self.places, self.parameters, strict=True):
            gradient = gradients[i]
            if gradient is None or gradient.dtype is not self.dtype or gradient.layout is not torch.strided:
                return None
            mine.append(gradient if gradient.stride() == parameter.stride() else _like(gradient, parameter))
        unchanged = lent and all(
            gradients[i] is g and g.is_contiguous() for i, g in zip(self.places, mine, strict=True)
        )
        self.known = (gradients, mine) if unchanged else None
        return mine

    def step(self, mine: list[Tensor]) -> None:
        """Update the parameters by what `prepared` gave."""
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            self._step(mine)
        finally:
            torch._C._set_grad_enabled(before)

    def _step(self, mine: Any) -> None:
        group, states = self.group, self.states or []
        parameters: Any = self.parameters
        common: Any = {"lr": group["lr"], "weight_decay": group["weight_decay"], "maximize": group["maximize"]}
        if self.momentum:
            buffers = [state["momentum_buffer"] for state in states] if group["momentum"] else []
            torch._fused_sgd_(
                parameters, mine, buffers, **common, momentum=group["momentum"], dampening=group["dampening"],
                nesterov=group["nesterov"], is_first_step=False,
            )  # fmt: skip
            return
        self._count()
        kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        kernel(
            parameters, mine, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
            [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [], self.steps, **common,
            amsgrad=group["amsgrad"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
        )  # fmt: skip

    def _count(self) -> None:
        """Add 1 to each parameter's count of steps. They lie side by side, so that one addition does it for all."""
        states = self.states or []
        if not self.steps or not all(map(operator.is_, [state["step"] for state in states], self.steps)):
            self.counts = torch.stack([state["step"] for state in states])
            self.steps = list(self.counts.unbind(0))
            for state, count in zip(states, self.steps, strict=True):
                state["step"] = count
        self.counts.add_(1)


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the parameter's layout, as `loss.backward()` gives it; fused kernels rely on that."""
    if gradient.layout is not torch.strided or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
