"""Training loops for the command line and the demo: one model, local or by autograd, on one data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graphlocal.data import Dataset, batches
from graphlocal.recalibrate import ENOUGH, recalibrate
from graphlocal.runtime import LocalModule
from graphlocal.step import train_step

Step = Callable[[Tensor, Tensor], Tensor]


@dataclass
class History:
    """test_error: per cent, one for each epoch. seconds: of each epoch's training steps."""

    test_error: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def autograd_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """An ordinary training step by backpropagation, for comparison."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def step_for(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """The fused local step of a compiled model, autograd's of any other."""
    if isinstance(model, LocalModule):
        return train_step(model, cross_entropy, optimizer)
    return autograd_step(model, optimizer)


def train(
    model: nn.Module,
    step: Step,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    on_batch: Callable[[float], None] = lambda loss: None,
    before_test: Callable[[], None] = lambda: None,
) -> Iterator[History]:
    """Train epoch by epoch, yielding the growing history after each. before_test: called before each evaluation.

    The order of the data depends on the seed alone. Batches of one sample are left out: BatchNorm can't take them.
    """
    history = History()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        model.train()
        losses = []
        start = time.perf_counter()
        for x, y in batches(data.train_x, data.train_y, batch_size, generator):
            if len(x) > 1:
                losses.append(float(step(x, y)))
                on_batch(losses[-1])
        history.seconds.append(time.perf_counter() - start)
        history.loss.append(sum(losses) / max(1, len(losses)))
        before_test()
        history.test_error.append(error_rate(model, data))
        yield history


def error_rate(model: nn.Module, data: Dataset, batch_size: int = 500) -> float:
    """Test error in per cent, after recalibrating BatchNorm on training batches."""
    size = max(2, min(128, len(data.train_x) // ENOUGH))
    recalibrate(model, [x for x in data.train_x[: ENOUGH * size].split(size) if len(x) > 1])
    model.eval()
    wrong = 0
    with torch.no_grad():
        for x, y in zip(data.test_x.split(batch_size), data.test_y.split(batch_size), strict=True):
            wrong += int((model(x).argmax(1) != y).sum())
    return 100 * wrong / len(data.test_y)


def step_time_ratio(local: Step, backprop: Step, x: Tensor, y: Tensor, repetitions: int = 15) -> float:
    """Median time of a local step over that of a backprop step, run in turn."""
    times: dict[Step, list[float]] = {local: [], backprop: []}
    for i in range(repetitions + 3):
        for step, found in times.items():
            start = time.perf_counter()
            step(x, y)
            if i >= 3:
                found.append(time.perf_counter() - start)
    medians = [torch.tensor(found).median() for found in times.values()]
    return float(medians[0] / medians[1])
