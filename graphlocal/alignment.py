"""The alignment report: the angle between each local update and autograd's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphlocal.arguments import call_of
from graphlocal.ir import LocalGraph
from graphlocal.preserve import preserved, training_mode
from graphlocal.runtime import LocalModule


@dataclass(frozen=True)
class Alignment:
    """Angles in degrees between local updates and true gradients; below 90 an update descends.

    by_parameter, by_subgraph: NaN where either is zero. overall: of all parameters as one vector.
    """

    by_parameter: dict[str, float]
    by_subgraph: dict[str, float]
    overall: float

    def __str__(self) -> str:
        width = max(map(len, self.by_subgraph), default=0)
        rows = [f"  {name:<{width}}  {angle:6.1f}°" for name, angle in self.by_subgraph.items()]
        return "\n".join([f"alignment with the true gradient: {self.overall:.1f}° overall", *rows])


def alignment(local: LocalModule, inputs: Any, loss_fn: Callable[[Any], Tensor]) -> Alignment:
    """Compare local updates with autograd's gradients on one batch, in training mode.

    inputs: a tensor, a tuple (or list) of positional inputs, or a dict of keyword inputs. loss_fn: from the model's
    output to a scalar. Both passes see the same random numbers and buffers; nothing is left changed.
    """
    learned, true = (gradients(local, model, inputs, loss_fn) for model in (local, local.original))
    return angles(local.graph, learned, true)


def gradients(local: LocalModule, model: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """The gradient of each trainable parameter in training mode, through `local` or through `local.original`."""
    args, kwargs = call_of(inputs, "inputs")
    parameters = {n: p for n, p in local.original.named_parameters() if p.requires_grad}
    mode, calibrating = local.training, local.calibrating
    with training_mode(local.original), preserved(local), torch.enable_grad():
        local.training, local.calibrating = True, False
        try:
            loss = loss_fn(model(*args, **kwargs))
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        finally:
            local.training, local.calibrating = mode, calibrating
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def angles(graph: LocalGraph, learned: dict[str, Tensor], true: dict[str, Tensor]) -> Alignment:
    """The alignment of local updates with true gradients, both by parameter."""
    learned, true = _flat(learned), _flat(true)
    subgraphs = {s.name: [n for n in graph.trainable(s) if n in learned and n in true] for s in graph.subgraphs}
    both = [name for name in learned if name in true]
    return Alignment(
        {name: _angle(learned, true, [name]) for name in both},
        {name: _angle(learned, true, names) for name, names in subgraphs.items() if names},
        _angle(learned, true, both),
    )


def _flat(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (g.to_dense() if g.is_sparse else g).double().flatten() for name, g in gradients.items()}


def _angle(first: dict[str, Tensor], second: dict[str, Tensor], names: list[str]) -> float:
    """The angle between two vectors given in pieces, in degrees."""
    a, b = torch.cat([first[n] for n in names]), torch.cat([second[n] for n in names])
    norms = float(a.norm() * b.norm())
    return math.degrees(math.acos(max(-1.0, min(1.0, float(a @ b) / norms)))) if norms > 0 else math.nan
