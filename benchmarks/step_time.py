"""Time of a training step against eager backpropagation, in the same process and in turn.

Every round times each way once, so that a noisy machine slows all alike; the ratio is taken within the round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import graphlocal
from benchmarks import report
from graphlocal.demo import SmallResNet

Step = Callable[[], object]
loss_fn = nn.functional.cross_entropy


@dataclass(frozen=True)
class Case:
    """A model, its inputs' shape without the batch, and the partitions to measure."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    classes: int = 10


def mlp(width: int, depth: int, inputs: int) -> nn.Module:
    """`depth` hidden layers of tanh units."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(inputs if i == 0 else width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Encoder(nn.Module):
    """A transformer encoder over 64 tokens, with a class head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(192, 3, 768, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


CASES = (
    Case("MLP 64-128-128-10", lambda: mlp(128, 2, 64), (64,), 32),
    Case("MLP 64×128 (deep, thin)", lambda: mlp(128, 64, 64), (64,), 32),
    Case("MLP 8×1024", lambda: mlp(1024, 8, 784), (784,), 128),
    Case("small ResNet on 8×8", SmallResNet, (1, 8, 8), 32),
    Case("small ResNet on 8×8", SmallResNet, (1, 8, 8), 256),
    Case("transformer encoder 6×192, 64 tokens", Encoder, (64, 192), 16),
)


def loop(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """An ordinary training loop's step: backpropagation, or local updates by the drop-in path."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def step() -> None:
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ways(case: Case) -> dict[str, Step]:
    """The same training step by backpropagation and by local updates, each on a model of its own."""
    torch.manual_seed(0)
    start = case.make()
    x, y = torch.randn(case.batch, *case.shape), torch.randint(case.classes, (case.batch,))

    def fused(local: graphlocal.LocalModule) -> Step:
        step = graphlocal.train_step(local, loss_fn, torch.optim.Adam(local.parameters(), 1e-4))
        return lambda: step(x, y)

    def compiled(partition: str) -> graphlocal.LocalModule:
        return graphlocal.compile(copy.deepcopy(start), example_inputs=(x,), rule="rec-lra", partition=partition)

    return {
        "backprop": loop(copy.deepcopy(start), x, y),
        "rec-lra": loop(compiled("auto"), x, y),
        "rec-lra, fused": fused(compiled("auto")),
        "rec-lra leaf, fused": fused(compiled("leaf")),
    }


def measure(case: Case, rounds: int) -> list[str]:
    """A row of the table: milliseconds of backprop, and the ratio of each other way with its spread."""
    times = report.in_turn(ways(case), rounds)
    row = [case.title, str(case.batch), f"{1000 * statistics.median(times['backprop']):.2f}"]
    row += [report.ratio(found, times["backprop"]) for name, found in times.items() if name != "backprop"]
    print(" | ".join(row), file=sys.stderr)
    return row


def main() -> None:
    """Measure all cases and write benchmarks/results/step_time.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(case, arguments.rounds) for case in CASES]
    header = ["model", "batch", "backprop, ms", "rec-lra", "rec-lra, fused", "rec-lra leaf, fused"]
    notes = "Ratios to eager backprop with the same Adam: median and quartiles over rounds. Below 1 is faster."
    report.write("step_time", "Step time", "python -m benchmarks.step_time", [report.table(header, rows)], notes)


if __name__ == "__main__":
    main()
