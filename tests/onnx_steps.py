"""Helpers of the tests of exported training steps: optimizers, batches, one step in torch and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphlocal
import zoo
from graphlocal.targets.onnx.trainer import OnnxTrainer

Batches = Callable[[int, int], tuple[Any, Tensor]]


def sgd(local: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(local.parameters(), 0.02, momentum=0.9)


def slow_sgd(local: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(local.parameters(), 0.001, momentum=0.9)


def adam(local: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(local.parameters(), 1e-3)


# Batches with something to learn: number of the step, size -> inputs, labels.


def of_vectors(*shape: int) -> Batches:
    """Labels: the largest of some fixed sums of the entries."""

    def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
        x = zoo.normal(size, *shape, seed=step)
        return x, (x.flatten(1) @ zoo.normal(x[0].numel(), zoo.CLASSES, seed=99)).argmax(1)

    return batch


def of_tokens(step: int, size: int) -> tuple[Tensor, Tensor]:
    """A sequence that counts upwards from a random token; the labels are the sequence."""
    x = (zoo.tokens(size, 1, seed=step) + torch.arange(5)) % zoo.VOCABULARY
    return x, x


def of_two_sentences(step: int, size: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    first, second = zoo.tokens(size, 5, seed=step), zoo.tokens(size, 7, seed=step + 1000)
    return (first, second), first[:, 0] % zoo.CLASSES


def of_pictures(step: int, size: int) -> tuple[Tensor, Tensor]:
    """Labels: as many pictures as the U-Net gives, the mean of the input's."""
    x = zoo.normal(size, 2, 8, 8, seed=step)
    return x, x.mean(1, keepdim=True).expand(-1, zoo.CLASSES, -1, -1).contiguous()


def next_token(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output[:, :-1].flatten(0, 1), y[:, 1:].flatten())


def pair(
    make: Callable[[], nn.Module], rule: Any, optimizer: Callable[[nn.Module], torch.optim.Optimizer], batches: Batches,
    path: Path, loss: Any = F.cross_entropy,
) -> tuple[Any, OnnxTrainer, graphlocal.LocalModule]:  # fmt: skip
    """The same step twice: torch's eager one, and the exported one."""
    x, y = batches(0, 3)
    inputs = x if isinstance(x, tuple) else (x,)
    torch.manual_seed(0)
    exported = graphlocal.compile(make(), example_inputs=inputs, rule=rule, target="eager")
    torch.manual_seed(0)
    local = graphlocal.compile(make(), example_inputs=inputs, rule=rule, target="eager")
    local.load_state_dict(exported.state_dict())
    exported.export(path, kind="training-step", loss_fn=loss, optimizer=optimizer(exported), y=y)
    return graphlocal.train_step(local, loss, optimizer(local)), OnnxTrainer(path, threads=1), local


def distance(step: Any, trainer: OnnxTrainer, batches: Batches, steps: int, size: int) -> tuple[float, float]:
    """The largest difference of a loss, and the fall of the loss from the first ten steps to the last ten."""
    losses, largest = [], 0.0
    for i in range(steps):
        x, y = batches(i, size)
        losses.append(float(step(x, y)))
        largest = max(largest, abs(losses[-1] - trainer.step(x, y)))
    return largest, sum(losses[:10]) - sum(losses[-10:])
