"""Time of a training step against eager backpropagation, in the same process and in turn.

Every round times each way in turn, so that a noisy machine slows all alike; the ratio is taken within the round. All
ways have the same optimizer, and run with target="auto" unless they say otherwise: what a user gets. biotorch's
feedback alignment is measured too if that package can be imported (it needs no more than torch for that: `pip install
--no-deps biotorch`).
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import graphlocal
from benchmarks import report
from benchmarks.models import (
    BIOTORCH,
    LARGE,
    SMALL,
    SPARSE,
    Case,
    Encoder,
    by_biotorch,
    checkpointed,
    compiled,
    loss_fn,
    mlp,
    on_gpu,
)
from benchmarks.report import Step
from graphlocal.rules import RecLRA

__all__ = ["CASES", "Case", "Encoder", "Step", "loop", "loss_fn", "mlp", "ways"]

CASES = SMALL
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, lr=1e-4),
    "adam-fused": partial(torch.optim.Adam, lr=1e-4, fused=True),
    "sgd-fused": partial(torch.optim.SGD, lr=1e-4, momentum=0.9, fused=True),
}


def loop(model: nn.Module, x: Tensor, y: Tensor, optimizer: str = "adam") -> Step:
    """An ordinary training loop's step: backpropagation, or local updates by the drop-in path."""
    updates = OPTIMIZERS[optimizer](model.parameters())

    def step() -> None:
        loss_fn(model(x), y).backward()
        updates.step()
        updates.zero_grad()

    return step


def under_autocast(step: Step, device: str) -> Step:
    """The same step in mixed precision: products in bfloat16, parameters in float32."""

    def run() -> object:
        with torch.autocast(device, torch.bfloat16):
            return step()

    return run


def ways(case: Case, options: argparse.Namespace) -> dict[str, Step]:
    """The same training step by backpropagation and by local updates, each on a model of its own."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    start = case.make().to(options.device, dtype)
    x, y = case.example(options.device, dtype)

    def run(step: Step) -> Step:
        return under_autocast(step, options.device) if options.autocast else step

    def plain(model: nn.Module) -> Step:
        return run(loop(model, x, y, options.optimizer))

    def local(partition: str, target: str = "auto", rule: RecLRA | str = "rec-lra") -> graphlocal.LocalModule:
        return graphlocal.compile(
            copy.deepcopy(start), example_inputs=(x,), rule=rule, partition=partition, target=target
        )

    def fused(model: graphlocal.LocalModule) -> Step:
        step = graphlocal.train_step(model, loss_fn, OPTIMIZERS[options.optimizer](model.parameters()))
        return run(lambda: step(x, y))

    found = {
        "backprop": plain(copy.deepcopy(start)),
        "backprop, checkpointed": plain(checkpointed(case, copy.deepcopy(start))),
        "rec-lra": plain(local("auto")),
        "rec-lra, fused": fused(local("auto")),
        "rec-lra leaf, fused": fused(local("leaf")),
        "rec-lra leaf, sparse E, fused": fused(local("leaf", rule=SPARSE)),
    }
    if options.compiled:
        torch.compiler.reset()
        found["backprop, compiled"] = plain(compiled(copy.deepcopy(start)))
        if options.device == "cpu" and any(isinstance(module, nn.Conv2d) for module in start.modules()):
            kept = compiled(copy.deepcopy(start), layout_optimization=False)  # as target="inductor" asks for on a CPU
            found["backprop, compiled, layout kept"] = plain(kept)
        found["rec-lra, fused, inductor"] = fused(local("auto", "inductor"))
        found["rec-lra leaf, fused, inductor"] = fused(local("leaf", "inductor"))
    aligned = by_biotorch(case.title, copy.deepcopy(start), plain)
    return found | {name: plain(model) for name, model in aligned.items()}


def measure(case: Case, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    rounds = options.large_rounds if case in LARGE else options.rounds
    if options.device == "cuda":
        case = on_gpu(case)
        times = report.in_turn(ways(case, options), rounds, measure=report.seconds_on_gpu)
    else:
        clock = time.process_time if options.clock == "process" else time.perf_counter
        times = report.in_turn(ways(case, options), rounds, clock)
    shown = (f"{name} {report.ratio(found, times['backprop'])}" for name, found in times.items())
    print(case.title, case.batch, *shown, sep=" | ", file=sys.stderr)
    return times


def row(case: Case, times: dict[str, list[float]], names: Sequence[str], base: str = "backprop") -> list[str]:
    """A row of the table: milliseconds of backprop, and the ratio of each other way with its spread."""
    cells = [case.title, str(case.batch), f"{1000 * statistics.median(times[base]):.2f}"]
    missing = {BIOTORCH: "fails"}
    return cells + [
        report.ratio(times[name], times[base]) if name in times else missing.get(name, "") for name in names
    ]


def plot(name: str, cases: Sequence[Case], found: list[dict[str, list[float]]], names: Sequence[str]) -> None:
    """Bars of the ratios, with quartiles, as a picture beside the table."""
    width = 0.8 / len(names)
    with report.picture(name, 3 + 1.5 * len(cases), 4.2) as axes:
        for k, way in enumerate(names):
            rows = [
                report.quartiles(times[way], times["backprop"]) if way in times else (math.nan,) * 3 for times in found
            ]
            middles = [middle for _, middle, _ in rows]
            spread = [[middle - low for low, middle, _ in rows], [high - middle for _, middle, high in rows]]
            places = [i + width * (k - (len(names) - 1) / 2) for i in range(len(rows))]
            axes.bar(places, middles, 0.95 * width, yerr=spread, label=way, error_kw={"linewidth": 0.8})
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set_xticks(range(len(cases)), [f"{case.title}\nbatch {case.batch}" for case in cases], fontsize=7)
        axes.set_ylabel("time of a step / eager backprop's")
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
        axes.legend(fontsize=8, ncols=3, loc="upper center")


def main() -> None:
    """Measure the cases and write benchmarks/results/step_time.md and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="of the small cases")
    parser.add_argument("--large-rounds", type=int, default=9, help="of the large cases")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--large", action="store_true", help="ResNet-18 and 50, ViT-S, a decoder of GPT-2's shape")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too; its first steps take minutes")
    parser.add_argument("--optimizer", default="adam-fused", choices=list(OPTIMIZERS))
    parser.add_argument("--clock", default="wall", choices=["wall", "process"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--autocast", action="store_true", help="mixed precision: products in bfloat16")
    parser.add_argument("--return-memory", action="store_true", help="freed memory goes to the system as glibc likes")
    parser.add_argument("--only", default="", help="a part of the titles to measure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.return_memory:
        report.keep_memory()
    cases = [case for case in (LARGE if options.large else SMALL) if options.only in case.title]
    found = [measure(case, options) for case in cases]
    cases = [on_gpu(case) for case in cases] if options.device == "cuda" else cases
    names = list(dict.fromkeys(name for times in found for name in times if name != "backprop"))
    parts = ["step_time", *(["large"] if options.large else []), *(["compiled"] if options.compiled else [])]
    parts += [] if (options.device, options.dtype) == ("cpu", "float32") else [options.device, options.dtype]
    parts += ["autocast"] if options.autocast else []
    name = "_".join(parts)
    plot(name, cases, found, names)
    header = ["model", "batch", "backprop, ms", *names]
    rows = [row(case, times, names) for case, times in zip(cases, found, strict=True)]
    tables = [report.table(header, rows), f"![step time]({name}.png)"]
    if options.compiled:
        base = "backprop, compiled"
        local = [name for name in names if "rec-lra" in name]
        rows = [row(case, times, local, base) for case, times in zip(cases, found, strict=True)]
        tables += ["Ratios to compiled backprop:", report.table(["model", "batch", f"{base}, ms", *local], rows)]
    notes = (
        f"Ratios to eager backprop but where it says otherwise, all with {options.optimizer}: median and quartiles "
        f"over {options.large_rounds if options.large else options.rounds} rounds. "
        'Below 1 is faster. Columns without "fused" call loss.backward() and optimizer.step(), the others '
        'train_step; target="auto" but where it says inductor.'
    )
    notes += report.conditions(options)
    command = " ".join(["python -m benchmarks.step_time", *sys.argv[1:]])
    report.write(name, "Step time", command, tables, notes)


if __name__ == "__main__":
    main()
