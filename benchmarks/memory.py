"""Peak memory of a training step: backpropagation, with gradient checkpointing, and the fused local step.

Counted is what a step needs over what lives between steps (parameters, buffers, E, optimizer): activations,
errors, gradients, the loss. On a CPU the bytes of all tensors that live at one time; on a GPU by CUDA's allocator,
which counts workspaces too. The same model, batch and Adam (torch's fused kernels) each time; the third step counts.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import graphlocal
from benchmarks import report
from benchmarks.models import LARGE, SMALL, SPARSE, Case, checkpointed, loss_fn, on_gpu
from graphlocal.live_memory import peak_bytes
from graphlocal.partial_optimizer import TOGETHER
from graphlocal.rules import RecLRA
from graphlocal.targets.liveness import liveness

CHOSEN = ("MLP 8×1024", "MLP 64×128 (deep, thin)")
CASES = (*(case for case in SMALL if case.title in CHOSEN), *LARGE)
LOCAL = {
    "rec-lra": ("auto", False, RecLRA()),
    "rec-lra, recomputed": ("auto", True, RecLRA()),
    "rec-lra leaf": ("leaf", False, RecLRA()),
    "rec-lra leaf, recomputed": ("leaf", True, RecLRA()),
    "rec-lra leaf, sparse E": ("leaf", False, SPARSE),
}
"""Name: the partition, whether subgraphs keep their inputs only, and the rule."""
WAYS = ("backprop", "backprop, checkpointed", *LOCAL)


@dataclass(frozen=True)
class Found:
    """Bytes: parameters, E, what stacks lie in, the peak of each way, and what was predicted of rec-lra's peaks."""

    case: Case
    parameters: int
    feedback: dict[str, int]
    lent: dict[str, int]
    peaks: dict[str, int]
    predicted: dict[str, int]


def backprop(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """An ordinary training step."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)

    def step() -> None:
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak(step: Callable[[], object], device: str) -> int:
    """The peak of the third step."""
    for _ in range(2):
        step()
    gc.collect()
    return peak_bytes(step, torch.device(device))


def measure(case: Case, device: str, dtype: torch.dtype) -> Found:
    """All ways to train one model, one after another."""
    torch.manual_seed(0)
    start = case.make().to(device, dtype)
    x, y = case.example(device, dtype)
    peaks, predicted, feedback, lent = {}, {}, {}, {}
    loss = loss_bytes(start(x).detach().requires_grad_(), y)
    peaks["backprop"] = peak(backprop(copy.deepcopy(start), x, y), device)
    peaks["backprop, checkpointed"] = peak(backprop(checkpointed(case, copy.deepcopy(start)), x, y), device)
    for way, (partition, again, rule) in LOCAL.items():
        local = graphlocal.compile(
            copy.deepcopy(start), example_inputs=(x,), rule=rule, partition=partition, recompute=again
        )
        optimizer = torch.optim.Adam(local.parameters(), 1e-4, fused=True)
        step = graphlocal.train_step(local, loss_fn, optimizer)
        peaks[way] = peak(lambda step=step: step(x, y), device)  # type: ignore[misc]
        execution = local.compiled.execution
        passes = execution.known([x])
        assert passes is not None
        assert passes.updating is not None
        predicted[way] = liveness(passes.updating, TOGETHER).peak_with(loss)
        lent[way] = execution.scratch.bytes
        feedback[way] = sum(t.numel() * t.element_size() for t in local.error_weights.buffers())
        del local, optimizer, step, execution, passes
        gc.collect()
    size = sum(p.numel() * p.element_size() for p in start.parameters())
    found = Found(case, size, feedback, lent, peaks, predicted)
    print(row(found), file=sys.stderr)
    return found


def loss_bytes(output: torch.Tensor, y: torch.Tensor) -> int:
    """The peak of the loss and its derivative by themselves."""
    return peak_bytes(lambda: torch.autograd.grad(loss_fn(output, y), output), output.device)


def row(found: Found) -> list[str]:
    """A row of the table: megabytes, and the ratio to backprop."""
    cells = [found.case.title, str(found.case.batch), mb(found.parameters)]
    cells += [mb(found.feedback[way]) for way in ("rec-lra", "rec-lra leaf", "rec-lra leaf, sparse E")]
    cells += [mb(found.lent["rec-lra"]), mb(found.lent["rec-lra leaf"])]
    for way in WAYS:
        cells.append(mb(found.peaks[way]) + ("" if way == "backprop" else f" ({ratio(found, way):.2f})"))
    return cells + [mb(found.predicted[way]) for way in LOCAL]


def ratio(found: Found, way: str) -> float:
    """The peak over backprop's, with what a way keeps between steps and backprop does not."""
    return (found.peaks[way] + found.feedback.get(way, 0) + found.lent.get(way, 0)) / found.peaks["backprop"]


def mb(size: int) -> str:
    """Megabytes."""
    return f"{size / 1e6:.1f}"


def plot(found: list[Found], name: str) -> None:
    """Bars of the peaks, relative to backprop's, as a picture beside the table."""
    width = 0.84 / len(WAYS)
    with report.picture(name, 11, 4) as axes:
        for k, way in enumerate(WAYS):
            heights = [ratio(f, way) for f in found]
            places = [i + width * (k - (len(WAYS) - 1) / 2) for i in range(len(found))]
            axes.bar(places, heights, 0.95 * width, label=way)
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set_xticks(range(len(found)), [f"{f.case.title}\nbatch {f.case.batch}" for f in found], fontsize=7)
        axes.set_ylabel("peak of a step, with E, / backprop's")
        axes.set_ylim(0, 1.3)
        axes.legend(fontsize=8, ncols=3, loc="upper center")


def main() -> None:
    """Measure the cases and write benchmarks/results/memory.md and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="a part of the titles to measure")
    arguments = parser.parse_args()
    cases = [on_gpu(case) if arguments.device == "cuda" else case for case in CASES if arguments.only in case.title]
    found = [measure(case, arguments.device, getattr(torch, arguments.dtype)) for case in cases]
    header = [
        "model",
        "batch",
        "parameters, MB",
        "E, MB",
        "E of leaf, MB",
        "sparse E of leaf, MB",
        "lent, MB",
        "lent of leaf, MB",
        *(f"{way}, MB" for way in WAYS),
    ]
    header += [f"predicted: {way}, MB" for way in LOCAL]
    notes = (
        "Peak of a step over what lives between steps, and in brackets its ratio to backprop's, with E and what is "
        "lent added on rec-lra's side. Lent: memory in which stacked updates wait for the optimizer. Partition auto "
        "but for leaf, rec-lra at depth 1. Checkpointing works on the blocks; a Sequential is cut into about as many "
        "segments as each has layers. Predicted: by the training graph's liveness, and what the loss takes by itself. "
        "`recomputed`: `graphlocal.compile(..., recompute=True)`."
    )
    suffix = "" if arguments.device == "cpu" else f"_{arguments.device}_{arguments.dtype}"
    plot(found, f"memory{suffix}")
    tables = [report.table(header, [row(f) for f in found]), f"![peaks](memory{suffix}.png)"]
    command = " ".join(["python -m benchmarks.memory", *sys.argv[1:]])
    report.write(f"memory{suffix}", "Memory of a training step", command, tables, notes)


if __name__ == "__main__":
    main()
