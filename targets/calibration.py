"""The pieces of a training graph that fitted feedback maps need: errors taken to the pre-activation, and the fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from graphlocal.feedback import Layout, target_rows
from graphlocal.fitting import WindowLayout, refit, thinned
from graphlocal.rules import Calibration
from graphlocal.targets.halting import Error, whole


class AtPreactivation(nn.Module):
    """The error of a representation times phi'(h): the error of its pre-activation. None where there is none."""

    def __init__(self, phi: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.phi = phi

    def forward(self, h: Tensor, error: Error) -> Tensor | None:
        error = whole(error, h)
        if error is None:
            return None
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            return torch.autograd.grad(self.phi(h), h, error)[0]


class Fit(nn.Module):
    """One calibration of all maps that end at a value.

    forward(gradient, S, T, *errors of the sources, *their maps E) changes S, T and the maps in place. An error that is
    None counts as zero.
    """

    def __init__(self, calibration: Calibration, maps: Sequence[Layout | WindowLayout], axis: int) -> None:
        super().__init__()
        self.calibration, self.maps, self.axis = calibration, tuple(maps), axis

    def forward(self, gradient: Tensor | None, second: Tensor, cross: Tensor, *values: Tensor | None) -> None:
        errors, weights = values[: len(self.maps)], values[len(self.maps) :]
        if gradient is None or all(error is None for error in errors):
            return
        with torch.no_grad():
            wanted = target_rows(gradient, self.axis)
            stride = thinned(len(wanted), max(1, len(wanted) // len(gradient)), self.calibration.rows)
            parts = [
                wanted.new_zeros(len(wanted), 1).expand(-1, weight.shape[1])[::stride]
                if error is None
                else map_.rows(error, gradient, stride)
                for map_, error, weight in zip(self.maps, errors, weights, strict=True)
                if weight is not None
            ]
            kept = [weight for weight in weights if weight is not None]
            refit(kept, second, cross, torch.cat(parts, 1), wanted[::stride],
                  self.calibration.forgetting, self.calibration.ridge)  # fmt: skip
