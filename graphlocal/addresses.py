"""Where the tensors of a model and its optimizer lie, for what goes on reading and writing there."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_KIND = attrgetter("shape", "dtype")


class Addresses:
    """The addresses of a model's parameters and buffers and of an optimizer's tensors when this was made.

    Changes in place are none. What `.data = ...`, a trip to another device or dtype, or another tensor changes, is one.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.tables = [table for m in model.modules() for table in (m._parameters, m._buffers) if table]
        named = chain(model.named_parameters(), model.named_buffers())
        self.names = {id(tensor): name.removeprefix("original.") for name, tensor in named}
        self.then = self._now()

    def moved(self) -> str | None:
        """The name of the first tensor that is replaced, lies elsewhere, or is laid out otherwise; None without one."""
        now = self._now()
        if now == self.then:
            return None
        missing = next((place[0] for place in self.then if place not in now), None)
        return self.names.get(missing or 0, "a tensor of the optimizer")

    def _now(self) -> list[tuple[Any, ...]]:
        """Of each tensor. Made before every replay, so it does without names and without a walk through the modules."""
        tables = chain(self.tables, self.optimizer.param_groups, self.optimizer.state.values())
        tensors = [x for table in tables for x in table.values() if isinstance(x, Tensor) and x.layout is torch.strided]
        return list(
            zip(
                map(id, tensors), map(Tensor.data_ptr, tensors), map(Tensor.stride, tensors), map(_KIND, tensors),
                strict=True,
            )
        )  # fmt: skip
