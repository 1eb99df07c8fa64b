"""Training under autocast: every rule, wherever the backward pass stands, lowered as well as eager."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

import graphlocal
import zoo
from graphlocal.autocast import autocast_now, under
from graphlocal.fitting import refit
from graphlocal.rules import Calibrated, LRADiff, RecLRA

RULES = [
    "backprop", "rec-lra", RecLRA(error_weights="kp", derivative=True), RecLRA(inside="recursion"), "lra-fdbk",
    LRADiff(steps=3), "fa", "kolen-pollack", "sign-symmetric", "dfa", "local-loss", "dtp", Calibrated(every=2),
]  # fmt: skip


def cast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2),
        nn.Tanh(), nn.Flatten(), nn.LazyLinear(12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 5),
    )  # fmt: skip


X, Y = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 5


def compiled(rule: Any, target: str = "auto", partition: str = "leaf") -> graphlocal.LocalModule:
    model = convnet()
    model(X)
    torch.manual_seed(1)
    return graphlocal.compile(model, example_inputs=X, rule=rule, target=target, partition=partition)


def updates(local: graphlocal.LocalModule, forward: bool = True, backward: bool = False) -> dict[str, Tensor]:
    """The updates of one step; forward, backward: whether autocast is on there."""
    local.zero_grad()
    torch.manual_seed(2)
    local.labels = Y if local.options.rule.needs_labels else None
    with cast() if forward else nullcontext():
        loss = cross_entropy(local(X), Y)
        assert loss.dtype is torch.float32
    with cast() if backward else nullcontext():
        loss.backward()
    return {name: p.grad.clone() for name, p in local.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_error_pass_runs_under_the_autocast_of_the_forward_pass(rule):
    inside, outside, plain = compiled(rule), compiled(rule), compiled(rule)
    for _ in range(4):  # eager, then lowered; of Calibrated's, every other one is a calibration
        found = updates(outside)
        assert_equal(found, updates(inside, backward=True))
        exact = updates(plain, forward=False)
    assert outside.compiled.execution._passes or rule == "local-loss"
    for name, gradient in exact.items():
        assert found[name].dtype is torch.float32
        assert cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.95, name
    assert any(not torch.equal(found[name], gradient) for name, gradient in exact.items())


@pytest.mark.parametrize("partition", ["leaf", "auto"])
@pytest.mark.parametrize("rule", ["rec-lra", "backprop", "fa", "lra-fdbk"])
def test_the_lowered_step_has_autocasts_numbers_and_works_in_its_dtype(rule, partition):
    lowered, eager = compiled(rule, "lowered", partition), compiled(rule, "eager", partition)
    expected = updates(eager)
    found = updates(lowered)
    execution = lowered.compiled.execution
    if execution.shared_errors:  # sums in another order
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0.02, atol=0.02 * float(gradient.abs().max()))
    else:
        assert_equal(found, expected)
    (passes,) = execution._passes.values()
    assert passes.casts
    saved = passes.forward(X)[1]  # with autocast off, as in a step
    assert any(value.dtype is torch.bfloat16 for value in saved if isinstance(value, Tensor))


def test_steps_with_and_without_autocast_have_graphs_of_their_own():
    lowered, eager = compiled("rec-lra", "lowered", "auto"), compiled("rec-lra", "eager", "auto")
    for forward in (True, False, True, False):
        for backward in (False, True):
            assert_equal(updates(lowered, forward, backward), updates(eager, forward, backward))
    assert len(lowered.compiled.execution._passes) == 2


@pytest.mark.parametrize("rule", ["rec-lra", Calibrated(every=2)], ids=str)
def test_one_autocast_around_all_steps_is_as_good_as_one_around_each(rule):
    """torch keeps its casts of the weights until autocast ends; a step changes the weights."""
    states = []
    for outer, inner in ((cast, nullcontext), (nullcontext, cast)):
        local = compiled(rule, "eager", "auto")
        step = graphlocal.train_step(local, cross_entropy, torch.optim.SGD(local.parameters(), 0.1))
        with outer():
            for _ in range(4):
                with inner():
                    step(X, Y)
        states.append(local.state_dict())
    assert_equal(*states)


def test_feedback_is_fitted_in_single_precision_under_autocast():
    torch.manual_seed(0)
    rows, gradient = torch.randn(64, 20), torch.randn(64, 5)
    fits = []
    for context in (nullcontext, cast):
        weight, second, cross = torch.zeros(5, 20), torch.zeros(20, 20), torch.zeros(20, 5)
        with context():
            refit([weight], second, cross, rows, gradient, 0.8, 1e-3)
        fits.append(weight)
    assert fits[0].norm() > 0
    assert torch.equal(*fits)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("target", ["auto", "batched", "streams", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fused_steps_under_autocast_train_as_the_eager_target_does(target, recompute):
    states = []
    for chosen in (target, "eager"):
        torch.manual_seed(0)
        hidden = [layer for _ in range(9) for layer in (nn.Linear(8, 8), nn.Tanh())]
        local = graphlocal.compile(
            nn.Sequential(*hidden, nn.Linear(8, 5)), example_inputs=torch.randn(6, 8), target=chosen,
            recompute=recompute,
        )  # fmt: skip
        step = graphlocal.train_step(local, cross_entropy, torch.optim.SGD(local.parameters(), 0.1))
        for _ in range(4):
            with cast():
                step(torch.randn(6, 8), torch.arange(6) % 5)
        assert chosen == "eager" or local.compiled.execution._passes
        states.append(local.state_dict())
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=0.01, atol=0.002)


def test_the_state_of_autocast_is_taken_up_again_and_left_as_it_was():
    with cast():
        then = autocast_now()
    assert then == (("cpu", torch.bfloat16),)
    with under(then):
        assert autocast_now() == then
        with under(()):
            assert autocast_now() == ()
            assert torch.mm(X[:, 0, 0], X[:, 0, 0].T).dtype is torch.float32
        assert torch.mm(X[:, 0, 0], X[:, 0, 0].T).dtype is torch.bfloat16
    assert autocast_now() == ()


@pytest.mark.parametrize(("scale", "gain"), [(2.0**40, 1), (2.0**18, 1000)])
def test_a_loss_scaler_skips_the_step_that_overflows(scale, gain):
    """At the output, or, with large feedback, inside only."""
    local = compiled("fa")
    for twin in local.error_weights.buffers():
        twin.mul_(gain)
    optimizer = torch.optim.SGD(local.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = [p.clone() for p in local.parameters()]
    for _ in range(2):
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(local(X), Y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() < scale
    assert all(map(torch.equal, local.parameters(), before))


def test_zoo_models_learn_by_backprops_updates_under_autocast():
    for name in ("vit", "transformer_encoder", "small_resnet"):
        model = zoo.MODELS[name]
        local = graphlocal.compile(
            model.make(torch.float32), example_inputs=model.example(torch.float32), rule="backprop", target="lowered"
        )
        reference = model.make(torch.float32)
        for module in (local, reference):
            with cast():
                loss = model.loss(module(*model.example(torch.float32)))
            loss.backward()
        for (name_, p), q in zip(reference.named_parameters(), local.original.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=0.02, atol=0.02 * float(p.grad.abs().max()), msg=name_)
