"""How the time of a training step grows with depth, width, batch and the number of subgraphs.

Each series changes one of the four and keeps the others. Per series: the exponent p of time ~ size^p, fitted on
logarithms, of eager backpropagation and of the fused local step, and the ratio of the two at every size. Times are
taken in turn, as in `benchmarks.step_time`.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import graphlocal
from benchmarks import report
from benchmarks.models import loss_fn, mlp
from benchmarks.report import Step
from benchmarks.step_time import OPTIMIZERS, loop

INPUTS = 64
WAYS = ("backprop", "rec-lra, drop-in", "rec-lra, fused")


@dataclass(frozen=True)
class Point:
    """One model: `depth` hidden layers of `width` tanh units, cut into `subgraphs` (0: one a layer)."""

    depth: int = 8
    width: int = 256
    batch: int = 64
    subgraphs: int = 0


@dataclass(frozen=True)
class Series:
    """Models that differ in one of the fields of `Point`."""

    field: str
    points: tuple[Point, ...]

    def sizes(self) -> list[int]:
        """The value of the field at each point; of the number of subgraphs, how many there are."""
        return [getattr(point, self.field) or point.depth + 1 for point in self.points]


SERIES = (
    Series("depth", tuple(Point(depth=depth) for depth in (2, 4, 8, 16, 32))),
    Series("width", tuple(Point(width=width) for width in (64, 128, 256, 512, 1024))),
    Series("batch", tuple(Point(batch=batch) for batch in (8, 32, 128, 512))),
    Series("subgraphs", tuple(Point(depth=15, subgraphs=count) for count in (2, 4, 8, 0))),
)


def ways(point: Point, optimizer: str) -> dict[str, Step]:
    """The step of one model in each way."""
    torch.manual_seed(0)
    start = mlp(point.width, point.depth, INPUTS)
    x, y = torch.randn(point.batch, INPUTS), torch.randint(10, (point.batch,))

    def local() -> graphlocal.LocalModule:
        partition = point.subgraphs or "leaf"
        return graphlocal.compile(copy.deepcopy(start), example_inputs=(x,), partition=partition)

    model = local()
    fused = graphlocal.train_step(model, loss_fn, OPTIMIZERS[optimizer](model.parameters()))
    steps = (loop(copy.deepcopy(start), x, y, optimizer), loop(local(), x, y, optimizer), lambda: fused(x, y))
    return dict(zip(WAYS, steps, strict=True))


def slope(sizes: Sequence[int], times: Sequence[float]) -> float:
    """The exponent p of time ~ size^p, by least squares on logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(t) for t in times]
    return statistics.linear_regression(x, y).slope


Times = dict[str, list[float]]


def rows(series: Series, found: list[Times]) -> list[list[str]]:
    """The table of one series: a row for each size, and one of the exponents."""
    lines = []
    for size, times in zip(series.sizes(), found, strict=True):
        middle = [f"{1000 * statistics.median(times[way]):.2f}" for way in WAYS]
        lines.append([str(size), *middle, *(report.ratio(times[way], times["backprop"]) for way in WAYS[1:])])
    slopes = [f"{slope(series.sizes(), [statistics.median(t[way]) for t in found]):+.2f}" for way in WAYS]
    return [*lines, ["**exponent**", *slopes, "", ""]]


def plot(found: list[tuple[Series, list[Times]]]) -> None:
    """Time against size on logarithmic axes, one panel for each series."""
    from matplotlib.ticker import NullLocator

    with report.pictures("scaling", len(found), 3.2, 3.4) as panels:
        for axes, (series, all_times) in zip(panels, found, strict=True):
            for way in WAYS:
                times = [1000 * statistics.median(t[way]) for t in all_times]
                exponent = slope(series.sizes(), times)
                axes.loglog(series.sizes(), times, "o-", markersize=4, label=f"{way}: {exponent:+.2f}")
            axes.set_xticks(series.sizes(), [str(size) for size in series.sizes()], fontsize=7)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(series.field)
            axes.legend(fontsize=7, title="exponent", title_fontsize=7)
        panels[0].set_ylabel("milliseconds a step")


def main() -> None:
    """Measure all series and write benchmarks/results/scaling.md and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--optimizer", default="adam-fused", choices=list(OPTIMIZERS))
    parser.add_argument("--clock", default="wall", choices=["wall", "process"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock: Callable[[], float] = time.process_time if options.clock == "process" else time.perf_counter
    found = []
    for series in SERIES:
        times = [report.in_turn(ways(point, options.optimizer), options.rounds, clock) for point in series.points]
        found.append((series, times))
        print(series.field, rows(series, times), file=sys.stderr)
    plot(found)
    tables = []
    for series, times in found:
        header = [series.field, *(f"{way}, ms" for way in WAYS), *(f"{way} / backprop" for way in WAYS[1:])]
        fixed = "depth 15, width 256, batch 64" if series.field == "subgraphs" else "else depth 8, width 256, batch 64"
        tables.append(f"## {series.field.capitalize()} ({fixed})\n\n{report.table(header, rows(series, times))}")
    notes = (
        f"Hidden layers of tanh units on {INPUTS} inputs, one subgraph a layer, {options.optimizer}; medians over "
        f"{options.rounds} rounds, ratios with quartiles. The exponent p of time ~ size^p is fitted on logarithms."
    )
    command = " ".join(["python -m benchmarks.scaling", *sys.argv[1:]])
    report.write("scaling", "Scaling of a training step", command, [*tables, "![scaling](scaling.png)"], notes)


if __name__ == "__main__":
    main()
