"""Fitted feedback maps: E by ridge regression from errors of the source to true gradients at the target.

On a calibration step the true gradients are at hand. For each value, the errors of all sources that reach it are laid
out as rows X (positions x features), its gradient as rows G (positions x target features), and

    S <- f S + X^T X / rows,   T <- f T + X^T G / rows,   E^T = (S + r mean(diag S) I)^-1 T

with f the forgetting factor and r the ridge. All three are buffers beside the feedback maps. X and G are divided by
the RMS of X first, so that E does not depend on the scale of the loss, and every calibration counts alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graphlocal import autocast as amp
from graphlocal.feedback import Layout, layout, weight_names
from graphlocal.ir import Connection, LocalGraph

STEPS = "calibration_steps"
"""The buffer that counts training steps."""


@dataclass(frozen=True)
class WindowLayout:
    """E as a convolution: it reads a window around each position of the target, and the mean over all positions.

    window: its sizes, one or two, all odd. Both ends are batch x features x positions (one or two axes). A source of
    half the target's positions lies on every other one of them; other unlike sizes are interpolated or averaged.
    pooled: E reads the position and the mean of the window around it (zero beyond the edge), not each of the window's
    positions by itself. local: E does not read the mean over all positions, and a source that lies on every other
    position says nothing of those that its windows miss.
    E: target features x (source features * taps [+ source features]), with taps the window's size, or 2 if pooled.
    """

    window: tuple[int, ...]
    pooled: bool = False
    local: bool = False

    def apply(self, factors: Sequence[Tensor], error: Tensor, target: Tensor) -> Tensor:
        """E e, in the shape and dtype of `target`."""
        (matrix,) = factors
        error = error.to(matrix.dtype)
        if error.dim() == 3:
            error = error.unsqueeze(2)
        size = target.shape[2:] if target.dim() == 4 else (1, *target.shape[2:])
        features = error.shape[1]
        taps = features * taps_of(self.window, self.pooled)
        if self.pooled:
            placed = self._placed(error, size)
            here, around = matrix[:, :taps, None, None].split(features, 1)
            message = F.conv2d(placed, here) + F.conv2d(self._means(placed), around)
        else:
            message = self._convolved(error, matrix[:, :taps].unflatten(1, (features, *self._kernel)), size)
        if not self.local:
            message = message + F.linear(self._mean(error, size), matrix[:, taps:])[:, :, None, None]
        return message.reshape(target.shape).to(target.dtype)

    def rows(self, error: Tensor, target: Tensor, stride: int = 1) -> Tensor:
        """What E reads at every `stride`-th position of `target`: positions x columns of E."""
        if error.dim() == 3:
            error, target = error.unsqueeze(2), target.unsqueeze(2)
        placed = self._placed(error, target.shape[2:])
        high, wide = placed.shape[2:]
        at = torch.arange(0, len(placed) * high * wide, stride, device=error.device)
        sample, row, column = at // (high * wide), at // wide % high, at % wide
        if self.pooled:
            read = [value.movedim(1, -1)[sample, row, column] for value in (placed, self._means(placed))]
        else:
            (up, left), (tall, broad) = self._padding, self._kernel
            padded = F.pad(placed, (left, left, up, up)).movedim(1, -1)
            around = [padded[sample, row + i, column + j] for i in range(tall) for j in range(broad)]
            read = [torch.stack(around, -1).flatten(1)]
        if not self.local:
            read.append(self._mean(error, placed.shape[2:])[sample])
        return torch.cat(read, 1)

    @property
    def _kernel(self) -> tuple[int, int]:
        return (1, *self.window) if len(self.window) == 1 else (self.window[0], self.window[1])

    @property
    def _padding(self) -> tuple[int, int]:
        high, wide = self._kernel
        return high // 2, wide // 2

    def _means(self, placed: Tensor) -> Tensor:
        """The mean of the window around each position; a depthwise convolution, which is the fastest way on a CPU."""
        features, size = placed.shape[1], math.prod(self._kernel)
        kernel = placed.new_full((features, 1, *self._kernel), 1 / size)
        return F.conv2d(placed, kernel, padding=self._padding, groups=features)

    def _strides(self, given: Sequence[int], size: Sequence[int]) -> tuple[int, int] | None:
        """By how many of the target's positions the source's lie apart; None where they do not lie on a grid."""
        strides = [1 if n == m else 2 for n, m in zip(given, size, strict=True)]
        covered = all(-(-m // s) == n for n, m, s in zip(given, size, strides, strict=True))
        reaches = self.local or all(k > s for k, s in zip(self._kernel, strides, strict=True) if s > 1)
        return (strides[0], strides[1]) if covered and reaches else None

    def _placed(self, error: Tensor, size: Sequence[int]) -> Tensor:
        """The error on the target's positions, batch x features x height x width."""
        given = error.shape[2:]
        if tuple(size) == tuple(given):
            return error
        strides = self._strides(given, size)
        if strides is not None:
            placed = error.new_zeros(*error.shape[:2], *size)
            placed[:, :, :: strides[0], :: strides[1]] = error
            return placed
        if any(n > m for n, m in zip(given, size, strict=True)):
            return F.adaptive_avg_pool2d(error, (size[0], size[1]))
        return F.interpolate(error, size=tuple(size))

    def _convolved(self, error: Tensor, kernel: Tensor, size: Sequence[int]) -> Tensor:
        """The convolution of the placed error; a transposed one of the error itself where that lies on a grid."""
        strides = self._strides(error.shape[2:], size)
        if strides is None or strides == (1, 1):
            return F.conv2d(self._placed(error, size), kernel, padding=self._padding)
        left_over = [
            m - ((n - 1) * s - 2 * p + k)
            for m, n, s, p, k in zip(size, error.shape[2:], strides, self._padding, self._kernel, strict=True)
        ]
        turned = kernel.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(error, turned, None, strides, self._padding, left_over)

    def _mean(self, error: Tensor, size: Sequence[int]) -> Tensor:
        """The mean of the placed error over all positions: batch x features."""
        mean = error.mean((2, 3))
        if self._strides(error.shape[2:], size) in (None, (1, 1)):
            return mean
        return mean * (math.prod(error.shape[2:]) / math.prod(size))


def taps_of(window: Sequence[int], pooled: bool) -> int:
    """How many numbers E reads of each source feature around a position."""
    return 2 if pooled else math.prod(window)


def feedback_map(graph: LocalGraph, connection: Connection) -> Layout | WindowLayout:
    """How a connection's E acts."""
    if not connection.window:
        return layout(graph, connection)
    return WindowLayout(connection.window, connection.pooled, connection.local)


def inputs_read(connection: Connection) -> int:
    """The columns of a fitted E: source features, times what it reads of each around a position."""
    if not connection.window:
        return connection.weight[-1]
    return connection.weight[-1] * (taps_of(connection.window, connection.pooled) + (not connection.local))


def fitted_groups(graph: LocalGraph) -> dict[str, tuple[Connection, ...]]:
    """The fitted connections that reach each value; those of one value are fitted together."""
    found: dict[str, list[Connection]] = {}
    for connection in graph.connections:
        if connection.fitted:
            found.setdefault(connection.value, []).append(connection)
    return {value: tuple(connections) for value, connections in found.items()}


def moment_names(value: str) -> tuple[str, str]:
    """The buffers S and T of a value."""
    return f"moments_{value}", f"cross_moments_{value}"


def fitted_buffers(graph: LocalGraph) -> dict[str, tuple[int, ...]]:
    """Name and shape of every buffer that calibration keeps: each E, and S and T of each value. All start at zero."""
    names = weight_names(graph)
    shapes: dict[str, tuple[int, ...]] = {}
    for value, connections in fitted_groups(graph).items():
        features = connections[0].weight[0]
        columns = [inputs_read(connection) for connection in connections]
        for connection, n in zip(connections, columns, strict=True):
            shapes[names[connection.name][0]] = features, n
        second, cross = moment_names(value)
        shapes[second], shapes[cross] = (sum(columns), sum(columns)), (sum(columns), features)
    return shapes


def refit(
    weights: Sequence[Tensor], second: Tensor, cross: Tensor, rows: Tensor, gradient: Tensor,
    forgetting: float, ridge: float,
) -> None:  # fmt: skip
    """Renew S (`second`), T (`cross`) and the weights E in place; left as they are if anything is not a number.

    rows: X, the sources side by side. gradient: G. All is computed in float32 at least, under autocast too.
    """
    with amp.off():
        _refit(weights, second, cross, rows, gradient, forgetting, ridge)


def _refit(
    weights: Sequence[Tensor], second: Tensor, cross: Tensor, rows: Tensor, gradient: Tensor,
    forgetting: float, ridge: float,
) -> None:  # fmt: skip
    dtype = torch.promote_types(second.dtype, torch.float32)
    rows, gradient = rows.to(dtype), gradient.to(dtype)
    largest = rows.abs().amax().clamp_min(torch.finfo(dtype).tiny)
    rows, gradient = rows / largest, gradient / largest
    scale = rows.square().mean().sqrt().clamp_min(torch.finfo(dtype).eps)
    rows, gradient = rows / scale, gradient / scale
    new_second = forgetting * second.to(dtype) + rows.T @ rows / len(rows)
    new_cross = forgetting * cross.to(dtype) + rows.T @ gradient / len(rows)
    mean = new_second.diagonal().mean()
    damped = new_second + (ridge * mean + torch.finfo(dtype).tiny) * torch.eye(
        len(second), dtype=dtype, device=second.device
    )
    factor, failed = torch.linalg.cholesky_ex(damped)
    solution = torch.cholesky_solve(new_cross, factor).T
    good = (failed == 0) & solution.isfinite().all() & new_second.isfinite().all() & new_cross.isfinite().all()
    second.copy_(torch.where(good, new_second, second))
    cross.copy_(torch.where(good, new_cross, cross))
    start = 0
    for weight in weights:
        part = solution[:, start : start + weight.shape[1]]
        weight.copy_(torch.where(good, part, weight))
        start += weight.shape[1]


def thinned(rows: int, positions: int, most: int) -> int:
    """The stride at which rows are taken so that no more than about `most` are; it has no factor with `positions`."""
    stride = max(1, -(-rows // most))
    while stride > 1 and math.gcd(stride, positions) > 1:
        stride += 1
    return stride
