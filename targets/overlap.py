"""Overlap across steps: the passes of a fused step in pieces, beside those of the steps before and after.

The forward pass of the next batch is cut at its subgraphs, and the error pass hands its updates over lowest subgraph
first. A piece waits for the pieces of earlier passes that write memory that it reads or writes, or read memory that it
writes, and for nothing else: subgraph 1 runs the next batch as soon as it is updated, while others still learn. What
is computed is what the passes give one after another, in the order in which they were added.

Made for threads on a CPU; the lanes are those of `graphlocal.targets.streams`.
"""

from __future__ import annotations

import heapq
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from graphlocal.targets.accesses import ARGUMENTS, RANDOM, Access, annotate, outlives
from graphlocal.targets.fused_updates import with_updates
from graphlocal.targets.pieces import Cut, Piece, cut
from graphlocal.targets.stacking import Stacking
from graphlocal.targets.streams import Ran, first_values, join, pool, release
from graphlocal.targets.training_graph import TrainingGraph, split

Waits = Sequence[frozenset[int]]
"""For each piece of a pass, the places of another pass's pieces that it waits for."""


@dataclass(frozen=True, eq=False)
class Part:
    """A pass in pieces that may overlap with others."""

    cut: Cut

    @cached_property
    def accesses(self) -> tuple[Access, ...]:
        """What each piece does to memory that outlives a step, and to the arguments."""
        found = []
        for piece in self.cut.pieces:
            of_nodes = [node.meta.get("access", Access()) for node in piece.nodes]
            reads = {r for a in of_nodes for r in a.reads if outlives(r) or r == ARGUMENTS}
            found.append(Access(frozenset(reads), frozenset(r for a in of_nodes for r in a.writes if outlives(r))))
        return tuple(found)

    @cached_property
    def followers(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.cut.pieces]
        for i, needs in enumerate(self.cut.needs):
            for j in needs:
                found[j].append(i)
        return tuple(map(tuple, found))

    @cached_property
    def readers(self) -> Counter[str]:
        return Counter(name for piece in self.cut.pieces for name in piece.reads) + Counter(self.cut.returned)

    def waits(self, earlier: Part) -> Waits:
        """The pieces of an earlier pass that each of this one's has to wait for."""
        return tuple(frozenset(_conflicting(mine, earlier)) for mine in self.accesses)

    @property
    def written(self) -> frozenset[str]:
        """The memory that outlives a step and that this pass changes, random numbers apart."""
        return frozenset().union(*(access.writes for access in self.accesses)) - {RANDOM}

    @cached_property
    def before_a_batch(self) -> frozenset[int]:
        """The pieces after which the next batch is fetched: those that read this one, draw, or change a buffer."""
        found = enumerate(zip(self.cut.pieces, self.accesses, strict=True))
        return frozenset(i for i, (p, a) in found if ARGUMENTS in a.reads or (a.writes and not p.updates))


def _conflicting(mine: Access, earlier: Part) -> list[int]:
    return [
        j for j, other in enumerate(earlier.accesses)
        if mine.writes & (other.reads | other.writes) or mine.reads & other.writes
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Overlap:
    """Both passes of a fused step."""

    forward: Part
    error: Part


LEAST = 1e-3
"""Seconds, by estimate, of the actions of neighbouring subgraphs that make one piece: changing lanes costs, too."""


def overlap(lowered: TrainingGraph) -> Overlap | None:
    """The passes of a lowered training graph, fused and in pieces, or None where they can't overlap.

    That is on a GPU, and where the error pass writes what the forward pass writes too (running statistics).
    """
    training = with_updates(lowered, _neighbours(lowered))
    annotate(training)
    forward, error = split(training)
    devices = {tensor.device.type for tensor in (*forward.parameters(), *forward.buffers())}
    found = Overlap(Part(cut(forward, join=False)), Part(cut(error, first=_lowest)))
    shared = found.forward.written & found.error.written
    return None if devices != {"cpu"} or shared or not found.forward.cut.pieces else found


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


class Flight:
    """One pass while it runs. All that changes is changed under the lock of its lanes.

    step: the number of its batch. own: whether the caller alone runs its pieces, ahead of all others.
    """

    def __init__(self, part: Part, arguments: Sequence[Any], step: int, own: bool = False) -> None:
        self.part, self.cut, self.step, self.own = part, part.cut, step, own
        self.order = 0  # among the passes of its lanes
        self.table = first_values(part.cut, *arguments)
        self.waiting = [len(needs) for needs in part.cut.needs]
        self.over = [False] * len(self.waiting)
        self.left = len(self.waiting)
        self.readers = dict(part.readers)
        self.later: list[list[tuple[Flight, int]]] = [[] for _ in self.waiting]

    def result(self) -> Any:
        """What the pass returns; it must be over."""
        return self.cut.finish(*(self.table[name] for name in self.cut.returned))


def task(function: Callable[[], None], step: int) -> Flight:
    """A function for the caller's thread, as a pass of one piece."""
    piece = Piece(f"batch {step}", (), True)

    def call() -> tuple[Any, ...]:
        function()
        return ()

    return Flight(Part(Cut((), (), (piece,), (frozenset(),), (call,), (), lambda: None)), (), step, own=True)


class Lanes:
    """Runs pieces of several passes, on the caller's thread and `streams - 1` helpers; updates on the caller's.

    trace: set it to a list to have every piece that ran appended, with the number of its batch and its name.
    """

    def __init__(self, streams: int) -> None:
        self.streams = streams
        self.trace: list[tuple[int, str, Ran]] | None = None
        self.lock = threading.Lock()
        self.idle = threading.Condition(self.lock), threading.Condition(self.lock)
        self.clear()

    def clear(self) -> None:
        """Drop what has not run; no lane may be working."""
        self.ready: list[tuple[int, int, int, Flight]] = []  # (kind, count of passes, place, pass)
        self.updates: list[tuple[int, int, int, Flight]] = []
        self.count = self.threads = 0
        self.failure: BaseException | None = None

    def add(self, flight: Flight, after: Sequence[tuple[Flight, Waits]] = ()) -> None:
        """Let a pass start. after: earlier passes, with the pieces of theirs that each of its pieces waits for."""
        with self.lock:
            flight.order = self.count
            self.count += 1
            for other, waits in after:
                for i, places in enumerate(waits):
                    for j in places:
                        if not other.over[j]:
                            other.later[j].append((flight, i))
                            flight.waiting[i] += 1
            for i, count in enumerate(flight.waiting):
                if not count:
                    self._make_ready(flight, i)
            self._wake_all()

    def run(self, goal: Flight) -> None:
        """Work until a pass is over; then no lane runs, and what is left of other passes waits for the next call.

        Raises what a piece has raised; the lanes are then to be cleared.
        """
        if not goal.left:
            return
        lanes = 1 if torch._C._len_torch_dispatch_stack() else self.streams
        self.threads = threads = torch.get_num_threads()
        share = max(threads // lanes, 1)
        torch.set_num_threads(share)
        helpers = [pool(lanes).submit(self._work, lane, goal, share) for lane in range(1, lanes)]
        try:
            self._work(0, goal, share)
        finally:
            self._stop(helpers)
            torch.set_num_threads(threads)
            self.threads = 0
        if self.failure is not None:
            raise self.failure

    @contextmanager
    def all_threads(self) -> Iterator[None]:
        """For the user's own code on the caller's thread: as many threads inside a kernel as between the passes."""
        share = torch.get_num_threads()
        torch.set_num_threads(self.threads or share)
        try:
            yield
        finally:
            torch.set_num_threads(share)

    def _stop(self, helpers: list[Any]) -> None:
        while True:
            try:
                join(helpers)
                return
            except KeyboardInterrupt as error:  # not before the last piece has ended
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.lock:
            self.failure = self.failure or error
            self._wake_all()

    def _work(self, lane: int, goal: Flight, threads: int) -> None:
        try:
            if lane and torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            with torch.no_grad():
                while (found := self._next(lane, goal)) is not None:
                    self._run(found[0], found[1], lane)
        except BaseException as error:  # Ctrl-C too: the other lanes have to stop before the caller goes on
            self._fail(error)

    def _next(self, lane: int, goal: Flight) -> tuple[Flight, int] | None:
        with self.lock:
            while goal.left and self.failure is None:
                if not lane and self.updates:
                    _, _, place, flight = heapq.heappop(self.updates)
                    return flight, place
                if self.ready:
                    _, _, place, flight = heapq.heappop(self.ready)
                    return flight, place
                self.idle[lane > 0].wait()
        return None

    def _run(self, flight: Flight, i: int, lane: int) -> None:
        piece = flight.cut.pieces[i]
        start = time.perf_counter()
        results = flight.cut.functions[i](*(flight.table[name] for name in piece.reads))
        end = time.perf_counter()
        with self.lock:
            if self.trace is not None:
                self.trace.append((flight.step, piece.name, Ran(i, lane, start, end)))
            flight.table.update(zip(piece.writes, results, strict=True))
            release(flight.table, piece.reads, flight.readers)
            flight.over[i] = True
            flight.left -= 1
            waiting = [(flight, j) for j in flight.part.followers[i]] + flight.later[i]
            flight.later[i] = []
            for other, j in waiting:
                other.waiting[j] -= 1
                if not other.waiting[j]:
                    self._make_ready(other, j)
            self._wake(lane)
            if not flight.left:
                self._wake_all()

    def _wake(self, lane: int) -> None:
        """Wake as many lanes as there is work for beside what this one takes next."""
        beside = len(self.ready) - (0 if self.updates and not lane else 1)
        if beside > 0:
            self.idle[1].notify(beside)
        if lane and (self.updates or beside > 0):
            self.idle[0].notify()

    def _wake_all(self) -> None:
        for condition in self.idle:
            condition.notify_all()

    def _make_ready(self, flight: Flight, i: int) -> None:
        """Forward pieces go first: they are a chain, and what is updated for them is ready anyway."""
        forward = flight.cut.arguments[:1] != ("saved",)
        entry = (0 if forward else 1, flight.order, i, flight)
        heapq.heappush(self.updates if flight.own or flight.cut.pieces[i].updates else self.ready, entry)


def tensors(part: Part, module: Any) -> list[Tensor]:
    """The buffers of a module that a pass changes."""
    written = part.written
    return [b for b in module.buffers() if f"storage {b.untyped_storage()._cdata}" in written]
