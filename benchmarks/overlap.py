"""Time of a run over many batches with overlapping steps (`step.run`), against a loop of single steps.

All ways run in one process and in turn, some steps of each a round, and all have two threads: inside a kernel,
or one in each of two lanes. Fused steps, leaf subgraphs, wall-clock time: overlap needs idle cores. Adam by torch's
fused kernel in every way.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch

import graphlocal
from benchmarks import report
from benchmarks.step_time import CASES, OPTIMIZERS, Case, Step, loop, loss_fn

CHOSEN = ("MLP 64×128 (deep, thin)", "MLP 8×1024", "small ResNet on 8×8")
STEPS = 5
"""Steps that are timed together."""
PAIRS = (
    *((way, "backprop") for way in ("lowered", "streams", "overlapped", "staleness=1")),
    ("overlapped", "streams"),
)
OPTIMIZER = "adam-fused"


def ways(case: Case) -> dict[str, Step]:
    """So many training steps in each way, on a model of its own."""
    torch.manual_seed(0)
    start = case.make()
    x, y = torch.randn(case.batch, *case.shape), torch.randint(case.classes, (case.batch,))
    backprop = loop(copy.deepcopy(start), x, y, OPTIMIZER)

    def step(target: str) -> graphlocal.step.TrainStep:
        model = copy.deepcopy(start)
        local = graphlocal.compile(model, example_inputs=(x,), partition="leaf", target=target)
        return graphlocal.train_step(local, loss_fn, OPTIMIZERS[OPTIMIZER](local.parameters()))

    def endless() -> Iterator[tuple[Any, Any]]:
        while True:
            yield x, y

    lowered, streams = step("lowered"), step("streams")
    runs = [step("streams").run(endless(), staleness=k) for k in (0, 1)]
    return {
        "backprop": lambda: [backprop() for _ in range(STEPS)],
        "lowered": lambda: [lowered(x, y) for _ in range(STEPS)],
        "streams": lambda: [streams(x, y) for _ in range(STEPS)],
        "overlapped": lambda: [next(runs[0]) for _ in range(STEPS)],
        "staleness=1": lambda: [next(runs[1]) for _ in range(STEPS)],
    }


def main() -> None:
    """Measure the cases and write benchmarks/results/overlap.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    cases = [max((c for c in CASES if c.title == title), key=lambda c: c.batch) for title in CHOSEN]
    rows = []
    for case in cases:
        times = report.in_turn(ways(case), arguments.rounds)
        rows.append(report.compared(f"{case.title}, {case.batch}", times, ("backprop",), PAIRS, STEPS))
    notes = (
        "Ratios within a round, median and quartiles over rounds; below 1 is faster. Streams on 2 lanes of one thread, "
        "all else with two; Adam by torch's fused kernel in every way." + report.load()
    )
    command = " ".join(["python -m benchmarks.overlap", *sys.argv[1:]])
    table = report.table(["model, batch", *report.header(("backprop",), PAIRS)], rows)
    report.write("overlap", "Overlapping steps", command, [table], notes)


if __name__ == "__main__":
    main()
