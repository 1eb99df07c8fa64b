"""Steps like the last one, which look at little, give what the eager target gives; every change is followed at once."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphlocal
from graphlocal.errors import LocalTrainingError
from graphlocal.rules import RecLRA

RULES = ["backprop", "rec-lra", RecLRA(error_weights="kp"), "lra-fdbk", "fa", "dfa"]
AGAIN = 3
"""After so many steps the next one is like the last: the first is eager, the second lowered."""


def tanh_net() -> nn.Module:
    """Its output is saved for the error pass."""
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.25), nn.Linear(8, 4), nn.Tanh())


def batch(size: int = 12, seed: int = 3) -> Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(
    rule: Any = "rec-lra", target: str = "auto", make: Callable[[], nn.Module] = tanh_net
) -> graphlocal.LocalModule:
    torch.manual_seed(0)
    model = make().double()
    return graphlocal.compile(model, example_inputs=batch(), rule=rule, target=target)


def step(local: nn.Module, x: Tensor, seed: int = 1) -> dict[str, Tensor | None]:
    """The gradients of one step."""
    local.zero_grad()
    torch.manual_seed(seed)
    (local(x) - 0.5).square().sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in local.named_parameters()}


def warmed(rule: Any = "rec-lra", make: Callable[[], nn.Module] = tanh_net) -> graphlocal.LocalModule:
    local = net(rule, make=make)
    for seed in range(AGAIN):
        step(local, batch(), seed)
    assert repeats(local)
    return local


def repeats(local: graphlocal.LocalModule) -> bool:
    return local._last is not None and local._last.repeat is not None


def assert_equal(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_parameters_are_the_eager_targets_after_many_steps(rule):
    states = []
    for target in ("eager", "auto"):
        local = net(rule, target)
        optimizer = torch.optim.SGD(local.parameters(), 0.1, momentum=0.9)
        for i in range(12):
            step(local, batch(seed=i), i)
            optimizer.step()
        assert repeats(local) == (target == "auto")
        states.append(local.state_dict())
    assert_equal(states[1], states[0])


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _replace_layer(local: graphlocal.LocalModule) -> None:
    torch.manual_seed(5)
    local.original[2] = Doubled(8, 8).double()


def _replace_weight(local: graphlocal.LocalModule) -> None:
    local.original[0].weight = nn.Parameter(torch.full_like(local.original[0].weight, 0.1))


def _double_maps(local: graphlocal.LocalModule) -> None:
    state = local.state_dict()
    local.load_state_dict({n: 2 * value if n.startswith("error_weights") else value for n, value in state.items()})


CHANGES: dict[str, Callable[[graphlocal.LocalModule], Any]] = {
    "a frozen layer": lambda local: local.original[2].requires_grad_(False),
    "a layer replaced": _replace_layer,
    "a parameter replaced": _replace_weight,
    "a dropout switched off": lambda local: local.original[3].eval(),
    "feedback maps loaded": _double_maps,
    "weights changed": lambda local: torch.nn.init.constant_(local.original[4].weight, 0.3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_followed_in_the_next_step(change):
    found = []
    for local in (net(target="eager"), warmed()):
        before = step(local, batch())
        CHANGES[change](local)
        found.append(step(local, batch()))
        assert any(g is None or not torch.equal(g, before[n]) for n, g in found[-1].items())
    assert_equal(found[1], found[0])


CALLS: dict[str, Callable[[nn.Module], Tensor]] = {
    "another batch size": lambda local: local(batch(5)),
    "other strides": lambda local: local(batch().t().contiguous().t()),
    "a keyword": lambda local: local(input=batch()),
    "as it was": lambda local: local(batch()),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_differs_is_made_as_the_eager_target_makes_it(call):
    found = []
    for local in (net(target="eager"), warmed()):
        local.zero_grad()
        torch.manual_seed(1)
        CALLS[call](local).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in local.named_parameters()})
    assert_equal(found[1], found[0])


def test_an_input_that_requires_a_gradient_gets_one():
    x = batch().requires_grad_()
    for local in (net(target="eager"), warmed()):
        x.grad = None
        step(local, x)
        assert x.grad is not None
        assert x.grad.abs().sum() > 0


def test_evaluation_and_no_grad_are_the_original_model():
    local = warmed()
    with torch.no_grad():
        assert not local(batch()).requires_grad
    local.eval()
    assert torch.equal(local(batch()), local.original(batch()))
    local.train()
    assert_equal(step(local, batch()), step(net(target="eager"), batch()))


def test_autocast_that_begins_and_ends_is_followed():
    def gradients(local: nn.Module, on: bool) -> dict[str, Tensor]:
        local.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = local(x).float().square().sum()
        loss.backward()
        return {name: p.grad.clone() for name, p in local.named_parameters()}

    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), batch().float()
    known = graphlocal.compile(copy.deepcopy(model), example_inputs=x, rule="backprop", target="eager")
    local = graphlocal.compile(model, example_inputs=x, rule="backprop")
    expected = {on: gradients(known, on) for on in (True, False)}
    assert not torch.equal(expected[True]["original.0.weight"], expected[False]["original.0.weight"])
    for on in [False] * 4 + [True] * 4 + [False] * 2 + [True, False, True]:
        found = gradients(local, on)
        for name, gradient in expected[on].items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-2 if on else 1e-5)
        assert on or torch.allclose(found["original.0.weight"], expected[False]["original.0.weight"])


def test_an_error_pass_runs_without_the_autocast_that_began_after_its_forward_pass():
    local = warmed()
    expected = step(local, batch())
    local.zero_grad()
    torch.manual_seed(1)
    loss = (local(batch()) - 0.5).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert_equal({name: p.grad for name, p in local.named_parameters()}, expected)


def test_forward_passes_may_be_answered_in_any_order():
    local, eager = warmed("backprop", net_without_chance), net("backprop", "eager", net_without_chance)
    for module in (local, eager):
        module.zero_grad()
        first, second = module(batch(seed=1)), module(batch(seed=2))
        second.square().sum().backward()
        first.sum().backward()
    assert_equal({n: p.grad for n, p in local.named_parameters()}, {n: p.grad for n, p in eager.named_parameters()})


def net_without_chance() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def test_a_retained_step_gives_the_same_again_and_a_freed_one_says_so():
    local = warmed(make=net_without_chance)
    once = step(local, batch())
    local.zero_grad()
    loss = (local(batch()) - 0.5).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    twice = {name: p.grad / 2 for name, p in local.named_parameters()}
    assert_equal(twice, once)
    output = local(batch())
    output.sum().backward()
    with pytest.raises(LocalTrainingError, match="backward was called a second time"):
        output.square().sum().backward()


def test_a_second_derivative_is_refused_like_that_of_any_function_differentiated_once():
    local = warmed(make=net_without_chance)
    (gradient, *_) = torch.autograd.grad(
        local(batch()).square().sum(), list(local.original.parameters()), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_nan_is_found_and_named_and_may_be_let_pass():
    local = warmed(make=net_without_chance)
    with torch.no_grad():
        local.original[0].weight[0, 0] = torch.nan
    with pytest.raises(LocalTrainingError, match="the error of the output is not a number"):
        step(local, batch())
    local.check_finite = False
    assert step(local, batch())["original.2.weight"].isnan().any()


def test_an_infinite_feedback_map_is_named_by_its_subgraph():
    local = warmed(make=net_without_chance)
    for name, value in local.error_weights.state_dict().items():
        local.error_weights.get_buffer(name).fill_(torch.nan)
        assert value.isnan().all()
    with pytest.raises(LocalTrainingError, match="the local error of subgraph"):
        step(local, batch())


class Nothing(torch.autograd.Function):
    """Sends no error back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> None:
        return None


@pytest.mark.parametrize("steps", [0, 1, AGAIN])
def test_a_loss_that_sends_no_error_back_changes_nothing(steps):
    local = net()
    for seed in range(steps):
        step(local, batch(), seed)
    local.zero_grad()
    Nothing.apply(local(batch())).sum().backward()
    assert all(p.grad is None for p in local.parameters())
    assert_equal(step(local, batch()), step(net(target="eager"), batch()))


@pytest.mark.parametrize("make", [tanh_net, net_without_chance], ids=["saved output", "other output"])
@pytest.mark.parametrize("end", ["backward", "drop"])
def test_what_a_step_keeps_goes_without_the_garbage_collector(make, end):
    local = warmed(make=make)
    gc.collect()
    gc.disable()
    try:
        output = local(batch())
        saved = output.grad_fn.step.saved
        kept = [weakref.ref(x) for x in (output, *saved)]
        assert len(kept) > 2
        del saved
        if end == "backward":
            output.sum().backward()
        del output
        assert not [ref for ref in kept if ref() is not None]
    finally:
        gc.enable()


def test_an_output_is_the_users_to_change_where_nothing_else_reads_it():
    local = warmed(make=net_without_chance)
    expected = step(local, batch())
    local.zero_grad()
    output = local(batch())
    output -= 0.5
    output.square().sum().backward()
    assert_equal({name: p.grad for name, p in local.named_parameters()}, expected)


ENDS: dict[str, Callable[[], nn.Module]] = {
    "linear in three dimensions": lambda: nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 4)),
    "flatten": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.Flatten()),
    "unflatten": lambda: nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4))),
    "column": lambda: Column(),
}


class Column(nn.Module):
    """Its output is a part of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)[:, 0]


@pytest.mark.parametrize("end", ENDS)
def test_an_output_that_is_a_view_inside_is_the_users_to_change(end):
    local, plain = warmed("backprop", ENDS[end]), ENDS[end]().double()
    plain.load_state_dict(local.original.state_dict())
    for module in (local, plain):
        module.zero_grad()
        output = module(batch())
        output[0] = 1
        output.square().sum().backward()
    assert not local(batch())._is_view()
    found = {name: p.grad for name, p in local.original.named_parameters()}
    assert_equal(found, {name: p.grad for name, p in plain.named_parameters()})


def test_learned_feedback_maps_that_are_replaced_learn():
    local = warmed(RecLRA(error_weights="kp"))
    maps = local.error_weights._parameters
    maps.update({name: nn.Parameter(value.detach().clone()) for name, value in maps.items()})
    found = step(local, batch())
    learned = [name for name in found if name.startswith("error_weights")]
    assert learned
    assert all(found[name] is not None for name in learned)


def test_learned_feedback_maps_may_be_updated_between_two_steps_that_overlap():
    found = []
    for target in ("eager", "auto"):
        local = net(RecLRA(error_weights="kp"), target, net_without_chance)
        optimizer = torch.optim.SGD(local.error_weights.parameters(), 0.1)
        for _ in range(AGAIN + 1):
            local.zero_grad()
            first, second = local(batch(seed=1)), local(batch(seed=2))
            first.square().sum().backward()
            optimizer.step()
            second.square().sum().backward()
        found.append({name: p.grad for name, p in local.named_parameters()})
    assert_equal(found[1], found[0])


def test_a_module_goes_without_the_garbage_collector():
    local = warmed()
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(local)
        del local
        assert gone() is None
    finally:
        gc.enable()
