"""`graphlocal demo`: a residual net and an MLP on the digits, local learning beside backpropagation."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graphlocal.alignment import Alignment, alignment
from graphlocal.compile import compile
from graphlocal.data import Dataset, load
from graphlocal.passes.policies import Policy
from graphlocal.rules import RecLRA, Rule
from graphlocal.runtime import LocalModule
from graphlocal.training import History, step_for, step_time_ratio, train


class ResidualBlock(nn.Module):
    """x -> relu(x + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """x: batch x width x height x width."""
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(inner)))


class SmallResNet(nn.Module):
    """A stem, two residual blocks and a linear classifier, for 8 x 8 images."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(ResidualBlock(width), ResidualBlock(width))
        self.head = nn.Linear(width * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x: batch x 1 x 8 x 8; returns logits, batch x 10."""
        x = self.blocks(self.stem(x))
        logits: Tensor = self.head(nn.functional.avg_pool2d(x, 2).flatten(1))
        return logits


def digits_mlp() -> nn.Module:
    """64-128-128-10 with tanh."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
    )


@dataclass(frozen=True)
class Trial:
    """One model of the demo and how it is trained; both ways use the same settings."""

    title: str
    make: Callable[[], nn.Module]
    rule: Rule
    partition: Policy
    lr: float
    epochs: int


TRIALS = (
    Trial("MLP 64-128-128-10", digits_mlp, RecLRA(), "auto", 1e-3, 20),
    Trial("small ResNet", SmallResNet, RecLRA(), "auto", 1e-3, 10),
)
BATCH_SIZE = 32


@dataclass(frozen=True)
class Result:
    """What one trial gave. ratio: time of a local step over a backprop step, medians of the same run."""

    trial: Trial
    local: LocalModule
    histories: dict[str, History]
    ratio: float
    angles: Alignment


def run(out: Path, console: Console, seed: int = 0, epochs: int | None = None) -> list[Result]:
    """Run all trials, print their tables, and write the learning curves to `out`/learning-curves.png."""
    data = load("digits")
    results = []
    for trial in TRIALS:
        result = _run_trial(trial, data, console, seed, epochs or trial.epochs)
        results.append(result)
        console.rule(f"[bold]{trial.title}")
        console.print(str(result.local.graph), highlight=False, markup=False)
        console.print(_table(result))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "learning-curves.png"
    draw(results, path)
    console.print(f"learning curves: {path}")
    return results


def _run_trial(trial: Trial, data: Dataset, console: Console, seed: int, epochs: int) -> Result:
    torch.manual_seed(seed)
    model = trial.make()
    models = {"backprop": copy.deepcopy(model)}
    local = compile(model, example_inputs=(data.train_x[:8],), rule=trial.rule, partition=trial.partition)
    models[trial.rule.name] = local
    steps = {name: step_for(one, torch.optim.Adam(one.parameters(), trial.lr)) for name, one in models.items()}
    histories: dict[str, History] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name, one in models.items():
            task = progress.add_task(f"{trial.title}: {name}", total=epochs, note="")
            for history in train(one, steps[name], data, epochs=epochs, batch_size=BATCH_SIZE, seed=seed):
                progress.update(task, advance=1, note=f"test error {history.test_error[-1]:.1f} %")
                histories[name] = history
    x, y = data.train_x[:BATCH_SIZE], data.train_y[:BATCH_SIZE]
    for one in models.values():
        one.train()
    angles = alignment(local, (data.train_x[:256],), lambda output: cross_entropy(output, data.train_y[:256]))
    ratio = step_time_ratio(steps[trial.rule.name], steps["backprop"], x, y, repetitions=30)
    return Result(trial, local, histories, ratio, angles)


def _table(result: Result) -> Table:
    trial = result.trial
    table = Table(
        title=f"{trial.title}, Adam {trial.lr:g}, batch {BATCH_SIZE}, partition {trial.partition!r}, {trial.rule}"
    )
    table.add_column("")
    table.add_column("test accuracy", justify="right")
    table.add_column("step time", justify="right")
    table.add_column("angle to the true gradient, by subgraph")
    for name, history in result.histories.items():
        is_local = name == trial.rule.name
        angles = ", ".join(f"{subgraph} {angle:.0f}°" for subgraph, angle in result.angles.by_subgraph.items())
        table.add_row(
            name,
            f"{100 - history.test_error[-1]:.1f} %",
            f"{result.ratio:.2f}" if is_local else "1",
            angles if is_local else "0°",
        )
    return table


def draw(results: list[Result], path: Path) -> None:
    """Test error over epochs, one panel a trial, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5 * len(results), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for i, result in enumerate(results):
        axes = figure.add_subplot(1, len(results), i + 1)
        for (name, history), style in zip(result.histories.items(), ("o--", "s-"), strict=True):
            epochs = range(1, len(history.test_error) + 1)
            label = f"{name} ({1000 * statistics.median(history.seconds):.0f} ms an epoch)"
            axes.plot(epochs, history.test_error, style, markersize=4, label=label)
        axes.set(title=result.trial.title, xlabel="epoch", ylabel="test error (%)")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("scikit-learn's digits: local learning beside backpropagation")
    figure.savefig(path, dpi=120)
