"""Casts that a lowered graph leaves out, and those that it must not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import graphlocal
from graphlocal.targets.lowered import record
from graphlocal.targets.simplify import simplify

aten = torch.ops.aten
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def simplified(function, *arguments: Tensor) -> tuple[fx.GraphModule, int]:
    """The recorded operators of a function, simplified, and how many casts are left."""
    module = record(function, *arguments)
    simplify(module.graph)
    module.recompile()
    return module, len(module.graph.find_nodes(op="call_function", target=aten._to_copy.default))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_cast_to_wider_floats_and_back_is_left_out(narrow):
    def function(x: Tensor) -> Tensor:
        return (2 * x).float().to(narrow) @ x.t()

    module, casts = simplified(function, X.to(narrow))
    assert casts == 0
    assert torch.equal(module(X.to(narrow)), function(X.to(narrow)))


KEPT = {
    "rounds": lambda x: (2 * x).bfloat16().float() + 1,
    "rounds integers": lambda x: (x.long() + 2**24 + 1).float().long() % 7,
    "has no promotion": lambda x: (2 * x).to(torch.float8_e4m3fn).to(torch.float32) + 1,
    "is a copy of the argument": lambda x: x.double().float() + 1,
    "is returned": lambda x: ((2 * x).double().float(), x),
    "is returned as a view": lambda x: ((2 * x).double().float().t(), x),
    "is of what is returned": lambda x: [y := 2 * x, y.double().float() + 1],
}


@pytest.mark.parametrize("why", KEPT)
def test_a_cast_is_kept_that(why):
    module, casts = simplified(KEPT[why], X)
    assert casts >= 2
    torch.testing.assert_close(module(X), KEPT[why](X), rtol=0, atol=0)


class Snapshot(nn.Module):
    """Reads a copy of a buffer that it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        before = self.scale.double().float()
        self.scale.mul_(1.5)
        return torch.tanh(self.last(x)) * before


class Eighth(nn.Module):
    """Rounds its hidden values to eight bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        rounded = hidden.detach().to(torch.float8_e4m3fn).to(hidden.dtype)
        return self.last(hidden + (rounded - hidden).detach())


@pytest.mark.parametrize("make", [Snapshot, Eighth])
def test_models_that_cast_are_lowered_and_give_the_eager_targets_numbers(make):
    found = []
    for target in ("eager", "lowered"):
        torch.manual_seed(0)
        local = graphlocal.compile(make(), example_inputs=X, target=target)
        for _ in range(4):
            local.zero_grad()
            local(X).square().sum().backward()
        found.append([*local.state_dict().values(), *(p.grad for p in local.parameters())])
    torch.testing.assert_close(found[1], found[0])
