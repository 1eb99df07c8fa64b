"""torch's optimizers as formulas on plain tensors, so that their step can be part of a graph.

SGD (with momentum), Adam (Kingma and Ba, 2015; amsgrad: Reddi et al., 2018) and AdamW (Loshchilov and Hutter, 2019),
with all options of torch's classes. Equal to torch's own to rounding.

Parameters of half precision are updated in float32, and what the optimizer remembers of them is float32. torch's fused
kernels compute in float32 too, but remember in half precision, where the mean square of a gradient below 5e-3 is 0 in
float16; its other implementations compute in half precision, where Adam's eps of 1e-8 is 0, and a weight whose
gradient is 0 becomes 0 / 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from graphlocal.errors import InputError

State = dict[str, Tensor]


def group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any] | None:
    """The settings of a parameter, or None if the optimizer does not hold it.

    Raises InputError for an optimizer whose formula is not here.
    """
    if type(optimizer) not in (SGD, Adam, AdamW):
        raise InputError(
            f"the optimizer is a {type(optimizer).__name__}",
            why="a training step as one graph holds the optimizer's formula",
            remedy="use torch.optim.SGD, Adam or AdamW",
        )
    return next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)


def initial_state(optimizer: Optimizer, parameter: nn.Parameter) -> State:
    """What the optimizer remembers of a parameter now; zeros before its first step. `step` is a float32 scalar."""
    group = group_of(optimizer, parameter)
    assert group is not None
    known = {k: _exact(v) if isinstance(v, Tensor) else v for k, v in optimizer.state.get(parameter, {}).items()}
    parameter = nn.Parameter(_exact(parameter.detach()))
    if isinstance(optimizer, SGD):
        if not group["momentum"]:
            return {}
        buffer = known.get("momentum_buffer")
        begun = torch.tensor(float(buffer is not None))
        return {"step": begun, "momentum_buffer": torch.zeros_like(parameter) if buffer is None else buffer.clone()}
    names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
    state = {name: known[name].clone() if name in known else torch.zeros_like(parameter) for name in names}
    step = torch.as_tensor(known.get("step", 0.0), dtype=torch.float32).detach().clone()
    return {"step": step, **{name: value.detach() for name, value in state.items()}}


def updated(
    optimizer: Optimizer, group: Mapping[str, Any], lr: Tensor, parameter: Tensor, gradient: Tensor, state: State
) -> tuple[Tensor, State]:
    """The parameter and what the optimizer remembers of it after one step. lr: a scalar tensor."""
    dtype, parameter = parameter.dtype, _exact(parameter)
    gradient = _exact(-gradient if group["maximize"] else gradient)
    formula = _sgd if isinstance(optimizer, SGD) else _adam
    new, kept = formula(group, lr.to(parameter.dtype), parameter, gradient, state)
    return new.to(dtype), kept


def _exact(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _sgd(
    group: Mapping[str, Any], lr: Tensor, parameter: Tensor, gradient: Tensor, state: State
) -> tuple[Tensor, State]:
    momentum = group["momentum"]
    if group["weight_decay"]:
        gradient = gradient + group["weight_decay"] * parameter
    if not momentum:
        return parameter - lr * gradient, {}
    taken = gradient
    if group["dampening"]:  # the first gradient is taken whole
        begun = state["step"].clamp(max=1).to(gradient.dtype)
        taken = gradient * (1 - begun * group["dampening"])
    buffer = momentum * state["momentum_buffer"] + taken
    step = gradient + momentum * buffer if group["nesterov"] else buffer
    return parameter - lr * step, {"step": state["step"] + 1, "momentum_buffer": buffer}


def _adam(
    group: Mapping[str, Any], lr: Tensor, parameter: Tensor, gradient: Tensor, state: State
) -> tuple[Tensor, State]:
    beta1, beta2 = map(float, group["betas"])
    if group["weight_decay"]:
        if group["decoupled_weight_decay"]:
            parameter = parameter * (1 - lr * group["weight_decay"])
        else:
            gradient = gradient + group["weight_decay"] * parameter
    step = state["step"] + 1
    first = state["exp_avg"] + (1 - beta1) * (gradient - state["exp_avg"])
    second = beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient * gradient
    kept = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    if group["amsgrad"]:
        kept["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], second)
    correction1 = (1 - torch.pow(beta1, step.double())).to(parameter.dtype)
    correction2 = (1 - torch.pow(beta2, step.double())).sqrt().to(parameter.dtype)
    size = kept.get("max_exp_avg_sq", second).sqrt() / correction2 + group["eps"]
    return parameter - (lr / correction1) * first / size, kept
