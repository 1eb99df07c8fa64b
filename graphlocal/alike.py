"""Whether two ways to compute a tensor give the same numbers but for rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""The most by which a lowered step may differ from the eager one, relative to the largest entry; else 0.05."""


def largest_number(updates: Sequence[Any]) -> float:
    """The largest finite number in updates."""
    dense = [u for u in updates if isinstance(u, Tensor) and u.numel() and not u.is_sparse]
    return max((float(u.nan_to_num(0.0, 0.0, 0.0).abs().max()) for u in dense), default=0.0)


def alike(expected: Any, found: Any, short: set[torch.dtype], largest: float) -> bool:
    """Whether two tensors are equal within `TOLERANCE`.

    short: the dtypes of autocast, which counts as if all had them. In short dtypes, an update may also differ by what
    the `largest` one rounds by: it may be a sum of numbers that cancel.
    """
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return (expected is None) == (found is None)
    if expected.shape != found.shape or expected.dtype != found.dtype or expected.layout != found.layout:
        return False
    if expected.layout is not torch.strided:
        expected, found = expected.to_dense(), found.to_dense()
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(expected, found)
    if not bool(expected.isfinite().all()):
        return torch.equal(expected.isfinite(), found.isfinite())
    short = short or {expected.dtype} - TOLERANCE.keys()
    scale = (0.05 if short else TOLERANCE[expected.dtype]) * float(expected.abs().max())
    if short:
        scale += max(torch.finfo(dtype).eps for dtype in short) * largest
    return float((expected - found).abs().max()) <= scale
