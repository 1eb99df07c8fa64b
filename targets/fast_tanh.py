"""A target's hyperbolic tangent by way of the sigmoid, which torch computes ten times faster on some processors.

An error neuron z - tanh(u) takes a second tanh for each layer. tanh(u) = 2 sigmoid(2u) - 1 is as good there, since
the difference of two numbers of size 1 has their rounding anyway: the largest error of the float32 difference grows
from 1.5 to 3 units of the last place of 1. The forward pass keeps its own tanh.
"""

from __future__ import annotations

from functools import cache, partial
from math import prod
from timeit import repeat
from typing import Any

import torch
from torch import Tensor, fx

from graphlocal.targets.reuse import NEW, ends_in

aten = torch.ops.aten

ENOUGH = 2048
"""Numbers below which three short calls take longer than one long one."""

SLOW = 3
"""How many times the sigmoid's time a tanh must take."""

_HALF = torch.tensor(0.5, device="cpu")
"""A tensor, since torch takes a microsecond to make one of a number."""


def minus_tanh(z: Tensor, u: Tensor) -> Tensor:
    """The difference z - tanh(u), for float32 and float64."""
    return minus_tanh_over(z, u.clone())


def minus_tanh_over(z: Tensor, u: Tensor) -> Tensor:
    """The same; u's memory holds something else afterwards."""
    half = u.add_(u).sigmoid_().sub_(_HALF)  # exact from here on, for sigmoids above a quarter
    return torch.sub(z, half, alpha=2)


NEW.update({minus_tanh, minus_tanh_over})


def replace_tanh(graph: fx.Graph) -> None:
    """Let a graph call `minus_tanh` for every difference to a tanh that nothing else reads, in place."""
    for node in list(graph.find_nodes(op="call_function", target=aten.sub.Tensor)):
        inner = node.args[1]
        if not isinstance(inner, fx.Node) or inner.target is not aten.tanh.default or len(inner.users) > 1:
            continue
        if node.kwargs or not _pays(node.meta.get("val"), inner.meta.get("val")):
            continue
        u = inner.args[0]
        node.target, node.args = minus_tanh_over if ends_in(u, inner) else minus_tanh, (node.args[0], u)
        graph.erase_node(inner)


def _pays(difference: Any, tanh: Any) -> bool:
    if not isinstance(difference, Tensor) or not isinstance(tanh, Tensor):
        return False
    alike = difference.dtype == tanh.dtype and difference.dtype in (torch.float32, torch.float64)
    return alike and tanh.device.type == "cpu" and prod(tanh.shape) >= ENOUGH and tanh_is_slow(tanh.dtype)


@cache
def tanh_is_slow(dtype: torch.dtype) -> bool:
    """Whether torch's tanh takes much longer than its sigmoid on this processor; measured once."""
    x = torch.linspace(-3, 3, ENOUGH, dtype=dtype, device="cpu")
    tanh, sigmoid = (min(repeat(partial(f, x), number=5, repeat=5)) for f in (torch.tanh, torch.sigmoid))
    return tanh > SLOW * sigmoid
