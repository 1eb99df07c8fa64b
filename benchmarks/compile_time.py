"""Time of a compilation against the number of operations, from 50 to 5,000: tracing, passes, emission, cached."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import graphlocal
from benchmarks import report
from graphlocal import compiler, pipeline
from graphlocal import trace as tracing
from graphlocal.lift import lift

WIDTH = 8
SIZES = (50, 150, 500, 1500, 5000)


class Block(nn.Module):
    """x + W2 tanh(W1 norm(x)): five operations."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(self.norm(x))))


@dataclass(frozen=True)
class Times:
    """Seconds. check: the self-check within tracing, real steps of the model."""

    operations: int
    subgraphs: int
    export: float
    trace: float
    check: float
    passes: float
    emit: float
    again: float


def measure(operations: int) -> Times:
    """One size, in this process."""
    graphlocal.cache.clear()
    model = nn.Sequential(*(Block() for _ in range(operations // 5)), nn.Linear(WIDTH, 10))
    x = torch.randn(4, WIDTH)
    export = _seconds(lambda: torch.export.export(model, (x,), strict=False, dynamic_shapes=_open_batch(x)))
    places = ((compiler, "trace"), (tracing, "self_check"), (pipeline, "verify"))
    with report.timed_calls(*places) as seconds:
        start = time.perf_counter()
        local = graphlocal.compile(model, example_inputs=(x,))
        total = time.perf_counter() - start
    during = sum(step.seconds for step in local.compiled.records) + seconds["verify"]
    alone = _passes_alone(local)
    copy = nn.Sequential(*(Block() for _ in range(operations // 5)), nn.Linear(WIDTH, 10))
    again = _seconds(lambda: graphlocal.compile(copy, example_inputs=(x,)))
    trace, check = seconds["trace"], seconds["self_check"]
    return Times(len(local.graph.operations), len(local.graph.subgraphs), export, trace - check, check, alone,
                 total - trace - during, again)  # fmt: skip


def _passes_alone(local: graphlocal.LocalModule) -> float:
    """The pipeline with its verifier, the quickest of three runs; collecting garbage costs each run something else."""
    graph = lift(local.compiled.traced, local.original)
    return min(_seconds(lambda: pipeline.run(replace(graph), compiler.passes(local.options))) for _ in range(3))


def _open_batch(x: Tensor) -> tuple[dict[int, object]]:
    return ({0: torch.export.Dim.AUTO},)


def _seconds(run: object) -> float:
    start = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - start


def slope(rows: list[Times], part: str) -> float:
    """The exponent p of time ~ operations^p, by least squares over the sizes from 500 on."""
    points = [
        (math.log(row.operations), math.log(max(getattr(row, part), 1e-4))) for row in rows if row.operations > 400
    ]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of operations")
    sizes = parser.parse_args().sizes
    torch.set_num_threads(1)
    measure(50)  # imports
    rows = []
    for size in sizes:
        rows.append(measure(size))
        print(rows[-1], flush=True)
    parts = ("export", "trace", "check", "passes", "emit", "again")
    table = report.table(
        ["operations", "subgraphs", "export alone, s", "tracing, s", "self-check, s", "passes, s", "emission, s",
         "tracing and passes / export", "second compilation, s"],
        [[str(r.operations), str(r.subgraphs), f"{r.export:.2f}", f"{r.trace:.2f}", f"{r.check:.2f}", f"{r.passes:.3f}",
          f"{r.emit:.2f}", f"{(r.trace + r.passes) / r.export:.2f}", f"{r.again:.2f}"] for r in rows],
    )  # fmt: skip
    slopes = ", ".join(f"{part} {slope(rows, part):.2f}" for part in parts) if len(rows) > 3 else "too few sizes"
    notes = f"Exponent p of time ~ operations^p, from 500 operations on: {slopes}. The passes include the verifier."
    report.write("compile_time", "Compile time", "python -m benchmarks.compile_time", [table], notes)


if __name__ == "__main__":
    main()
