"""Local auxiliary heads: the error of a representation from the labels, and the updates of the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graphlocal.errors import InputError
from graphlocal.rules import Head, Rule


def head_name(value: str, parameter: str) -> str:
    """The name under which a parameter of a head is kept among the feedback maps."""
    return f"{parameter}_of_head_{value}"


class LocalHead(nn.Module):
    """The gradient of a head's loss at the representation, and at the head's parameters.

    forward(z, labels, *parameters) -> (error, *updates)
    """

    def __init__(self, rule: Rule, head: Head, names: Sequence[str]) -> None:
        super().__init__()
        self.rule, self.head, self.names = rule, head, tuple(names)

    def forward(self, z: Tensor, labels: Tensor | None, *parameters: Tensor) -> tuple[Tensor | None, ...]:
        if labels is None:
            raise InputError(
                f"the rule {self.rule.name!r} learns from the labels, and got none",
                why="the error of the output alone does not tell what they are",
                remedy="train with graphlocal.train_step(local, loss_fn, optimizer) and step(x, y), or set "
                "local.labels = y before each backward pass",
            )
        if not isinstance(labels, Tensor):
            raise InputError(
                f"the labels are a {type(labels).__name__}",
                why="a local head compares representations with one tensor of labels",
                remedy="pass a tensor as y",
            )
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            leaves = [parameter.detach().requires_grad_() for parameter in parameters]
            loss = self.rule.head_loss(self.head, z, labels, dict(zip(self.names, leaves, strict=True)))
            return torch.autograd.grad(loss, [z, *leaves])
