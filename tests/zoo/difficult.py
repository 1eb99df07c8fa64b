"""Hard models, in which what happens depends on the data, on Python state or on reassigned buffers; bad ones,
with nothing to learn from."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.perceptrons import Layered, layers
from zoo.registry import BAD, CLASSES, HARD, VOCABULARY, fit, model, sentences, vectors


def hard(name: str, expect: str, tags: str = "") -> Callable[[Any], Any]:
    return model(name, tags=tags, into=HARD, expect=expect)


def around(middle: nn.Module) -> nn.Module:
    """An MLP with the hard module in its middle, so that only `1` need be opaque."""
    return nn.Sequential(nn.Linear(6, 6), middle, nn.Tanh(), nn.Linear(6, CLASSES))


class Branch(Layered):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return torch.tanh(self.first(x))
        return torch.sigmoid(self.second(x))


@hard("branch_in_block", "opaque")
def branch_in_block() -> nn.Module:
    middle = Branch()
    del middle.head
    return around(middle)


@hard("branch_at_root", "either")
class BranchAtRoot(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


class TopOneExperts(nn.Module):
    """Each row goes through its best expert only."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList([layers(6, 5, 6) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.gate(x).softmax(1).max(1)
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = choice == index
            if rows.any():
                result[rows] = weight[rows, None] * expert(x[rows])
        return result


@hard("top_one_experts", "opaque")
def top_one_experts() -> nn.Module:
    return around(TopOneExperts())


class ItemScale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs().max().item())


@hard("item", "either")
def item() -> nn.Module:
    return around(ItemScale())


@hard("skip_python", "refused", "random")
class SkipPython(Layered):
    """Layer skipping by Python's own random numbers, which tracing would freeze."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            if random.random() < 0.5:
                x = torch.tanh(layer(x))
        return self.head(x)


@hard("skip_torch", "either", "random")
class SkipTorch(Layered):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            if torch.rand(()) < 0.5:
                x = torch.tanh(layer(x))
        return self.head(x)


@hard("reassigned_buffer", "either", "buffer")
class ReassignedBuffer(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x))
        self.mean = 0.9 * self.mean + 0.1 * z.detach().mean(0)
        return self.head(torch.tanh(self.second(z - self.mean)))


@hard("gradient_inside", "either")
class GradientInside(Layered):
    """The output is a derivative that autograd takes inside the forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = torch.tanh(self.second(torch.tanh(self.first(x)))).square().sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return self.head(slope)


# Bad: nothing to learn from


def bad(name: str, inputs: Callable[[], tuple]) -> Callable[[Any], Any]:
    return model(name, inputs, fit, into=BAD, expect="refused")


@bad("integer_only", sentences)
class IntegerOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(VOCABULARY).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[x] * 2


@bad("class_output", vectors)
class ClassOutput(Layered):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x))).argmax(1)


@bad("boolean_output", vectors)
class BooleanOutput(Layered):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) > 0
