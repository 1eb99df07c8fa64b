"""The bars of the learning rules at quick size: what each must reach on Fashion-MNIST or the digits, and what it does.

Inputs are pixels in [0, 1]. All rules of a seed start from the same weights and see the same batches. Exits with 1 if
a bar is missed. Results are kept after every bar, in benchmarks/results/bars.json; `--only WORD` renews those of the
bars whose title holds the word.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import graphlocal
from benchmarks import report
from benchmarks.learning import network
from graphlocal.data import Dataset, load
from graphlocal.ir import Operation
from graphlocal.nn import Bernoulli, Signum
from graphlocal.passes.policies import Policy
from graphlocal.passes.unroll import Unroll
from graphlocal.rules import LP, NLP, LRAFeedback, RecLRA, Rule
from graphlocal.training import Step, autograd_step, train

Load = Callable[..., Dataset]


@dataclass(frozen=True)
class Limit:
    """What a number must be at most or at least."""

    number: str
    most: float | None = None
    least: float | None = None

    def __str__(self) -> str:
        return f"≤ {self.most:g}" if self.most is not None else f"≥ {self.least:g}"

    def met(self, value: float) -> bool:
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)


@dataclass(frozen=True)
class Bar:
    """A trial: `run(load, seed)` gives numbers, some of which have a limit that their mean over seeds must keep."""

    title: str
    setting: str
    run: Callable[[Load, int], Mapping[str, float]]
    limits: tuple[Limit, ...]


@dataclass(frozen=True)
class MLP:
    """Test error in per cent of a perceptron on Fashion-MNIST, by each of the rules (None: backpropagation)."""

    widths: tuple[int, ...]
    activation: type[nn.Module] | Callable[[], nn.Module]
    rules: tuple[tuple[str, Rule | None], ...]
    lr: float
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    batch: int = 32
    epochs: int = 3
    sigma: float | None = None
    zero: bool = False
    reduction: str = "mean"
    extra: Callable[[dict[str, float]], dict[str, float]] = field(default=lambda found: {})

    def __call__(self, load: Load, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        start = network(self.widths, self.activation, self.sigma)  # type: ignore[arg-type]
        if self.zero:
            for parameter in start.parameters():
                nn.init.zeros_(parameter)
        found = {}
        for name, rule in self.rules:
            model, step = compiled(start, rule, load("fashion-mnist"), self.lr, self.optimizer, self.reduction)
            data = load("fashion-mnist")
            for history in train(model, step, data, epochs=self.epochs, batch_size=self.batch, seed=seed):
                found[name] = history.test_error[-1]
        return found | self.extra(found)


def compiled(
    start: nn.Module, rule: Rule | None, data: Dataset, lr: float,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam, reduction: str = "mean", partition: Policy = "auto",
) -> tuple[nn.Module, Step]:  # fmt: skip
    """A copy of the model, compiled for the rule if there is one, and its training step."""
    model = copy.deepcopy(start)
    if rule is None:
        return model, autograd_step(model, optimizer(model.parameters(), lr))
    local = graphlocal.compile(model, example_inputs=(data.train_x[:8],), rule=rule, partition=partition)
    loss = functools.partial(cross_entropy, reduction=reduction)
    return local, graphlocal.train_step(local, loss, optimizer(local.parameters(), lr))


def depth_by_epoch(load: Load, seed: int) -> dict[str, float]:
    """The mean credit-assignment depth of LRA with a halting threshold, in the first epoch and in the fifth."""
    data = load("fashion-mnist")
    torch.manual_seed(seed)
    start = network((784, *[128] * 8, 10), nn.Tanh, 0.025)
    local, inner = compiled(start, LRAFeedback(epsilon=DEPTH_EPSILON), data, 0.01, torch.optim.SGD)
    assert isinstance(local, graphlocal.LocalModule)
    depths: list[float] = []

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = inner(x, y)
        depths.append(local.credit_depth)
        return loss

    by_epoch = []
    for history in train(local, step, data, epochs=5, batch_size=50, seed=seed):
        by_epoch.append(statistics.mean(depths))
        depths.clear()
        error = history.test_error[-1]
    return {
        "depth in epoch 1": by_epoch[0], "depth in epoch 5": by_epoch[-1],
        "per cent": 100 * by_epoch[-1] / by_epoch[0], "test error": error,
    }  # fmt: skip


DEPTH_EPSILON = 0.02


class Rows(nn.Module):
    """A GRU that reads an image row by row, and a classifier on its last state."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.gru = nn.GRU(28, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.gru(images.squeeze(1))
        return self.head(states[:, -1])  # type: ignore[no-any-return]


def recurrent(load: Load, seed: int) -> dict[str, float]:
    """A GRU written out as cells, with E at the last state or at every one, beside backpropagation through time."""
    data = load("fashion-mnist", train=10000)
    torch.manual_seed(seed)
    start = Rows()
    found = {}
    trials = {"backprop": None, "rec-lra": _cells_together, "rec-lra, E at every state": "auto"}
    for name, cut in trials.items():
        rule = None if cut is None else RecLRA()
        model = start if rule is None else Unroll().rewrite(copy.deepcopy(start)).model
        model, step = compiled(model, rule, data, 1e-3, partition=cut or "auto")
        for history in train(model, step, data, epochs=2, batch_size=50, seed=seed):
            found[name] = history.test_error[-1]
    return found | {"points over backprop": found["rec-lra"] - found["backprop"]}


def _cells_together(op: Operation) -> str:
    """All cells in one subgraph, whose representation is the last state; the classifier in the other."""
    return "head" if op.module.startswith("head") else "cells"


def local_propagation(name: str, train: int | None, lr: float, epochs: int) -> Callable[[Load, int], dict[str, float]]:
    """Per cent correct of a tanh net with two hidden layers of 64 under Local Propagation."""

    def run(load: Load, seed: int) -> dict[str, float]:
        data = load(name, train=train)
        torch.manual_seed(seed)
        model = network((data.train_x[0].numel(), 64, 64, 10), nn.Tanh, None)
        _glorot(model)
        local = graphlocal.compile(model, example_inputs=(data.train_x[:8],), rule=LP(), partition="leaf")
        step = graphlocal.train_step(local, cross_entropy, torch.optim.Adam(local.parameters(), lr))
        order = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for index in torch.randperm(len(data.train_x), generator=order).split(64):
                step(data.train_x[index], data.train_y[index], index=index)
        local.eval()
        with torch.no_grad():
            right = local(data.test_x).argmax(1) == data.test_y
        return {"per cent correct": 100 * right.double().mean().item()}

    return run


def nonlinear_transforms(load: Load, seed: int) -> dict[str, float]:
    """k-NN on the codes of six nodes trained towards class codes, and the same without messages (lambda_f = 0)."""
    data = load("fashion-mnist", train=5000)
    torch.manual_seed(seed)
    start = network((784, *[256] * 6), nn.Tanh, None)
    _glorot(start)
    found = []
    for rule in (NLP(update="ridge"), NLP(update="ridge", lambda_f=0.0)):
        torch.manual_seed(seed)
        model = copy.deepcopy(start)
        local = graphlocal.compile(model, example_inputs=(data.train_x[:8],), rule=rule, partition="leaf")
        step = graphlocal.train_step(local, graphlocal.ClassCodes(10), None)
        order = torch.Generator().manual_seed(seed)
        for _ in range(10):
            for index in torch.randperm(len(data.train_x), generator=order).split(500):
                step(data.train_x[index], data.train_y[index])
        codes = (graphlocal.representations(local, x) for x in (data.train_x, data.test_x))
        found.append(100 - graphlocal.knn_error(next(codes), data.train_y, next(codes), data.test_y))
    return {"per cent correct": found[0], "points over lambda_f = 0": found[0] - found[1]}


def _glorot(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


DEEP = (784, *[128] * 8, 10)
SGD = {"optimizer": torch.optim.SGD, "batch": 50}
SIGMOID = LRAFeedback(sigma=1.0, c1=None, c2=5.0, reduction="sum", rescale=None)
"""The paper's rule, with the bounds and the E that sigmoids need under it."""
DEEP_RULES = (("lra-fdbk", LRAFeedback()), ("the paper's normalization", LRAFeedback(c1=None, rescale=None)))
DEEP_TANH = MLP(DEEP, nn.Tanh, (*DEEP_RULES, ("backprop", None)), 0.01, torch.optim.SGD, 50, sigma=0.025)
DEEP_SIGMOID = MLP(DEEP, nn.Sigmoid, (("lra-fdbk", SIGMOID),), 0.003, torch.optim.SGD, 50, sigma=0.025, reduction="sum")
THREE = (784, 256, 256, 256, 10)
BARS = (
    Bar("lra-fdbk, tanh", "8x128, weights N(0, 0.025), SGD 0.01, batch 50, 3 epochs", DEEP_TANH,
        (Limit("lra-fdbk", most=20), Limit("backprop", least=60))),
    Bar("lra-fdbk, sigmoid", "8x128, weights N(0, 0.025), SGD 0.003, loss summed over batches of 50, 3 epochs",
        DEEP_SIGMOID, (Limit("lra-fdbk", most=22),)),
    Bar("lra-fdbk, tanh, zero start", "as above, all weights 0", replace(DEEP_TANH, zero=True,
        rules=DEEP_RULES), (Limit("lra-fdbk", most=20),)),
    Bar("lra-fdbk, sigmoid, zero start", "as above, all weights 0", replace(DEEP_SIGMOID, zero=True),
        (Limit("lra-fdbk", most=22),)),
    Bar("rec-lra, E learned, with phi'", "3x256 tanh, Adam 2e-4, batch 32, 3 epochs",
        MLP(THREE, nn.Tanh, (("rec-lra", RecLRA(error_weights="kp", derivative=True)),), 2e-4),
        (Limit("rec-lra", most=15.5),)),
    Bar("rec-lra, sign units", "3x256 sign(tanh), Adam 2e-4, batch 32, 3 epochs",
        MLP(THREE, lambda: nn.Sequential(nn.Tanh(), Signum()), (("rec-lra", RecLRA()),), 2e-4),
        (Limit("rec-lra", most=20),)),
    Bar("rec-lra, deep sigmoid", "8x256, Adam 2e-4, batch 32, 3 epochs",
        MLP((784, *[256] * 8, 10), nn.Sigmoid, (("rec-lra", RecLRA()), ("backprop", None)), 2e-4,
            extra=lambda found: {"points under backprop": found["backprop"] - found["rec-lra"]}),
        (Limit("rec-lra", most=25), Limit("points under backprop", least=5))),
    Bar("rec-lra, Bernoulli units", "2x200, Adam 2e-4, batch 32, 3 epochs",
        MLP((784, 200, 200, 10), Bernoulli, (("rec-lra", RecLRA()),), 2e-4), (Limit("rec-lra", most=19),)),
    Bar("variable depth", f"lra-fdbk, 8x128 tanh as above, epsilon = {DEPTH_EPSILON}, 5 epochs", depth_by_epoch,
        (Limit("per cent", most=75),)),
    Bar("GRU in cell form", "a row of pixels at a time, 64 states, 10,000 samples, Adam 1e-3, batch 50, 2 epochs",
        recurrent, (Limit("points over backprop", most=5),)),
    Bar("lp, digits", "64-64-64-10 tanh, Adam 1e-3, batch 64, 60 epochs",
        local_propagation("digits", None, 1e-3, 60), (Limit("per cent correct", least=95.5),)),
    Bar("lp, 5,000 pictures", "784-64-64-10 tanh, Adam 3e-4, batch 64, 30 epochs",
        local_propagation("fashion-mnist", 5000, 3e-4, 30), (Limit("per cent correct", least=78.5),)),
    Bar("nlp, six nodes", "6x256, 5,000 pictures, ridge updates, batch 500, 10 epochs, k-NN on the codes",
        nonlinear_transforms, (Limit("per cent correct", least=80), Limit("points over lambda_f = 0", least=15))),
)  # fmt: skip


def rows(bar: Bar, runs: list[dict[str, float]]) -> tuple[list[list[str]], bool]:
    """The lines of a bar in the table, and whether all its limits are met."""
    limits = {limit.number: limit for limit in bar.limits}
    lines, good = [], True
    for i, number in enumerate(runs[0]):
        values = [run[number] for run in runs]
        mean, limit = statistics.mean(values), limits.get(number)
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        verdict = "" if limit is None else "met" if limit.met(mean) else "**missed**"
        good = good and verdict in ("", "met")
        before = ["", "", ""] if i else [bar.title, bar.setting, str(len(runs))]
        lines.append([*before, number, str(limit or ""), f"{mean:.2f}{spread}", verdict])
    return lines, good


def known_runs() -> dict[str, list[dict[str, float]]]:
    """What was measured before, by bar, for those whose settings are still the same."""
    path = report.RESULTS / "bars.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    return {bar.title: kept[bar.title]["runs"] for bar in BARS if kept.get(bar.title, {}).get("setting") == bar.setting}


def keep(runs: dict[str, list[dict[str, float]]]) -> list[str]:
    """Write benchmarks/results/bars.json and bars.md; returns the bars that are missed."""
    table, missed = [], []
    for bar in BARS:
        if bar.title in runs:
            lines, good = rows(bar, runs[bar.title])
            table += lines
            missed += [] if good else [bar.title]
    kept = {bar.title: {"setting": bar.setting, "runs": runs[bar.title]} for bar in BARS if bar.title in runs}
    report.RESULTS.mkdir(exist_ok=True)
    (report.RESULTS / "bars.json").write_text(json.dumps(kept, indent=1) + "\n")
    notes = "Mean ± standard deviation over the seeds; numbers under a rule's name are test errors in per cent. "
    notes += "Missed: " + "; ".join(missed) + "." if missed else "All bars are met."
    header = ["trial", "setting", "seeds", "number", "bar", "measured", ""]
    report.write("bars", "Bars of the learning rules at quick size", "python -m benchmarks.bars",
                 [report.table(header, table)], notes)  # fmt: skip
    return missed


def main() -> None:
    """Run the bars and write benchmarks/results/bars.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="where Fashion-MNIST lies (FashionMNIST/raw/*.gz)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", metavar="WORD", help="run the bars whose title holds WORD alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cached = functools.cache(functools.partial(load, data_dir=arguments.data_dir))
    runs = known_runs()
    missed = []
    for bar in BARS:
        if arguments.only in bar.title:
            start = time.perf_counter()
            runs[bar.title] = [dict(bar.run(cached, seed)) for seed in range(arguments.seeds)]
            print(bar.title, runs[bar.title], f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(io.StringIO()):
                missed = keep(runs)
    print((report.RESULTS / "bars.md").read_text())
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
