"""What the pieces of the streams target really read and write is ordered, whatever their operators declare.

A race detector for one thread: each piece runs under a mode that sees the memory its operators are given, and finds
what they changed by comparing contents. Two pieces that touch one memory, one of them changing it, must have a path of
`needs` between them; so must two that draw random numbers.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import pytest
import torch
from test_streams import CASES, call_instead, compiled, passes, reachable, trained
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphlocal.targets.lanes import Part
from graphlocal.targets.streams import StreamedPass

RANDOM = -1
"""Stands for the generator of random numbers, among memory."""


@dataclass
class Trace:
    """Which pieces read and wrote what memory. kept: all of it, so that none is used for something else."""

    reads: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    writes: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    kept: list[Any] = field(default_factory=list)


class Watch(TorchDispatchMode):
    """Adds to a trace what the operators of one piece do; memory that they make is memory that they write."""

    def __init__(self, trace: Trace, piece: int) -> None:
        super().__init__()
        self.trace, self.piece = trace, piece

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = memory((args, kwargs))
        before, random = {place: content(m).clone() for place, m in given.items()}, torch.get_rng_state()
        result = function(*args, **(kwargs or {}))
        for place, m in given.items():
            self.trace.reads[place].add(self.piece)
            if not torch.equal(content(m), before[place]):
                self.trace.writes[place].add(self.piece)
        for place in memory(result).keys() - given.keys():
            self.trace.writes[place].add(self.piece)
        if not torch.equal(random, torch.get_rng_state()):
            self.trace.writes[RANDOM].add(self.piece)
        self.trace.kept += [*given.values(), *memory(result).values()]
        return result


def memory(values: Any) -> dict[int, Any]:
    tensors = [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor) and x.layout is torch.strided]
    return {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}


def content(memory: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(memory)


def watched(p: StreamedPass, monkeypatch) -> Trace:
    """Let every piece of a pass run under a watch."""
    trace = Trace()

    def under_watch(i, function):
        def run(*values):
            with Watch(trace, i):
                return function(*values)

        return run

    call_instead(p, tuple(under_watch(i, f) for i, f in enumerate(p.cut.functions)), monkeypatch)
    return trace


def races(p: StreamedPass, trace: Trace) -> list[tuple[str, str]]:
    """The pieces that touch one memory, at least one of them changing it, and are not ordered."""
    found = set()
    for place, writers in trace.writes.items():
        for a, b in combinations(sorted(writers | trace.reads[place]), 2):
            if {a, b} & writers and not reachable(p.cut.needs, a, b):
                found.add((p.cut.pieces[a].name, p.cut.pieces[b].name))
    return sorted(found)


@pytest.fixture(autouse=True)
def updates_at_once(monkeypatch) -> None:
    """The optimizer updates each subgraph in its own piece, however small."""
    monkeypatch.setattr(sys.modules["graphlocal.partial_optimizer"], "TOGETHER", 1)


@pytest.mark.parametrize(("name", "rule"), CASES, ids=str)
def test_what_pieces_really_touch_is_ordered(name, rule, monkeypatch):
    local = compiled(name, rule, target="streams", streams=1)
    trained(name, local, 2)
    with monkeypatch.context() as patch:
        traces = [(p, watched(p, patch)) for p in passes(local)]
        trained(name, local, 1)
    assert any(trace.writes for _, trace in traces)
    assert [races(p, trace) for p, trace in traces if races(p, trace)] == []


@pytest.mark.parametrize("name", ["small_resnet", "deep_mlp", "dropout_mlp"])
def test_the_detector_finds_pieces_that_are_not_ordered(name, monkeypatch):
    local = compiled(name, target="streams", streams=1)
    trained(name, local, 2)
    with monkeypatch.context() as patch:
        traces = [(p, watched(p, patch)) for p in passes(local)]
        trained(name, local, 1)
    p, trace = next(found for found in traces if any(piece.updates for piece in found[0].cut.pieces))
    monkeypatch.setattr(p, "part", Part(replace(p.cut, needs=tuple(frozenset() for _ in p.cut.needs))))
    updates = {piece.name for piece in p.cut.pieces if piece.updates}
    assert updates == {later for _, later in races(p, trace) if later in updates}
