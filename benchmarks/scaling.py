"""How the time of a training step grows with depth, width, batch and the number of subgraphs.

Each series changes one of the four and keeps the others. Per series: the exponent p of time ~ size^p, fitted on
logarithms, of backpropagation in its forms, of biotorch's feedback alignment where it can be imported and of local
steps, and the ratios to eager backpropagation at every size. All models of a series live in one process and take their
steps in turn, round by round (`benchmarks.report.in_turn`), so that what a process happens to be like makes no slope.
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
from torch import nn

import graphlocal
from benchmarks import report
from benchmarks.models import Case, by_biotorch, checkpointed, compiled, loss_fn, mlp
from benchmarks.report import Step
from benchmarks.step_time import OPTIMIZERS, loop

INPUTS = 64
BASE = "backprop"
LOCAL = {"rec-lra, drop-in": "auto", "rec-lra, fused": "auto"}
COMPILED = {"rec-lra, fused, inductor": "inductor"}
"""Name: the compile target."""


@dataclass(frozen=True)
class Point:
    """One model: `depth` hidden layers of `width` tanh units, cut into `subgraphs` (0: one a layer)."""

    depth: int = 8
    width: int = 256
    batch: int = 64
    subgraphs: int = 0

    def case(self) -> Case:
        """The model and its inputs."""
        return Case(str(self), lambda: mlp(self.width, self.depth, INPUTS), (INPUTS,), self.batch)


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


def plain(point: Point, options: argparse.Namespace) -> dict[str, Step]:
    """The step of one model in each way that has no subgraphs."""
    case = point.case()
    start, x, y = example(case, options)

    def step(model: nn.Module) -> Step:
        return loop(model, x, y, options.optimizer)

    found = {BASE: step(copy.deepcopy(start))}
    found["backprop, checkpointed"] = step(checkpointed(case, copy.deepcopy(start)))
    if options.compiled:
        found["backprop, compiled"] = step(compiled(copy.deepcopy(start)))
    aligned = by_biotorch(case.title, copy.deepcopy(start), step)
    return found | {way: step(model) for way, model in aligned.items()}


def local(point: Point, options: argparse.Namespace) -> dict[str, Step]:
    """The step of one model in each way of local learning."""
    start, x, y = example(point.case(), options)

    def step(way: str, target: str) -> Step:
        model = graphlocal.compile(
            copy.deepcopy(start), example_inputs=(x,), partition=point.subgraphs or "leaf", target=target
        )
        if "fused" not in way:
            return loop(model, x, y, options.optimizer)
        run = graphlocal.train_step(model, loss_fn, OPTIMIZERS[options.optimizer](model.parameters()))
        return lambda: run(x, y)

    return {way: step(way, target) for way, target in (LOCAL | (COMPILED if options.compiled else {})).items()}


def example(case: Case, options: argparse.Namespace) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The same model, inputs and labels for every way."""
    torch.manual_seed(0)
    start = case.make().to(options.device, getattr(torch, options.dtype))
    return start, *case.example(options.device, getattr(torch, options.dtype))


Times = dict[str, list[float]]


def measure(series: Series, options: argparse.Namespace) -> list[Times]:
    """Seconds of each way in each round, by point; ways without subgraphs are timed once for all numbers of those."""
    if options.compiled:
        torch.compiler.reset()
    alike = series.field == "subgraphs"
    steps: dict[tuple[int, str], Step] = {}
    for i, point in enumerate(series.points):
        if i == 0 or not alike:
            steps |= {(i, way): step for way, step in plain(point, options).items()}
        steps |= {(i, way): step for way, step in local(point, options).items()}
    clock: Callable[[], float] = time.process_time if options.clock == "process" else time.perf_counter
    on_gpu = report.seconds_on_gpu if options.device == "cuda" else None
    times = report.in_turn(steps, options.rounds, clock, on_gpu)
    return [
        {way: found for (j, way), found in times.items() if j == (0 if alike and not is_local(way) else i)}
        for i in range(len(series.points))
    ]


def is_local(way: str) -> bool:
    """Whether a way has subgraphs."""
    return way in LOCAL | COMPILED


def slope(sizes: Sequence[int], times: Sequence[float]) -> float:
    """The exponent p of time ~ size^p, by least squares on logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(t) for t in times]
    return statistics.linear_regression(x, y).slope


def exponent(series: Series, found: list[Times], way: str) -> str:
    """Of a way's medians; none of one that was timed once for all points."""
    if series.field == "subgraphs" and not is_local(way):
        return "-"
    return f"{slope(series.sizes(), [statistics.median(times[way]) for times in found]):+.2f}"


def table(series: Series, found: list[Times]) -> str:
    """A row for each size, and one of the exponents."""
    ways = list(found[0])
    lines = []
    for size, times in zip(series.sizes(), found, strict=True):
        middle = {way: f"{1000 * statistics.median(times[way]):.2f}" for way in ways}
        others = (f"{middle[way]}: {report.ratio(times[way], times[BASE])}" for way in ways if way != BASE)
        lines.append([str(size), middle[BASE], *others])
    lines.append(["**exponent**", *(exponent(series, found, way) for way in ways)])
    return report.table([series.field, *(f"{way}, ms" for way in ways)], lines)


def plot(name: str, found: list[tuple[Series, list[Times]]]) -> None:
    """Time against size on logarithmic axes, one panel for each series."""
    from matplotlib.ticker import NullLocator

    with report.pictures(name, len(found), 3.6, 4.6) as panels:
        for axes, (series, all_times) in zip(panels, found, strict=True):
            for way in all_times[0]:
                times = [1000 * statistics.median(t[way]) for t in all_times]
                label = f"{way}: {exponent(series, all_times, way)}"
                axes.loglog(series.sizes(), times, "o-" if is_local(way) else "s--", markersize=4, label=label)
            axes.set_xticks(series.sizes(), [str(size) for size in series.sizes()], fontsize=7)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(series.field)
            axes.legend(fontsize=7, title="exponent", title_fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1))
        panels[0].set_ylabel("milliseconds a step")


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="torch.compile too; its first steps take minutes")
    parser.add_argument("--optimizer", default="adam-fused", choices=list(OPTIMIZERS))
    parser.add_argument("--clock", default="wall", choices=["wall", "process"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--return-memory", action="store_true", help="freed memory goes to the system as glibc likes")
    parser.add_argument("--only", default="", help="the series to measure", choices=["", *(s.field for s in SERIES)])
    return parser.parse_args()


def main() -> None:
    """Measure all series and write benchmarks/results/scaling.md and its picture."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if not options.return_memory:
        report.keep_memory()
    found, tables = [], []
    for series in SERIES:
        if options.only in ("", series.field):
            times = measure(series, options)
            found.append((series, times))
            fixed = (
                "depth 15, width 256, batch 64" if series.field == "subgraphs" else "else depth 8, width 256, batch 64"
            )
            tables.append(f"## {series.field.capitalize()} ({fixed})\n\n{table(series, times)}")
            print(tables[-1], file=sys.stderr)
    parts = ["scaling", *(["compiled"] if options.compiled else [])]
    parts += [] if (options.device, options.dtype) == ("cpu", "float32") else [options.device, options.dtype]
    name = "_".join(parts)
    plot(name, found)
    notes = (
        f"Hidden layers of tanh units on {INPUTS} inputs, one subgraph a layer, {options.optimizer}. Milliseconds are "
        f"medians over {options.rounds} rounds, after the colon the ratio to eager backprop within the round, with "
        "quartiles. The exponent p of time ~ size^p is fitted on logarithms. All models of a table take their steps in "
        "turn in one process; what has no subgraphs was timed once in each round of the last table, for all its rows."
    )
    notes += report.conditions(options)
    command = " ".join(["python -m benchmarks.scaling", *sys.argv[1:]])
    report.write(name, "Scaling of a training step", command, [*tables, f"![scaling]({name}.png)"], notes)


if __name__ == "__main__":
    main()
