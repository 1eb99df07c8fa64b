"""How far BatchNorm's running statistics trail those of the batches, watched while a model trains.

Running statistics are averages over earlier steps, so that under fast updates a model evaluates worse than it is.
Every tenth step the batch's own statistics are found from the change that the step makes to the running ones:
running' = (1 - momentum) running + momentum batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphlocal.capture import is_capturing

EVERY = 10
ENOUGH = 3
MEAN_LIMIT = 0.5
"""Standard deviations, root mean square over a layer's channels."""
VARIANCE_LIMIT = 1.1
"""Natural logarithm of the ratio of variances, mean over a layer's channels: about a factor of 3."""
_MEMORY = 0.5


class StatisticsLag:
    """Watches the BatchNorm layers of `model` that are in training mode and average exponentially."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.look()
        self.reset()

    def look(self) -> None:
        """See whether the model has BatchNorm layers; to be called after its layers have changed."""
        self.present = any(isinstance(module, _BatchNorm) for module in self.model.modules())

    def reset(self) -> None:
        """Forget what was seen."""
        self.steps = self.samples = 0
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def due(self) -> bool:
        """Whether this training step is to be watched; counts it. A CUDA graph is not to hold the watching."""
        self.steps += 1
        return self.present and self.steps % EVERY == 0 and not is_capturing()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put around the forward pass of a training step that is to be watched."""
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, _BatchNorm) and _averages(m)}
        before = {name: _statistics(layer) for name, layer in layers.items()}
        yield
        for name, layer in layers.items():
            self._compare(name, before[name], _statistics(layer), float(layer.momentum or 0))
        self.samples += 1

    def _compare(self, name: str, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], momentum: float) -> None:
        tiny = torch.finfo(before[0].dtype).tiny
        mean, variance = ((new - (1 - momentum) * old) / momentum for old, new in zip(before, after, strict=True))
        deviation = (mean - before[0]) * before[1].clamp_min(tiny).rsqrt()
        ratio = variance.clamp_min(tiny).log() - before[1].clamp_min(tiny).log()
        known = self.seen.get(name, (deviation, ratio))
        self.seen[name] = (known[0].lerp(deviation, _MEMORY), known[1].lerp(ratio, _MEMORY))

    def worst(self) -> tuple[str, float, float] | None:
        """The layer that trails most, if any does: by how many standard deviations, and by what factor of variance."""
        if self.samples < ENOUGH:
            return None
        found = [(name, float(d.square().mean().sqrt()), float(r.mean())) for name, (d, r) in self.seen.items()]
        late = [row for row in found if row[1] > MEAN_LIMIT or abs(row[2]) > VARIANCE_LIMIT]
        if not late:
            return None
        name, deviation, ratio = max(late, key=lambda row: max(row[1] / MEAN_LIMIT, abs(row[2]) / VARIANCE_LIMIT))
        return name, deviation, float(torch.tensor(ratio).exp())


def _averages(layer: _BatchNorm) -> bool:
    return layer.training and layer.running_mean is not None and bool(layer.momentum)


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.clone(), layer.running_var.clone()
