"""Local Propagation (Marra et al., 2020): shallow and deep nets, constraint functions, beside backpropagation."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import torch
from tables import NOT_AT_HAND, command_line, interruptible, mean_std, mlp, write
from torch import nn
from torch.nn.functional import cross_entropy

import graphlocal
from graphlocal.data import Dataset, load
from graphlocal.rules import LP


@dataclass(frozen=True)
class Task:
    """A data set, a tanh net, and the settings under which LP trains it. bar: the least per cent correct."""

    data: str
    widths: tuple[int, ...]
    rules: tuple[tuple[LP, float | None], ...]
    lr: float
    epochs: int
    batch: int = 64
    train: int | None = None


SHALLOW = (LP(), LP(epsilon=0.01), LP(G="abs"), LP(G="abs", eta_lambda=0.01))
LOOSE = LP(rho=1.0, eta_x=0.3, eta_lambda=0.3)
"""Variables that move easily fit the labels by themselves, and drift from what a deep net computes."""
DEEP = (LP(), LP(inner_steps=4), LOOSE)
QUICK = (
    Task("digits", (64, 64, 64, 10), ((SHALLOW[0], 95.5), *((r, None) for r in SHALLOW[1:])), 1e-3, 60),
    Task("digits", (64, *[32] * 8, 10), tuple((r, None) for r in DEEP), 3e-4, 60),
    Task(
        "fashion-mnist", (784, 64, 64, 10), ((LP(), 78.5), (LP(G="abs", eta_lambda=0.01), None)), 3e-4, 30, train=5000
    ),
)
FULL = (
    *QUICK,
    Task("mnist", (784, 300, 10), tuple((r, None) for r in SHALLOW), 3e-4, 30),
    Task("mnist", (784, *[100] * 10, 10), tuple((r, None) for r in DEEP), 3e-4, 30),
    Task("fashion-mnist", (784, 300, 10), ((LP(), None),), 3e-4, 30),
)


def correct(task: Task, data: Dataset, start: nn.Module, rule: LP | None, seed: int) -> float:
    """Per cent of the test set that is classified right after training from `start`."""
    model = copy.deepcopy(start)
    trained: nn.Module = model
    step = None
    if rule is not None:
        trained = local = graphlocal.compile(model, example_inputs=(data.train_x[:8],), rule=rule, partition="leaf")
        optimizer = torch.optim.Adam(local.parameters(), task.lr)
        step = graphlocal.train_step(local, cross_entropy, optimizer)
    else:
        optimizer = torch.optim.Adam(model.parameters(), task.lr)
    order = torch.Generator().manual_seed(seed)
    for _ in range(task.epochs):
        trained.train()
        for index in torch.randperm(len(data.train_x), generator=order).split(task.batch):
            x, y = data.train_x[index], data.train_y[index]
            if step is not None:
                step(x, y, index=index)
            else:
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
    trained.eval()
    with torch.no_grad():
        return 100 * (trained(data.test_x).argmax(1) == data.test_y).double().mean().item()


def main() -> None:
    arguments = command_line(__doc__)
    torch.set_num_threads(1)
    rows, missed = [], []
    for task in QUICK if arguments.quick else FULL:
        data = load(task.data, arguments.data_dir, train=task.train)
        runs: dict[LP | None, list[float]] = {rule: [] for rule in (None, *(rule for rule, _ in task.rules))}
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            start = mlp(task.widths)
            for rule, found in runs.items():
                found.append(correct(task, data, start, rule, seed))
                print(f"{task.data} {task.widths} seed {seed} {rule}: {found[-1]:.2f} %", file=sys.stderr)
        for rule, bar in task.rules:
            shape = f"{task.widths[0]}-{len(task.widths) - 2}x{task.widths[1]}-{task.widths[-1]}"
            size = f"{task.data}, {len(data.train_x):,} samples, {task.epochs} epochs"
            here = mean_std(runs[rule]) + ("" if bar is None else f" (bar: {bar})")
            rows.append([size, shape, str(rule), NOT_AT_HAND, here, mean_std(runs[None])])
            if bar is not None and sum(runs[rule]) / len(runs[rule]) < bar:
                missed.append(f"{rule} on {task.data}")
    name = "lp-quick" if arguments.quick else "lp"
    command = "python examples/reproduce/lp.py" + (" --quick" if arguments.quick else "")
    notes = (
        f"Per cent of the test set classified right, mean ± standard deviation of {arguments.seeds} seeds; tanh, "
        "Adam 1e-3 on the digits (deep nets and other data 3e-4), batches of 64, the same start and batches for "
        "backpropagation. " + (f"Missed: {'; '.join(missed)}." if missed else "All bars are met.")
    )
    header = ["data", "net", "rule", "paper", "here", "backprop here"]
    print(write(name, "Local Propagation", command, header, rows, notes))
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    with interruptible():
        main()
