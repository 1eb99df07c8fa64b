"""The streams target on a GPU: the order in which CUDA streams are issued, and the captured step."""

from __future__ import annotations

import os
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_streams import assert_equal, compiled, error_cut, passes, trained, warmed
from torch import nn
from torch.nn.functional import cross_entropy

import graphlocal
from graphlocal.errors import InputError
from graphlocal.targets.lanes import Part
from graphlocal.targets.streams import _CudaLanes, assign_lanes


def test_lanes_follow_the_piece_before_and_keep_the_optimizer_on_one():
    pieces = error_cut("deep_mlp")
    lanes = assign_lanes(pieces, 3)
    assert set(lanes) == {0, 1, 2}
    assert {lane for lane, piece in zip(lanes, pieces.pieces, strict=True) if piece.updates} == {0}
    assert set(assign_lanes(pieces, 1)) == {0}


class FakeStream:
    """A CUDA stream as far as order goes: it knows which pieces are over before whatever is issued to it next."""

    current: FakeStream

    def __init__(self, device=None):
        self.over: set[int] = set()

    def wait_stream(self, other):
        self.over |= other.over

    wait_event = wait_stream

    def record_event(self):
        event = FakeStream()
        event.over = set(self.over)
        return event


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("name", ["deep_mlp", "tied_weight", "unet", "several_inputs_outputs"])
def test_cuda_streams_are_issued_so_that_every_piece_waits_for_what_it_needs(name, streams, monkeypatch):
    expected = trained(name, compiled(name, target="lowered"), 3)
    local = warmed(name, target="streams", streams=streams)
    caller = FakeStream.current = FakeStream()

    @contextmanager
    def using(stream):
        before, FakeStream.current = FakeStream.current, stream
        yield
        FakeStream.current = before

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", using)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)

    def checked(p, i, function):
        def run(*values):
            assert p.cut.needs[i] <= FakeStream.current.over
            FakeStream.current.over.add(i)
            return function(*values)

        return run

    for p in passes(local):
        p.part = Part(replace(p.cut, functions=tuple(checked(p, i, f) for i, f in enumerate(p.cut.functions))))
        lanes = _CudaLanes(p.cut, p.streams, torch.device("cuda"))

        def one_step(flight, p=p, lanes=lanes):
            for stream in (caller, *lanes.streams):
                stream.over.clear()
            lanes(flight)
            assert caller.over == set(range(len(p.cut.pieces)))

        p._cuda = one_step
    assert_equal(trained(name, local, 3), expected)


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA streams and capture need one")

STRESS_STEPS = int(os.environ.get("GRAPHLOCAL_STRESS_STEPS", 2000))
"""`make sanitize` takes few: under its tools a step takes a hundred times as long."""


class Residual(nn.Module):
    """Six branches that draw random numbers, each added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        branch = lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.1))  # noqa: E731
        self.branches = nn.ModuleList(branch() for _ in range(6))
        self.head, self.other = nn.Linear(64, 10), nn.Linear(64, 3)

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x), self.other(x)


def on_gpu(
    target: str, check: bool = True, optimizer=torch.optim.Adam, lr=1e-3, **options
) -> tuple[graphlocal.LocalModule, graphlocal.TrainStep]:
    torch.manual_seed(0)
    streams = {"streams": 4} if target == "streams" else {}
    local = graphlocal.compile(Residual().cuda(), example_inputs=torch.randn(32, 64, device="cuda"), partition="leaf",
                               target=target, **streams)  # fmt: skip
    local.check_finite = check
    loss = lambda outputs, y: cross_entropy(outputs[0], y)  # noqa: E731
    return local, graphlocal.train_step(local, loss, optimizer(local.parameters(), lr, **options))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(32, 64, device="cuda"), torch.randint(10, (32,), device="cuda")) for _ in range(count)]


@no_gpu
def test_cuda_streams_equal_the_sequential_target():
    states = []
    for target in ("lowered", "streams"):
        local, run = on_gpu(target)
        for x, y in batches(20):
            run(x, y)
        states.append(local.state_dict())
    assert_equal(states[1], states[0])


@no_gpu
@pytest.mark.slow
def test_many_steps_on_random_numbers_of_cuda_streams_equal_the_sequential_target():
    generator = random.Random(1)
    runs = [on_gpu(target, optimizer=torch.optim.SGD, momentum=0.9) for target in ("streams", "lowered")]
    lanes, given = {}, batches(16)
    for i in range(STRESS_STEPS):
        x, y = given[i % len(given)]
        for p in passes(runs[0][0]):
            n = generator.randint(1, 4)
            if (p, n) not in lanes:
                lanes[p, n] = _CudaLanes(p.cut, n, p._cuda.device)
            p._cuda = lanes[p, n]
        for _, run in runs:
            torch.manual_seed(i)
            run(x, y)
        if i % 100 == 99 or i == STRESS_STEPS - 1:
            assert_equal(runs[0][0].state_dict(), runs[1][0].state_dict())
    assert lanes


OPTIMIZERS = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adam, {"capturable": True}),
    (torch.optim.AdamW, {"capturable": True, "lr": "tensor"}),
    (torch.optim.SGD, {"fused": True, "lr": "tensor"}),
    (torch.optim.RMSprop, {"capturable": True}),
    (torch.optim.NAdam, {"capturable": True}),
]


@no_gpu
@pytest.mark.parametrize("target", ["streams", "lowered", "auto", "eager"])
@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS, ids=lambda x: x if isinstance(x, dict) else x.__name__)
def test_a_captured_step_equals_the_step(optimizer, options, target):
    states = []
    for captured in (False, True):
        given = options | ({"lr": torch.tensor(1e-3, device="cuda")} if options.get("lr") else {})
        local, step = on_gpu(target, False, optimizer, **given)
        scheduler = torch.optim.lr_scheduler.StepLR(step.optimizer, 5, 0.5) if options.get("lr") else None
        run = graphlocal.captured_step(step) if captured else step
        given_batches = batches(20)
        torch.manual_seed(2)
        for x, y in given_batches:
            run(x, y)
            if scheduler is not None:
                scheduler.step()
        states.append(local.state_dict())
    assert_equal(states[1], states[0])


def test_a_step_on_a_cpu_is_not_captured():
    local = compiled("mlp", target="streams")
    step = graphlocal.train_step(local, cross_entropy, torch.optim.SGD(local.parameters(), 0.1))
    with pytest.raises(InputError, match="only CUDA"):
        graphlocal.captured_step(step)
