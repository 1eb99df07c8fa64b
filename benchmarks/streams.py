"""Time of a fused training step with target="streams", against the sequential lowered target and eager backprop.

All ways run in one process, once a round and in turn, and all have two threads: inside a kernel, or one in each of two
lanes. Fused steps, leaf subgraphs; Adam by torch's fused kernel in every way.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch

import graphlocal
from benchmarks import report
from benchmarks.step_time import CASES, OPTIMIZERS, Case, Step, loop, loss_fn

CHOSEN = ("MLP 64-128-128-10", "MLP 8×1024", "small ResNet on 8×8")
WAYS = {
    "streams, 1 lane": ("streams", 1),
    "streams, 2 lanes": ("streams", 2),
}
"""Name: the target and its streams."""
SHOWN = ("backprop", "lowered")
PAIRS = (("lowered", "backprop"), *((way, base) for way in WAYS for base in ("lowered", "backprop")))
OPTIMIZER = "adam-fused"


def ways(case: Case) -> dict[str, Step]:
    """The same training step in each way, on a model of its own."""
    torch.manual_seed(0)
    start = case.make()
    x, y = torch.randn(case.batch, *case.shape), torch.randint(case.classes, (case.batch,))

    def fused(target: str, streams: int | None) -> Step:
        local = graphlocal.compile(
            copy.deepcopy(start), example_inputs=(x,), partition="leaf", target=target, streams=streams
        )
        step = graphlocal.train_step(local, loss_fn, OPTIMIZERS[OPTIMIZER](local.parameters()))
        return lambda: step(x, y)

    steps = {"backprop": loop(copy.deepcopy(start), x, y, OPTIMIZER), "lowered": fused("lowered", None)}
    return steps | {name: fused(*way) for name, way in WAYS.items()}


def main() -> None:
    """Measure the cases and write benchmarks/results/streams.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    cases = [max((c for c in CASES if c.title == title), key=lambda c: c.batch) for title in CHOSEN]
    rows = [
        report.compared(f"{case.title}, {case.batch}", report.in_turn(ways(case), arguments.rounds), SHOWN, PAIRS)
        for case in cases
    ]
    notes = (
        "Median and quartiles of the ratio within a round; below 1 is faster. Two threads, and Adam by torch's fused "
        "kernel, in every way." + report.load()
    )
    command = " ".join(["python -m benchmarks.streams", *sys.argv[1:]])
    table = report.table(["model, batch", *report.header(SHOWN, PAIRS)], rows)
    report.write("streams", "Streams", command, [table], notes)


if __name__ == "__main__":
    main()
