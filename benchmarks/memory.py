"""Peak memory of a training step: backpropagation in its forms, biotorch's, and the fused local step.

Counted is what a step needs over what lives between steps (parameters, buffers, E, optimizer): activations,
errors, gradients, the loss; by torch's own allocators, which count kernels' workspaces too and see compiled code. The
same model, batch and Adam (torch's fused kernels) each time; the third step counts.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

import graphlocal
from benchmarks import report
from benchmarks.models import LARGE, SMALL, SPARSE, Case, by_biotorch, checkpointed, compiled, loss_fn, on_gpu
from benchmarks.report import Step
from graphlocal.live_memory import allocated_bytes, stored_bytes
from graphlocal.rules import RecLRA
from graphlocal.targets.liveness import liveness

CHOSEN = ("MLP 8×1024", "MLP 64×128 (deep, thin)")
CASES = (*(case for case in SMALL if case.title in CHOSEN), *LARGE)


@dataclass(frozen=True)
class Local:
    """How rec-LRA is compiled. again: subgraphs keep their inputs only."""

    partition: str = "auto"
    again: bool = False
    rule: RecLRA = field(default_factory=RecLRA)
    target: str = "auto"


LOCAL = {
    "rec-lra": Local(),
    "rec-lra, recomputed": Local(again=True),
    "rec-lra leaf": Local("leaf"),
    "rec-lra leaf, recomputed": Local("leaf", again=True),
    "rec-lra leaf, sparse E": Local("leaf", rule=SPARSE),
}
COMPILED = {
    "rec-lra, inductor": Local(target="inductor"),
    "rec-lra leaf, inductor": Local("leaf", target="inductor"),
}


@dataclass
class Found:
    """Bytes by the way's name: the peak of a step; what lives between steps and backprop has not; predicted peaks.

    feedback: E, or biotorch's feedback weights. lent: what stacked updates lie in.
    """

    case: Case
    parameters: int
    peaks: dict[str, int] = field(default_factory=dict)
    feedback: dict[str, int] = field(default_factory=dict)
    lent: dict[str, int] = field(default_factory=dict)
    predicted: dict[str, int] = field(default_factory=dict)


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of every way."""
    return torch.optim.Adam(parameters, 1e-4, fused=True)


def backprop(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """An ordinary training step."""
    optimizer = adam(model.parameters())

    def step() -> None:
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_backward(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A training step that updates each parameter, and frees its gradient, as soon as backpropagation has it."""

    def update(optimizer: torch.optim.Optimizer, _: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(partial(update, adam([parameter])))
    return lambda: loss_fn(model(x), y).backward()


def peak(step: Step, device: str) -> int:
    """The peak of the third step."""
    for _ in range(2):
        step()
    gc.collect()
    return allocated_bytes(step, torch.device(device))


def measure(case: Case, options: argparse.Namespace) -> Found:
    """All ways to train one model, one after another."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    start = case.make().to(options.device, dtype)
    x, y = case.example(options.device, dtype)
    found = Found(case, stored_bytes(start.parameters()))
    without_graph(found, start, x, y, options)
    loss = loss_bytes(start(x).detach().requires_grad_(), y)
    for way, how in (LOCAL | (COMPILED if options.compiled else {})).items():
        by_graphlocal(found, way, how, copy.deepcopy(start), x, y, loss)
        gc.collect()
    print(case.title, *(f"{way} {cell(found, way)}" for way in found.peaks), sep=" | ", file=sys.stderr)
    return found


def without_graph(found: Found, start: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> None:
    """Measure what knows nothing of graphlocal."""
    case = found.case

    def fresh(again: bool = False) -> nn.Module:
        model = copy.deepcopy(start)
        return checkpointed(case, model) if again else model

    make: dict[str, Callable[[], Step]] = {
        "backprop": lambda: backprop(fresh(), x, y),
        "backprop, checkpointed": lambda: backprop(fresh(again=True), x, y),
        "backprop, optimizer in backward": lambda: in_backward(fresh(), x, y),
        "backprop, checkpointed, optimizer in backward": lambda: in_backward(fresh(again=True), x, y),
    }
    if options.compiled:
        torch.compiler.reset()
        make["backprop, compiled"] = lambda: backprop(compiled(fresh()), x, y)
    for way, made in make.items():
        found.peaks[way] = peak(made(), options.device)
        gc.collect()
    for way, model in by_biotorch(case.title, fresh(), lambda model: backprop(model, x, y)).items():
        found.feedback[way] = stored_bytes(model.parameters()) - found.parameters
        found.peaks[way] = peak(backprop(model, x, y), options.device)


def by_graphlocal(found: Found, way: str, how: Local, model: nn.Module, x: Tensor, y: Tensor, loss: int) -> None:
    """Measure a fused local step, and predict it if its updates are in the graph. loss: what that needs itself."""
    local = graphlocal.compile(
        model, example_inputs=(x,), rule=how.rule, partition=how.partition, recompute=how.again, target=how.target
    )
    step = graphlocal.train_step(local, loss_fn, adam(local.parameters()))
    found.peaks[way] = peak(lambda: step(x, y), x.device.type)
    execution = local.compiled.execution
    passes = execution.known([x])
    if passes is not None and passes.updating is not None and way in LOCAL:
        found.predicted[way] = liveness(passes.updating, local.compiled.together).peak_with(loss)
    found.lent[way] = execution.scratch.bytes
    found.feedback[way] = stored_bytes(local.error_weights.buffers())


def loss_bytes(output: Tensor, y: Tensor) -> int:
    """The peak of the loss and its derivative by themselves."""
    return allocated_bytes(lambda: torch.autograd.grad(loss_fn(output, y), output), output.device)


def ratio(found: Found, way: str) -> float:
    """The peak over backprop's, with what a way keeps between steps and backprop does not."""
    return (found.peaks[way] + found.feedback.get(way, 0) + found.lent.get(way, 0)) / found.peaks["backprop"]


def mb(count: int) -> str:
    """Megabytes."""
    return f"{count / 1e6:.1f}"


def cell(found: Found, way: str) -> str:
    """Megabytes, and the ratio to backprop."""
    if way not in found.peaks:
        return "fails"
    return mb(found.peaks[way]) + ("" if way == "backprop" else f" ({ratio(found, way):.2f})")


def tables(found: list[Found]) -> list[str]:
    """A column for each model: peaks, what lives between steps, predictions."""
    header = [f"{f.case.title}, batch {f.case.batch}" for f in found]
    peaks = [[way, *(cell(f, way) for f in found)] for way in names(found)]
    between = [["parameters", *(mb(f.parameters) for f in found)]]
    for name, kept in (("E", "feedback"), ("lent", "lent")):
        alike: dict[tuple[int, ...], list[str]] = {}
        for way in names(found):
            alike.setdefault(tuple(getattr(f, kept).get(way, 0) for f in found), []).append(way)
        between += [[f"{name}: {'; '.join(ways)}", *map(mb, sizes)] for sizes, ways in alike.items() if any(sizes)]
    predicted = [[way, *(prediction(f, way) for f in found)] for way in LOCAL]
    return [
        "## Peaks, MB\n\n" + report.table(["way", *header], peaks),
        "## Between steps, MB\n\n" + report.table(["what", *header], between),
        "## Predicted peaks, MB\n\n" + report.table(["way", *header], predicted),
    ]


def names(found: list[Found]) -> list[str]:
    """The ways that were measured of any model."""
    return list(dict.fromkeys(way for f in found for way in f.peaks))


def prediction(found: Found, way: str) -> str:
    """Megabytes, and the ratio of the measured peak to them."""
    if way not in found.predicted:
        return "-"
    return f"{mb(found.predicted[way])} ({found.peaks[way] / found.predicted[way]:.2f})"


def plot(found: list[Found], name: str) -> None:
    """Bars of the peaks, relative to backprop's, as a picture beside the table."""
    from matplotlib import colormaps

    ways = names(found)
    width = 0.84 / len(ways)
    with report.picture(name, 13, 4.6) as axes:
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        for k, way in enumerate(ways):
            heights = [ratio(f, way) if way in f.peaks else math.nan for f in found]
            places = [i + width * (k - (len(ways) - 1) / 2) for i in range(len(found))]
            axes.bar(places, heights, 0.95 * width, label=way)
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set_xticks(range(len(found)), [f"{f.case.title}\nbatch {f.case.batch}" for f in found], fontsize=7)
        axes.set_ylabel("peak of a step, with E, / backprop's")
        axes.set_ylim(0, 1.45 * axes.get_ylim()[1])
        axes.legend(fontsize=8, ncols=3, loc="upper center")


def main() -> None:
    """Measure the cases and write benchmarks/results/memory.md and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="a part of the titles to measure")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too; its first steps take minutes")
    options = parser.parse_args()
    cases = [on_gpu(case) if options.device == "cuda" else case for case in CASES if options.only in case.title]
    found = [measure(case, options) for case in cases]
    parts = ["memory", *(["compiled"] if options.compiled else [])]
    parts += [] if (options.device, options.dtype) == ("cpu", "float32") else [options.device, options.dtype]
    name = "_".join(parts)
    plot(found, name)
    command = " ".join(["python -m benchmarks.memory", *sys.argv[1:]])
    report.write(name, "Memory of a training step", command, [*tables(found), f"![peaks]({name}.png)"], NOTES)


NOTES = """\
Peak of a step over what lives between steps, and in brackets its ratio to backprop's, with what the way keeps between
steps and backprop doesn't (E, lent) added. Counted by torch's allocators: on a CPU by the events that torch.profiler
records of it, which see compiled code and kernels' workspaces too.

Optimizer in backward: PyTorch's own way to free each gradient at once, which local learning must be compared with as
well: `Tensor.register_post_accumulate_grad_hook` and one fused Adam for each parameter, which is updated as soon as
backpropagation has its whole gradient. Checkpointing works on the blocks; a Sequential is cut into about as many
segments as each has layers.

rec-lra is the fused step (`train_step`) at depth 1, of partition auto but for leaf. Recomputed:
`graphlocal.compile(..., recompute=True)`. Inductor: `target="inductor"`, which hands gradients over in a few pieces. E
of biotorch is its feedback weights; it fails on linear layers whose inputs are no matrices. Lent: memory in which
stacked updates wait for the optimizer. Predicted: by the training graph's liveness, and what the loss takes by itself,
without kernels' workspaces, which convolutions on a CPU have; in brackets the measured peak in relation to that."""


if __name__ == "__main__":
    main()
