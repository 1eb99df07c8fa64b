"""Time of a training step in ONNX Runtime, against torch: eager backpropagation, and the fused local step.

The same model, rule, batch and Adam; every round times each way once, so that a noisy machine slows all alike, and the
ratios are taken within the round. Times are CPU time, which other work on the machine disturbs less; with more than one
thread they add up over the threads.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch

import graphlocal
from benchmarks import report
from benchmarks.step_time import CASES, Case, Step, loop, loss_fn
from graphlocal.targets.onnx.trainer import OnnxTrainer

WAYS = ("torch: backprop", "torch: rec-lra, fused", "ONNX Runtime: rec-lra", "ONNX Runtime: backprop")


def ways(case: Case, threads: int, folder: Path) -> dict[str, Step]:
    """The same training step in torch and in ONNX Runtime, each on a model of its own."""
    torch.manual_seed(0)
    start = case.make()
    x, y = torch.randn(case.batch, *case.shape), torch.randint(case.classes, (case.batch,))

    def compiled(rule: str) -> tuple[graphlocal.LocalModule, torch.optim.Optimizer]:
        local = graphlocal.compile(copy.deepcopy(start), example_inputs=(x,), rule=rule)
        return local, torch.optim.Adam(local.parameters(), 1e-4)

    def in_onnx(rule: str) -> Step:
        local, adam = compiled(rule)
        local.export(folder / "step.onnx", kind="training-step", loss_fn=loss_fn, optimizer=adam, y=y)
        trainer = OnnxTrainer(folder / "step.onnx", threads=threads)
        inputs, labels = x.numpy(), y.numpy()
        return lambda: trainer.step(inputs, labels)

    local, adam = compiled("rec-lra")
    fused = graphlocal.train_step(local, loss_fn, adam)
    steps = (loop(copy.deepcopy(start), x, y), lambda: fused(x, y), in_onnx("rec-lra"), in_onnx("backprop"))
    return dict(zip(WAYS, steps, strict=True))


def measure(case: Case, rounds: int, threads: int) -> list[str]:
    """A row of the table: milliseconds of the two fused steps, and the ratios with their spread."""
    with tempfile.TemporaryDirectory() as folder:
        times = report.in_turn(ways(case, threads, Path(folder)), rounds, time.process_time)
    row = [case.title, str(case.batch), *(f"{1000 * statistics.median(found):.2f}" for found in times.values())]
    torch_backprop, torch_fused, onnx_fused, onnx_backprop = times.values()
    pairs = ((onnx_fused, torch_backprop), (onnx_fused, torch_fused), (onnx_fused, onnx_backprop))
    row += [report.ratio(above, below) for above, below in pairs]
    print(" | ".join(row), file=sys.stderr)
    return row


def main() -> None:
    """Measure the cases and write benchmarks/results/onnx_step.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    header = ["model", "batch", *(f"{name}, ms" for name in WAYS)]
    header += ["ONNX rec-lra / torch backprop", "ONNX rec-lra / torch rec-lra", "ONNX rec-lra / ONNX backprop"]
    notes = (
        f"ONNX Runtime {onnxruntime.__version__}, {arguments.threads} thread(s) each, Adam, partition auto. Times are "
        "medians; ratios are medians and quartiles over rounds, taken within the round: below 1, ONNX Runtime (or "
        "rec-lra) is faster. Times are CPU time of the process. Not measured on a GPU."
    )
    rows: list[list[str]] = []
    for case in CASES:  # written after each, since the deep models take minutes to export
        rows.append(measure(case, arguments.rounds, arguments.threads))
        report.write("onnx_step", "A training step in ONNX Runtime", "python -m benchmarks.onnx_step",
                     [report.table(header, rows)], notes)  # fmt: skip


if __name__ == "__main__":
    main()
