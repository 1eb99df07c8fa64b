"""Time of a fused training step with stacked updates (target="batched"), against the lowered target and backprop.

All ways run in one process, once a round and in turn, on one thread; CPU time, so that other work on the machine
matters less. Fused steps; Adam by torch's fused kernel in every way. `auto` says whether the cost model of
target="auto" chooses to stack.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch

import graphlocal
from benchmarks import report
from benchmarks.step_time import OPTIMIZERS, Case, Encoder, Step, loop, loss_fn, mlp

CASES = (
    (Case("MLP 64×128, batch 32", lambda: mlp(128, 64, 64), (64,), 32), "auto"),
    (Case("MLP 32×256, batch 32", lambda: mlp(256, 32, 64), (64,), 32), "auto"),
    (Case("MLP 16×32, batch 32", lambda: mlp(32, 16, 64), (64,), 32), "auto"),
    (Case("MLP 8×1024, batch 128", lambda: mlp(1024, 8, 784), (784,), 128), "auto"),
    (Case("transformer encoder 6×192, batch 4, blocks", Encoder, (64, 192), 4), "auto"),
    (Case("transformer encoder 6×192, batch 4, leaves", Encoder, (64, 192), 4), "leaf"),
)
PAIRS = (("lowered", "backprop"), ("batched", "lowered"), ("batched", "backprop"), ("auto", "backprop"))
OPTIMIZER = "adam-fused"


def ways(case: Case, partition: str) -> tuple[dict[str, Step], dict[str, graphlocal.LocalModule]]:
    """The same training step in each way, and the compiled models of those that are."""
    torch.manual_seed(0)
    start = case.make()
    x, y = torch.randn(case.batch, *case.shape), torch.randint(case.classes, (case.batch,))
    steps, models = {"backprop": loop(copy.deepcopy(start), x, y, OPTIMIZER)}, {}
    for target in ("lowered", "batched", "auto"):
        model = copy.deepcopy(start)
        local = models[target] = graphlocal.compile(model, example_inputs=(x,), partition=partition, target=target)
        step = graphlocal.train_step(local, loss_fn, OPTIMIZERS[OPTIMIZER](local.parameters()))
        steps[target] = lambda step=step: step(x, y)  # type: ignore[misc]
    return steps, models


def measure(case: Case, partition: str, rounds: int) -> list[str]:
    """A row of the table."""
    steps, models = ways(case, partition)
    times = report.in_turn(steps, rounds, time.process_time)
    row = report.compared(case.title, times, ("backprop",), PAIRS)
    return [*row, "stacks" if models["auto"].compiled.execution.batches else "does not stack"]


def main() -> None:
    """Measure the cases and write benchmarks/results/batch.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(case, partition, arguments.rounds) for case, partition in CASES]
    notes = (
        "CPU time, median and quartiles of the ratio within a round; below 1 is faster. Adam by torch's fused kernel "
        "in every way." + report.load()
    )
    command = " ".join(["python -m benchmarks.batch", *sys.argv[1:]])
    table = report.table(["model", *report.header(("backprop",), PAIRS), "auto"], rows)
    report.write("batch", "Stacked updates", command, [table], notes)


if __name__ == "__main__":
    main()
