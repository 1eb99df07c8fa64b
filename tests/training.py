"""One training step of a model, eager or compiled, and the comparison of two of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import graphlocal
import zoo

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
ROUNDINGS = 16


@dataclass(frozen=True)
class Step:
    """What one forward and backward pass leaves behind."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    random_state: Tensor


def step(module: nn.Module, inputs: tuple | dict, loss: Callable[[Any], Tensor], seed: int = 0) -> Step:
    """Run a model, or a compiled one, on fresh gradients; the random state is left where the step ends."""
    model = module.original if isinstance(module, graphlocal.LocalModule) else module
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = zoo.call(module, inputs)
    loss(output).backward()
    return Step(
        [leaf.detach() for leaf in zoo.leaves(output)],
        {name: p.grad for name, p in model.named_parameters()},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        torch.get_rng_state(),
    )


def assert_same_forward(local: Step, true: Step) -> None:
    """Outputs, buffers and the random numbers drawn are equal bit for bit."""
    assert len(local.outputs) == len(true.outputs)
    assert all(map(torch.equal, local.outputs, true.outputs))
    for name, buffer in true.buffers.items():
        assert torch.equal(local.buffers[name], buffer), name
    assert torch.equal(local.random_state, true.random_state)


def assert_same_gradients(local: dict[str, Tensor | None], true: dict[str, Tensor | None]) -> None:
    """Each entry within TOLERANCE of the parameter's largest, plus ROUNDINGS units of the model's largest.

    The second term is for gradients that are zero, or small, because large terms cancel, such as those of a
    convolution's bias before BatchNorm: such a sum has no more exact digits than its terms have.
    """
    assert list(local) == list(true)
    missing = {name for name, gradient in true.items() if gradient is None}
    assert {name for name, gradient in local.items() if gradient is None} == missing
    found = {name: gradient for name, gradient in true.items() if gradient is not None}
    largest = max(float(gradient.abs().max()) for gradient in found.values())
    for name, gradient in found.items():
        assert local[name].dtype == gradient.dtype, name
        own = TOLERANCE[gradient.dtype] * float(gradient.abs().max())
        allowed = own + ROUNDINGS * torch.finfo(gradient.dtype).eps * largest
        difference = float((local[name] - gradient).abs().max())
        assert difference <= allowed, f"{name}: off by {difference:.3g}, allowed are {allowed:.3g}"
