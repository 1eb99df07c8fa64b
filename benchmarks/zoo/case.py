"""One model of the zoo: how it is built, what goes in, and the loss on what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def weighted_sum(output: Any) -> Tensor:
    """A loss for any model: all float outputs, each entry with a fixed weight of its own."""
    floats = [x for x in _tensors(output) if x.is_floating_point() and x.requires_grad]
    if not floats:
        raise ValueError("the model returns no float tensor that depends on a parameter")
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in floats]
    return torch.stack([(x * w).mean() for x, w in zip(floats, weights, strict=True)]).sum()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Mapping):  # transformers' output classes are mappings, not registered with pytree
        return [x for value in output.values() for x in _tensors(value)]
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]


@dataclass(frozen=True)
class Case:
    """make: the model, random weights. inputs: a tuple of positional or a dict of keyword inputs, batch of 2 or more.

    Both are called under a fixed seed. loss: of what the model returns. expect: `"compiled"`, `"opaque"` (by way of
    opaque leaves), `"refused"` (a clear error is the right answer) or `"either"`.
    """

    family: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...] | dict[str, Any]]
    loss: Callable[[Any], Tensor] = weighted_sum
    expect: str = "compiled"

    @property
    def id(self) -> str:
        return f"{self.family}/{self.name}"
