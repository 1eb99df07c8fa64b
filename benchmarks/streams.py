"""Time of a fused training step with target="streams", against the sequential lowered target and eager backprop.

All ways run in one process, once a round and in turn, and all have two threads: inside a kernel, or one in each of two
lanes. Fused steps with Adam, leaf subgraphs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys

import torch

import graphlocal
from benchmarks import report
from benchmarks.step_time import CASES, Case, Step, loop, loss_fn

CHOSEN = ("MLP 64-128-128-10", "MLP 8×1024", "small ResNet on 8×8")
WAYS = {
    "streams, 1 lane": ("streams", 1),
    "streams, 2 lanes": ("streams", 2),
}
"""Name: the target and its streams."""


def ways(case: Case) -> dict[str, Step]:
    """The same training step in each way, on a model of its own."""
    torch.manual_seed(0)
    start = case.make()
    x, y = torch.randn(case.batch, *case.shape), torch.randint(case.classes, (case.batch,))

    def fused(target: str, streams: int | None) -> Step:
        local = graphlocal.compile(
            copy.deepcopy(start), example_inputs=(x,), partition="leaf", target=target, streams=streams
        )
        step = graphlocal.train_step(local, loss_fn, torch.optim.Adam(local.parameters(), 1e-4))
        return lambda: step(x, y)

    steps = {"backprop": loop(copy.deepcopy(start), x, y), "lowered": fused("lowered", None)}
    return steps | {name: fused(*way) for name, way in WAYS.items()}


def measure(case: Case, rounds: int) -> list[str]:
    """A row of the table."""
    times = report.in_turn(ways(case), rounds)
    row = [f"{case.title}, {case.batch}"]
    row += [f"{1000 * statistics.median(times[name]):.1f}" for name in ("backprop", "lowered")]
    row.append(report.ratio(times["lowered"], times["backprop"]))
    for name in WAYS:
        row += [report.ratio(times[name], times[base]) for base in ("lowered", "backprop")]
    print(" | ".join(row), file=sys.stderr)
    return row


def main() -> None:
    """Measure the cases and write benchmarks/results/streams.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    cases = [max((c for c in CASES if c.title == title), key=lambda c: c.batch) for title in CHOSEN]
    rows = [measure(case, arguments.rounds) for case in cases]
    header = ["model, batch", "backprop, ms", "lowered, ms", "lowered / backprop"]
    header += [f"{name} / {base}" for name in WAYS for base in ("lowered", "backprop")]
    notes = "Median and quartiles of the ratio within a round; below 1 is faster. Two threads in every way."
    notes += report.load()
    report.write("streams", "Streams", "python -m benchmarks.streams", [report.table(header, rows)], notes)


if __name__ == "__main__":
    main()
