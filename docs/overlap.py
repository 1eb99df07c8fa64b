"""Draws docs/pictures/overlap-cpu.png: which lane ran which piece when, in one real step on two threads.

`OMP_NUM_THREADS=1 python docs/overlap.py`, on two cores or more, trains a wide perceptron with target="streams" on one
thread and on two, step by step in turn, and takes of the steps after the first ones, for each, the one that was over
soonest (others may share the machine). Updates that overlap are not always done sooner, so the title gives both times.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import nn

import graphlocal
from graphlocal.targets.lanes import Ran
from graphlocal.targets.streams import StreamedPass

FILE = Path(__file__).resolve().parent / "pictures" / "overlap-cpu.png"
WIDTH, HIDDEN, BATCH, STEPS = 1024, 8, 256, 120
COLOURS = {"update": "#4c78a8", "optimizer": "#f58518", "error": "#bab0ac"}


def trained(streams: int) -> tuple[StreamedPass, Callable[[], list[Ran]]]:
    """The error pass on `streams` threads, and what runs a training step and returns what ran in its error pass."""
    torch.manual_seed(0)
    layers = [layer for _ in range(HIDDEN) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    x, y = torch.randn(BATCH, WIDTH), torch.randint(10, (BATCH,))
    local = graphlocal.compile(nn.Sequential(*layers, nn.Linear(WIDTH, 10)), example_inputs=x, rule="rec-lra",
                               partition="leaf", target="streams", streams=streams)  # fmt: skip
    step = graphlocal.train_step(local, nn.functional.cross_entropy, torch.optim.SGD(local.parameters(), 0.01))
    step(x, y)
    (passes,) = local.compiled.execution._passes.values()
    error = passes.error
    assert isinstance(error, StreamedPass)

    def run() -> list[Ran]:
        error.trace = []
        step(x, y)
        return error.trace

    return error, run


def milliseconds(trace: list[Ran]) -> float:
    """From the start of the first piece to the end of the last."""
    return 1e3 * (max(ran.end for ran in trace) - min(ran.start for ran in trace))


def fastest() -> list[tuple[StreamedPass, list[Ran]]]:
    """The error pass on one thread and on two, and what ran in the fastest step of each."""
    both = [trained(streams) for streams in (1, 2)]
    traces: list[list[list[Ran]]] = [[], []]
    for _ in range(STEPS):
        for (_, run), found in zip(both, traces, strict=True):
            found.append(run())
    return [(error, min(found[5:], key=milliseconds)) for (error, _), found in zip(both, traces, strict=True)]


def verdict(one: float, two: float) -> str:
    """Both times in words; differences of a twentieth are none."""
    if abs(two - one) < one / 20:
        compared = "no sooner and no later"
    else:
        compared = "sooner" if two < one else "later: here overlapping does not pay"
    return f"{one:.0f} ms on one thread, {two:.0f} ms on two: updates overlap, and the pass is over {compared}"


def draw() -> None:
    """One panel for each number of threads, on one time axis."""
    figure, panels = plt.subplots(2, 1, figsize=(13, 4.2), sharex=True, gridspec_kw={"height_ratios": [1, 2]})
    found = fastest()
    totals = [milliseconds(trace) for _, trace in found]
    for axis, streams, (error, trace), total in zip(panels, (1, 2), found, totals, strict=True):
        start = min(ran.start for ran in trace)
        for ran in trace:
            piece = error.cut.pieces[ran.piece]
            kind = "optimizer" if piece.updates else "error" if piece.name == "error" else "update"
            at, length = 1e3 * (ran.start - start), 1e3 * (ran.end - ran.start)
            axis.barh(ran.lane, length, left=at, height=0.8, color=COLOURS[kind], edgecolor="white", linewidth=0.6)
            if kind == "update" and length > total / 50:
                axis.text(at + length / 2, ran.lane, piece.name.replace(" ", "\n"), ha="center", va="center",
                          color="white", fontsize=8, fontweight="bold", clip_on=True)  # fmt: skip
        axis.set_yticks(range(streams), [f"thread {lane + 1}" for lane in range(streams)])
        axis.set_ylim(streams - 0.5, -0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{streams} thread{'s' * (streams > 1)}: {total:.1f} ms", loc="left", fontsize=10)
        print(f"{streams} threads: {total:.2f} ms")
    panels[-1].set_xlabel("milliseconds since the loss was known")
    names = {"update": "displacement and update (D, U)", "optimizer": "optimizer (on the caller's thread)"}
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in names]
    figure.legend(handles, list(names.values()), loc="upper right", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"Error pass of an MLP {HIDDEN}×{WIDTH}, batch {BATCH}, rec-lra, leaf subgraphs.\n"
                    + verdict(*totals), x=0.01, ha="left", fontsize=11)  # fmt: skip
    figure.tight_layout()
    figure.savefig(FILE, dpi=130)


if __name__ == "__main__":
    draw()
