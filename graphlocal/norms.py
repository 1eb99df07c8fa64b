"""The norms of a step's updates, and whether the updates are numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FEW = 24
"""So many numbers are added up faster in Python than by torch."""

SO_FEW = 8
"""So many tensors are looked at faster one by one, by what the step has just called anyway."""


class UpdateNorms:
    """The norms of a step's dense updates; nothing waits for the device until `total`.

    apart: names of updates that are left out. Several threads may add to one object.
    """

    def __init__(self, apart: Collection[str] = ()) -> None:
        self.apart = frozenset(apart)
        self.found: list[tuple[Sequence[str], Sequence[Tensor] | Tensor]] = []

    def add(self, names: Sequence[str], gradients: Sequence[Tensor | None]) -> None:
        """gradients: the update of each name; None, and sparse ones, are left out."""
        dense = [g for g in gradients if g is not None and not g.is_sparse]
        if len(dense) < len(gradients) or (self.apart and not self.apart.isdisjoint(names)):
            known = {
                name: g
                for name, g in zip(names, gradients, strict=True)
                if g is not None and not g.is_sparse and name not in self.apart
            }
            names, dense = tuple(known), list(known.values())
        if dense:
            self.found.append((names, torch._foreach_norm(dense)))

    def add_stack(self, names: Sequence[str], stack: Tensor) -> None:
        """stack: the updates of parameters of one shape, one after another on the first axis."""
        if self.apart.isdisjoint(names):
            self.found.append((names, torch.linalg.vector_norm(stack, dim=tuple(range(1, stack.dim())))))
        else:
            self.add(names, stack.unbind(0))

    def total(self) -> float:
        """The sum of all norms: not a number exactly if an update holds NaN."""
        sums: list[Tensor] = []
        for _, norms in self.found:
            sums += (norms.sum(),) if isinstance(norms, Tensor) else norms
        return _total(sums)

    def bad(self) -> set[str]:
        """The names of the updates whose norm is not a number."""
        return {name for names, norms in self.found for name, norm in zip(names, norms, strict=True) if norm.isnan()}


def are_numbers(updates: Iterable[Tensor | None]) -> bool:
    """Whether no update holds NaN; sparse ones are let pass."""
    dense = [g for g in updates if g is not None and not g.is_sparse]
    if len(dense) <= SO_FEW and all(map(_IS_CPU, dense)):
        return not math.isnan(sum(map(Tensor.item, map(_norm, dense))))
    return _all_finite([g.data for g in dense]) or not math.isnan(_total(torch._foreach_norm(dense)))


def told_numbers(places: Sequence[int], updates: Sequence[Any]) -> bool:
    """The same, where the updates at `places`, all dense, tell of all."""
    if not 0 < len(places) <= SO_FEW or not updates[places[0]].is_cpu:
        return are_numbers([updates[i] for i in places])
    total = 0.0
    for i in places:
        total += _norm(updates[i]).item()
    return total == total


def _all_finite(updates: list[Tensor]) -> bool:
    """Whether a quick look finds neither NaN nor infinity; False where it can't look.

    What gradient scalers look with: it multiplies by 1, in place (so pass `data`, of which autograd takes no notice),
    in less time than norms take. On a GPU nothing would be gained: it waits for the device, as the norms do.
    """
    global _found
    if not updates[0].is_cpu:
        return False
    found = _found  # another thread may take the same: what either finds, both do
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(updates, found, _ONE)
    except RuntimeError:  # a dtype, a device or a kind of tensor that it does not take
        return False
    if not found.item():
        return True
    _found = torch.zeros_like(_ONE)
    return False


_ONE = torch.ones((), dtype=torch.float32, device="cpu")
_found = torch.zeros_like(_ONE)
"""0 as long as no look has found anything; then a new one takes its place."""


_IS_CPU, _IS_CUDA = operator.attrgetter("is_cpu"), operator.attrgetter("is_cuda")
_norm: Callable[[Tensor], Tensor] = torch.linalg.vector_norm


def _total(norms: Sequence[Tensor]) -> float:
    if len(norms) <= FEW and not any(map(_IS_CUDA, norms)):
        return sum(map(Tensor.item, norms))
    return float(torch.stack(_on_one_device(norms)).sum())


def _on_one_device(norms: Sequence[Tensor]) -> list[Tensor]:
    """Those of a model on several devices, brought to the first one's."""
    return list(norms) if len({norm.device for norm in norms}) == 1 else [norm.to(norms[0].device) for norm in norms]
