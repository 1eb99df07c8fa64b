"""Overlap across steps: the passes of a fused step in pieces, beside those of the steps before and after.

The forward pass of the next batch is cut at its subgraphs, and the error pass hands its updates over lowest subgraph
first. A piece waits for the pieces of earlier passes that write memory that it reads or writes, or read memory that it
writes, and for nothing else: subgraph 1 runs the next batch as soon as it is updated, while others still learn. What
is computed is what the passes give one after another, in the order in which they were added.

Made for threads on a CPU; the lanes are those of `graphlocal.targets.lanes`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphlocal.targets.accesses import Roots, annotate, root_of
from graphlocal.targets.fused_updates import with_updates
from graphlocal.targets.lanes import Flight, Part
from graphlocal.targets.pieces import Cut, Piece, cut
from graphlocal.targets.stacking import Stacking
from graphlocal.targets.training_graph import TrainingGraph, split


@dataclass(frozen=True, eq=False)
class Overlap:
    """Both passes of a fused step."""

    forward: Part
    error: Part


@dataclass(frozen=True)
class Alone:
    """What stands in place of an `Overlap` where the passes can't overlap with other steps', and why."""

    why: str


LEAST = 1e-3
"""Seconds, by estimate, of the actions of neighbouring subgraphs that make one piece: changing lanes costs, too."""


def overlap(lowered: TrainingGraph) -> Overlap | Alone:
    """The passes of a lowered training graph, fused and in pieces, or why they can't overlap.

    They can't on a GPU, and where the error pass writes what the forward pass writes too (running statistics).
    """
    training = with_updates(lowered, _neighbours(lowered))
    annotate(training)
    forward, error = split(training)
    devices = {tensor.device.type for tensor in (*forward.parameters(), *forward.buffers())}
    if devices != {"cpu"}:
        return Alone(f"the model is on {', '.join(sorted(devices)) or 'no device'}, and steps overlap on a CPU alone")
    found = Overlap(Part(cut(forward, join=False)), Part(cut(error, first=_lowest)))
    if shared := found.forward.written & found.error.written:
        return Alone(f"the error pass writes what the forward pass writes too ({_named(shared, (forward, error))})")
    return found if found.forward.cut.pieces else Alone("the forward pass computes nothing")


def _named(roots: Roots, passes: Iterable[nn.Module]) -> str:
    """What lies in this memory, by the names that the user's model gives it."""
    states = [s for m in passes for s in (*m.named_parameters(), *m.named_buffers()) if s[1].layout is torch.strided]
    names = [name for name, x in states if root_of(x) in roots]
    names += [root for root in sorted(roots) if "." in root]  # of what is not strided
    return ", ".join(dict.fromkeys(name.removeprefix("original.") for name in names)) or "a constant of the model"


def _neighbours(lowered: TrainingGraph) -> Callable[[str], str]:
    """New labels for actions: of neighbouring subgraphs the same, as far as they are too small for pieces."""
    nodes: defaultdict[int, list[fx.Node]] = defaultdict(list)
    for node in lowered.module.graph.nodes:
        action = node.meta.get("action") or ""
        if action[1:].isdigit():
            nodes[int(action[1:])].append(node)
    ends: dict[int, tuple[int, int]] = {}
    group: list[int] = []
    seconds = 0.0
    for number in sorted(nodes):
        group.append(number)
        seconds += Stacking().seconds(nodes[number])
        ends |= dict.fromkeys(group, (group[0], number))
        if seconds >= LEAST:
            group, seconds = [], 0.0

    def label(action: str) -> str:
        low, high = ends.get(int(action[1:]), (0, 0)) if action[1:].isdigit() else (0, 0)
        if low == high:
            return action
        return f"F{low}-F{high}" if action[0] == "F" else f"D{low}-U{high}"

    return label


_ACTION = re.compile(r"[DU](\d+)")


def _lowest(piece: Piece) -> int:
    """The lowest subgraph of a piece; 0 for what belongs to none."""
    return min((int(number) for number in _ACTION.findall(piece.name)), default=0)


def task(function: Callable[[], None], step: int) -> Flight:
    """A function for the caller's thread, as a pass of one piece."""
    piece = Piece(f"batch {step}", (), True)

    def call() -> tuple[Any, ...]:
        function()
        return ()

    return Flight(Part(Cut((), (), (piece,), (frozenset(),), (call,), (), lambda: None)), (), step, own=True)


def tensors(part: Part, module: Any) -> list[Tensor]:
    """The buffers of a module that a pass changes."""
    written = part.written
    return [b for b in module.buffers() if root_of(b) in written]
