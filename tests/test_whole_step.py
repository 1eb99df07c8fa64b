"""A whole training step as one pure graph: the numbers of the eager target and of torch's optimizers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.rules import Backprop, KolenPollack, RecLRA
from graphlocal.targets.lowered import NotLowered
from graphlocal.targets.optimizer_math import group_of, initial_state, updated
from graphlocal.targets.whole_step import WholeStep, whole_step

OPTIMIZERS = {
    "sgd": partial(optim.SGD, lr=0.1),
    "decay": partial(optim.SGD, lr=0.1, weight_decay=0.1),
    "momentum": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.3),
    "nesterov": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "adam": partial(optim.Adam, lr=0.01),
    "amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.1, betas=(0.5, 0.7)),
    "adamw": partial(optim.AdamW, lr=0.01, weight_decay=0.1, maximize=True),
}
NAMES = ("mlp", "small_resnet", "vit", "embeddings", "gru_unrolled", "moving_average", "tied_weight", "lstm")


@pytest.mark.parametrize("begun", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_formula_equals_torchs_optimizer(name, begun):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([parameter])
    for _ in range(begun):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    value, state = parameter.detach().clone(), initial_state(optimizer, parameter)
    for _ in range(4):
        parameter.grad = torch.randn_like(parameter)
        group = group_of(optimizer, parameter)
        assert group is not None
        value, state = updated(optimizer, group, torch.tensor(group["lr"]).double(), value, parameter.grad, state)
        optimizer.step()
        torch.testing.assert_close(value, parameter.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_half_precision_is_updated_as_float32_and_rounded(name):
    """Also where gradients are 0, or so small that their squares are 0 in float16; torch's own Adam then gives nan."""
    torch.manual_seed(0)
    half = nn.Parameter(torch.randn(40).half())
    full = nn.Parameter(half.detach().float())
    optimizer, exact = OPTIMIZERS[name]([half]), OPTIMIZERS[name]([full])
    value, state = half.detach().clone(), initial_state(optimizer, half)
    group = group_of(optimizer, half)
    assert group is not None
    for _ in range(4):
        gradient = (torch.randn(40) * 10.0 ** torch.linspace(-6, 0, 40)).half()
        gradient[::5] = 0
        value, state = updated(optimizer, group, torch.tensor(group["lr"]), value, gradient, state)
        full.grad = gradient.float()
        exact.step()
        full.data = full.data.half().float()
        assert value.dtype == torch.float16
        torch.testing.assert_close(value.float(), full.detach(), rtol=1e-3, atol=1e-6)
    assert {x.dtype for x in state.values()} == {torch.float32}


def recorded(name: str, rule: Any, make: Any, **options: Any) -> tuple[WholeStep, graphlocal.LocalModule, Any, list]:
    """The whole step of a float64 zoo model, an equal eager module with its optimizer, and the input tensors."""
    model = zoo.MODELS[name]
    inputs = model.example(torch.float64)
    ours, theirs = (
        graphlocal.compile(model.make(torch.float64), example_inputs=inputs, rule=rule, target="eager")
        for _ in range(2)
    )
    leaves, _ = ours._binder.flatten(*(((), inputs) if isinstance(inputs, dict) else (inputs, {})))
    step = whole_step(
        ours.compiled, leaves, lambda flat: ours._unflatten(ours.compiled, flat), lambda out, _: model.loss(out),
        make(ours.parameters()), None, **options,
    )  # fmt: skip
    return step, theirs, make(theirs.parameters()), [x for x in leaves if isinstance(x, Tensor)]


def is_mutable(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


@pytest.mark.parametrize("rule", [Backprop(), RecLRA(error_weights="kp"), KolenPollack()], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_whole_step_equals_train_step(name, rule):
    make = partial(optim.SGD, lr=0.05, momentum=0.9)
    step, theirs, optimizer, tensors = recorded(name, rule, make)
    fused = graphlocal.train_step(theirs, lambda out, _: zoo.MODELS[name].loss(out), optimizer)
    states, lr = dict(step.states), torch.tensor(0.05)
    inputs = zoo.MODELS[name].example(torch.float64)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = fused(inputs, None)
        torch.manual_seed(seed)
        loss, *new = step.module(*states.values(), *tensors, lr)
        states.update(zip(step.changed, new, strict=True))
        torch.testing.assert_close(loss, expected)
    for key, value in theirs.state_dict().items():
        if key in states:
            torch.testing.assert_close(states[key], value, msg=lambda text, key=key: f"{key}: {text}")
    assert not any(map(is_mutable, step.module.graph.nodes))


@pytest.mark.parametrize("name", ["mlp", "small_resnet", "vit"])
def test_any_batch_size_is_taken(name):
    step, theirs, optimizer, tensors = recorded(name, RecLRA(), partial(optim.Adam, lr=1e-3), any_batch=True)
    longer = [torch.cat([x, x[:1]]) for x in tensors]
    fused = graphlocal.train_step(theirs, lambda out, _: zoo.MODELS[name].loss(out), optimizer)
    loss, *_ = step.module(*step.states.values(), *longer, torch.tensor(1e-3))
    torch.testing.assert_close(loss, fused(tuple(longer), None))


def test_parameter_groups_keep_the_ratio_of_their_learning_rates():
    def make(parameters: Any) -> optim.Optimizer:
        first, *others = parameters
        return optim.SGD([{"params": [first], "lr": 0.2}, {"params": others, "lr": 0.05}])

    step, theirs, optimizer, tensors = recorded("mlp", Backprop(), make)
    fused = graphlocal.train_step(theirs, lambda out, _: zoo.MODELS["mlp"].loss(out), optimizer)
    _, *new = step.module(*step.states.values(), *tensors, torch.tensor(0.2))
    fused(tuple(tensors), None)
    found = dict(zip(step.changed, new, strict=True))
    for name, value in theirs.original.named_parameters():
        torch.testing.assert_close(found[f"original.{name}"], value.detach())


def test_another_optimizer_and_a_loss_that_reads_values_are_refused():
    with pytest.raises(InputError, match="RMSprop"):
        recorded("mlp", Backprop(), optim.RMSprop)
    model = zoo.MODELS["mlp"]
    local = graphlocal.compile(model.make(), example_inputs=model.example(), rule="backprop")
    leaves, _ = local._binder.flatten(model.example(), {})

    def loss(output: Tensor, _: Any) -> Tensor:
        return output.sum() if output.sum() > 0 else -output.sum()

    with pytest.raises(NotLowered, match="the loss or the optimizer"):
        whole_step(local.compiled, leaves, lambda flat: local._unflatten(local.compiled, flat), loss,
                   optim.SGD(local.parameters(), 0.1), None)  # fmt: skip
