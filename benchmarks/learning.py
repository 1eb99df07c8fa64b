"""How well local rules learn: Fashion-MNIST and digits, beside backpropagation, with the project's bars.

Inputs are pixels in [0, 1]; layers have PyTorch's default initialization; every run has its own seed, and all
rules of a seed start from the same weights and see the same batches. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
from dataclasses import dataclass

import torch
from torch import nn

import graphlocal
from benchmarks import report
from graphlocal.data import Dataset, load
from graphlocal.nn import Signum
from graphlocal.rules import (
    DirectFeedbackAlignment,
    FeedbackAlignment,
    KolenPollack,
    LRAFeedback,
    RecLRA,
    Rule,
    SignSymmetric,
)
from graphlocal.training import step_for, train


@dataclass(frozen=True)
class Task:
    """A data set, a net of equal hidden layers, and how it is trained."""

    title: str
    data: str
    widths: tuple[int, ...]
    activation: type[nn.Module]
    lr: float
    epochs: int
    rules: tuple[tuple[str, Rule | None, float | None], ...]
    """(name, rule or None for autograd, the bar on its test error in per cent)"""
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    batch: int = 32
    sigma: float | None = None
    """Standard deviation of all initial weights; None is PyTorch's default."""
    within: float | None = None
    """The most by which a rule with a bar may be worse than backpropagation, in points."""


TASKS = (
    Task(
        "Fashion-MNIST, 784-256-256-256-10 tanh, Adam 2e-4, batch 32, 3 epochs",
        "fashion-mnist", (784, 256, 256, 256, 10), nn.Tanh, 2e-4, 3,
        (("backprop", None, None), ("rec-lra", RecLRA(), 16.5),
         ("rec-lra, E learned (kp)", RecLRA(error_weights="kp"), None),
         ("rec-lra with phi'", RecLRA(derivative=True), None)),
        within=2.5,
    ),
    Task(
        "Fashion-MNIST, 784-8x128-10 tanh, weights N(0, 0.025), SGD 0.01, batch 50, 3 epochs",
        "fashion-mnist", (784, *[128] * 8, 10), nn.Tanh, 0.01, 3,
        (("backprop", None, None), ("lra-fdbk", LRAFeedback(), None), ("rec-lra", RecLRA(), None)),
        torch.optim.SGD, 50, 0.025,
    ),
    Task(
        "digits, 64-128-128-10 tanh, Adam 1e-3, batch 32, 20 epochs",
        "digits", (64, 128, 128, 10), nn.Tanh, 1e-3, 20,
        (("backprop", None, None), ("rec-lra", RecLRA(), 7.0), ("fa", FeedbackAlignment(), None),
         ("dfa", DirectFeedbackAlignment(), None), ("kolen-pollack", KolenPollack(), None),
         ("sign-symmetric", SignSymmetric(), None)),
    ),
    Task(
        "digits, 64-128-128-10 with sign units, Adam 1e-3, batch 32, 20 epochs",
        "digits", (64, 128, 128, 10), Signum, 1e-3, 20,
        (("backprop", None, None), ("rec-lra", RecLRA(), 9.0)),
    ),
)  # fmt: skip


def network(widths: tuple[int, ...], activation: type[nn.Module], sigma: float | None) -> nn.Module:
    """Linear layers with an activation after each but the last."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(before, after), *([activation()] if i < len(widths) - 2 else [])]
    model = nn.Sequential(*layers)
    for parameter in model.parameters() if sigma else ():
        nn.init.normal_(parameter, std=sigma if parameter.dim() > 1 else 0.0)
    return model


def run(task: Task, data: Dataset, seed: int) -> dict[str, float]:
    """Test error in per cent of each rule."""
    torch.manual_seed(seed)
    start = network(task.widths, task.activation, task.sigma)
    errors = {}
    for name, rule, _ in task.rules:
        model = copy.deepcopy(start)
        if rule is not None:
            model = graphlocal.compile(model, example_inputs=(data.train_x[:8],), rule=rule)
        step = step_for(model, task.optimizer(model.parameters(), task.lr))
        for history in train(model, step, data, epochs=task.epochs, batch_size=task.batch, seed=seed):
            errors[name] = history.test_error[-1]
            print(f"{task.data} seed {seed} {name}: {errors[name]:.2f} %", file=sys.stderr)
    return errors


def main() -> None:
    """Run all tasks and write benchmarks/results/learning.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="where Fashion-MNIST lies (FashionMNIST/raw/*.gz)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the digits alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables, missed = [], []
    for task in TASKS:
        if arguments.quick and task.data != "digits":
            continue
        data = load(task.data, arguments.data_dir)
        runs = [run(task, data, seed) for seed in range(arguments.seeds)]
        mean = {name: statistics.mean(r[name] for r in runs) for name, _, _ in task.rules}
        rows = []
        for name, _, bar in task.rules:
            limit = None if bar is None else min(bar, mean["backprop"] + task.within if task.within else bar)
            if limit is not None and mean[name] > limit:
                missed.append(f"{task.title}: {name} {mean[name]:.2f} > {limit:.2f}")
            each = ", ".join(f"{r[name]:.2f}" for r in runs)
            rows.append([name, f"{mean[name]:.2f}", each, "" if limit is None else f"≤ {limit:.2f}"])
        tables.append(f"## {task.title}\n\n" + report.table(["rule", "test error %", "seeds", "bar"], rows))
    command = "python -m benchmarks.learning" + (" --quick" if arguments.quick else "")
    name = "learning-quick" if arguments.quick else "learning"
    report.write(name, "Learning", command, tables, "Missed: " + "; ".join(missed) if missed else "All bars are met.")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
