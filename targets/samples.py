"""Where the samples lie in a model's inputs and values, found by changing one of them.

A **sample axis** of a value counts outer x samples x inner entries: a batch into which heads or windows were folded
(inner), or that was folded into positions (outer). That changing a sample changes no other's entries is what makes
values the samples' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from graphlocal.errors import GuardFailure, InputError
from graphlocal.targets.nodes import Nodes


@dataclass(frozen=True)
class SampleAxes:
    """The sample axis of each input and value.

    inputs: for each flat input, its sample axis (None if the batch shares it) and its other sizes. values: for each
    value, its sample axis and its shape for one sample, with outer and inner in the place of that axis. dtype: wide
    enough for all values, and for small steps of them.
    """

    inputs: tuple[tuple[int | None, tuple[int, ...]], ...]
    values: dict[str, tuple[int, tuple[int, ...]]]
    dtype: torch.dtype
    device: torch.device

    def size(self, value: str) -> int:
        """Numbers a sample."""
        return prod(self.values[value][1])

    def rows(self, value: str, tensor: Tensor) -> Tensor:
        """A value as samples x numbers."""
        axis, shape = self.values[value]
        outer, inner = shape[axis : axis + 2]
        samples = tensor.shape[axis] // (outer * inner)
        split: Tensor = tensor.unflatten(axis, (outer, samples, inner))
        return split.movedim(axis + 1, 0).reshape(samples, -1)

    def values_of(self, value: str, rows: Tensor) -> Tensor:
        """Samples x numbers as the value; the reverse of `rows`."""
        axis, shape = self.values[value]
        return rows.reshape(len(rows), *shape).movedim(0, axis + 1).flatten(axis, axis + 2)

    def require_batch(self, leaves: Sequence[Any], samples: int) -> None:
        """Raise InputError unless the inputs hold so many samples, each as large as at the first step."""
        for leaf, (axis, sizes) in zip(leaves, self.inputs, strict=True):
            if not isinstance(leaf, Tensor):
                continue
            if axis is not None and leaf.shape[axis] != samples:
                raise InputError(
                    f"index numbers {samples} samples, but an input of shape {list(leaf.shape)} holds "
                    f"{leaf.shape[axis]} along axis {axis}",
                    remedy="pass one number for each sample of the batch",
                )
            if _others(leaf, axis) != sizes:
                raise InputError(
                    f"an input has the shape {list(leaf.shape)}, and its samples had {list(sizes)} numbers at first",
                    why="the variables of a sample keep their size",
                    remedy="pad all samples to one size",
                )


def find_sample_axes(nodes: Nodes, leaves: Sequence[Any], samples: int, values: Sequence[str]) -> SampleAxes:
    """Find the sample axes on a batch of 2 or more samples.

    Raises InputError if no input has an axis of that size, or a value's entries depend on several samples.
    """
    axes = [_axis_of_size(leaf, samples) for leaf in leaves]
    if all(axis is None for axis in axes):
        shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor))
        raise InputError(
            f"index numbers {samples} samples, but no input has an axis of that size",
            why=f"the inputs have the shapes {shapes}",
            remedy="pass one number for each sample of the batch",
        )
    if samples < 2:
        raise InputError(
            "the first batch holds one sample",
            why="which axis of a value counts the samples shows only where there are two",
            remedy="start with a batch of 2 or more",
        )
    true = nodes.forward(leaves)
    other = dict(true)
    with suppress(GuardFailure):  # the changed sample may take another path
        other = nodes.forward([_last_for_first(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True)])
    found = {value: _sample_axis(nodes, value, true[value], other[value], samples) for value in values}
    dtype = torch.float32
    for value in values:
        dtype = torch.promote_types(dtype, true[value].dtype)
    device = true[values[0]].device if values else torch.device("cpu")
    return SampleAxes(
        tuple((axis, _others(leaf, axis)) for leaf, axis in zip(leaves, axes, strict=True)), found, dtype, device
    )


def _axis_of_size(leaf: Any, samples: int) -> int | None:
    if not isinstance(leaf, Tensor):
        return None
    return next((axis for axis, size in enumerate(leaf.shape) if size == samples), None)


def _others(leaf: Any, axis: int | None) -> tuple[int, ...]:
    shape = leaf.shape if isinstance(leaf, Tensor) else ()
    return tuple(size for i, size in enumerate(shape) if i != axis)


def _last_for_first(leaf: Any, axis: int | None) -> Any:
    """The input with its last sample in the place of its first."""
    if axis is None:
        return leaf
    return torch.cat([leaf.narrow(axis, leaf.shape[axis] - 1, 1), leaf.narrow(axis, 1, leaf.shape[axis] - 1)], axis)


def _sample_axis(nodes: Nodes, value: str, true: Tensor, other: Tensor, samples: int) -> tuple[int, tuple[int, ...]]:
    """The first axis along which only the first sample's entries have changed, and the shape of one sample."""
    changed = ~torch.isclose(true, other, rtol=1e-4, atol=1e-6, equal_nan=True)
    multiples = [axis for axis, size in enumerate(true.shape) if size and size % samples == 0]
    for axis in sorted(multiples, key=lambda axis: true.shape[axis] != samples):
        k = true.shape[axis] // samples
        for outer in (n for n in range(1, k + 1) if k % n == 0):
            split = changed.unflatten(axis, (outer, samples, k // outer))
            if not bool(split.narrow(axis + 1, 1, samples - 1).any()):
                return axis, (*true.shape[:axis], outer, k // outer, *true.shape[axis + 1 :])
    op = nodes.graph.operation[value]
    raise InputError(
        f"the rule keeps variables for each sample, but the value {value!r} of shape {list(true.shape)} mixes samples",
        where=", ".join(part for part in (op.module, op.source) if part),
        why="changing the first sample of the batch changed more than its own entries along every axis",
        remedy="take out what reads several samples at once (batch statistics, attention or messages between samples)",
    )
