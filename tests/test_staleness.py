"""`step.run(batches, staleness=k)`: forward passes ahead of the updates, or a refusal where there can be none."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from test_overlap import assert_same, batches, compiled, loop, overlapped, slowed, small_pieces, state, stepper, traced
from torch import nn
from torch.nn.functional import cross_entropy

import graphlocal
import zoo
from graphlocal import overlap
from graphlocal.errors import InputError
from graphlocal.targets.accesses import root_of
from graphlocal.targets.overlap import _named

__all__ = ["small_pieces", "traced"]  # fixtures


def stale_reference(name: str, local: graphlocal.LocalModule, count: int, staleness: int) -> tuple[list, dict]:
    """The same order of passes one after another: forward passes `staleness` batches before their updates."""
    model, step = zoo.MODELS[name], stepper(name, local)
    torch.manual_seed(3)
    source, ahead, losses = batches(name, count), deque(), []
    for x, y in source:
        leaves, spec = local._binder.flatten(x, {})
        if not losses:  # the first batch is lowered, and trained on by itself
            losses.append(step(x, y))
            continue
        ahead.append(local._forward_pass(list(leaves), spec, fused=True))
        if len(ahead) > staleness:
            losses.append(learn(step, model, *ahead.popleft()))
    losses += [learn(step, model, *run) for run in ahead]
    return losses, state(local)


def learn(step, model, compiled_, run) -> torch.Tensor:
    loss, errors = step._loss(compiled_, run.outputs, None)
    with torch.no_grad():
        run.error_pass(errors, lambda names, gradients: step._apply(compiled_, names, gradients))
    return loss


@pytest.mark.parametrize(
    ("name", "staleness"),
    [
        ("dropout_mlp", 1), ("moving_average", 3),
        *(pytest.param(n, k, marks=pytest.mark.exhaustive) for n in ("unet", "small_resnet") for k in (1, 2, 5)),
    ],
)  # fmt: skip
def test_staleness_is_one_order_of_passes_whatever_the_lanes(name, staleness, monkeypatch):
    expected = stale_reference(name, compiled(name, target="lowered"), 12, staleness)
    slowed(monkeypatch, 0.0003)
    for streams in (1, 3):
        local = compiled(name, target="streams", streams=streams)
        assert_same(overlapped(name, local, 12, staleness=staleness), expected)


def test_forward_passes_run_ahead_by_as_much_as_is_allowed(traced):
    overlapped("deep_mlp", compiled("deep_mlp", target="streams", streams=1), 9, staleness=2)
    for batch in range(1, 7):
        begun = min(ran.start for ran in traced if ran.step == batch + 2 and ran.name == "F1")
        updated = min(ran.start for ran in traced if ran.step == batch and "optimizer" in ran.name)
        late = min(ran.start for ran in traced if ran.step == batch + 3 and ran.name == "F1") if batch < 6 else updated
        assert begun < updated <= late


@pytest.mark.parametrize("staleness", [-1, 1.0, True, 65])
def test_a_staleness_that_can_not_be_is_refused(staleness):
    with pytest.raises(InputError, match="staleness"):
        stepper("mlp", compiled("mlp", target="streams")).run([], staleness=staleness)


def test_staleness_needs_steps_that_overlap():
    with pytest.raises(InputError, match='target="streams"'):
        stepper("mlp", compiled("mlp")).run([], staleness=1)


def test_a_staleness_under_autocast_is_refused_and_none_is_a_plain_loop():
    found = []
    for run in (loop, overlapped):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(run("mlp", compiled("mlp", target="streams"), 4))
    assert_same(found[1], found[0])
    local = compiled("mlp", target="streams")
    before = state(local)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(InputError, match="why: autocast is on") as caught:
        overlapped("mlp", local, 4, staleness=1)
    assert "staleness=1, where steps can't overlap" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in local.state_dict().items())


@pytest.mark.parametrize("staleness", [0, 2])
def test_autocast_that_begins_between_two_losses_counts_from_there_on(staleness):
    def half_under_autocast(losses) -> list:
        found = []
        with ExitStack() as stack:
            for loss in losses:
                found.append(loss)
                if len(found) == 3:
                    stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        return found

    x = zoo.MODELS["mlp"].example()
    steps = [stepper("mlp", compiled("mlp", target="streams")) for _ in range(2)]
    run = steps[0].run([(x, None)] * 6, staleness=staleness)
    if staleness:
        with pytest.raises(InputError, match="why: autocast is on"):
            half_under_autocast(run)
    else:
        expected = half_under_autocast(steps[1](x, None) for _ in range(6))
        assert torch.equal(torch.stack(half_under_autocast(run)), torch.stack(expected))


def test_a_staleness_is_refused_on_another_device_than_a_cpu():
    local = compiled("mlp", target="streams")
    elsewhere = SimpleNamespace(options=local.options, original=nn.Linear(2, 2, device="meta"))
    with pytest.raises(InputError, match="the model is on meta, and steps overlap on a CPU alone"):
        overlap.overlapped(SimpleNamespace(local=elsewhere), [], 1)


class SharedStatistics(nn.Module):
    """Each forward pass changes a buffer that lies in the memory of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("seen", self.first.bias.detach())

    def forward(self, x):
        self.seen.mul_(0.99)
        return self.head(torch.tanh(self.first(x)))


def test_a_staleness_is_refused_where_both_passes_write_one_memory():
    x, y = torch.randn(5, 6), torch.arange(5) % 3
    local = graphlocal.compile(SharedStatistics(), example_inputs=x, target="streams")
    step = graphlocal.train_step(local, cross_entropy, torch.optim.SGD(local.parameters(), 0.1))
    losses = []
    with pytest.raises(InputError, match=r"why: .* what the forward pass writes too \(first.bias, seen\)"):
        losses.extend(step.run([(x, y)] * 4, staleness=1))
    assert len(losses) == 1  # the first batch, which is always trained on by itself


def test_memory_is_named_as_in_the_users_model_and_never_by_an_address():
    sparse = nn.Module()
    sparse.register_buffer("mask", torch.eye(2).to_sparse())
    model, weight = nn.Module(), nn.Linear(2, 2)
    model.original = nn.Sequential(weight, weight, sparse)
    both = frozenset({root_of(weight.weight), "original.2.mask"})
    assert _named(both, (model, model)) == "0.weight, 2.mask"
    assert _named(frozenset({root_of(torch.zeros(2))}), (model,)) == "a constant of the model"


def test_a_staleness_is_refused_for_shapes_that_are_not_lowered(monkeypatch):
    monkeypatch.setattr("graphlocal.execution.MANY_SHAPES", 1)
    (x,) = zoo.MODELS["mlp"].example()
    step = stepper("mlp", compiled("mlp", target="streams"))
    assert len(list(step.run([(x, None)] * 4, staleness=2))) == 4
    with pytest.raises(InputError, match="only the first 1 shapes of inputs are lowered"):
        list(step.run([(x, None), (x[:2], None)], staleness=2))
    assert len(list(step.run([(x, None), (x[:2], None)]))) == 2
