"""Lanes on a CPU: pieces of one or several passes, each of which starts as soon as what it needs is there.

The lanes are threads: the caller's own and `streams - 1` more, which all models share; torch leaves Python's lock while
a kernel runs. They divide `torch.get_num_threads()` among them. The optimizer sees its updates in program order, on the
caller's thread.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from graphlocal.targets.accesses import ARGUMENTS, RANDOM, Access, outlives
from graphlocal.targets.pieces import Cut

Waits = Sequence[frozenset[int]]
"""For each piece of a pass, the places of another pass's pieces that it waits for."""


@dataclass(frozen=True, eq=False)
class Part:
    """A pass in pieces, and what has to be known to run it, beside others or alone."""

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


@dataclass(frozen=True)
class Ran:
    """One piece that ran: the number of its batch, its place and name, the lane, seconds of `time.perf_counter`."""

    step: int | None
    piece: int
    name: str
    lane: int
    start: float
    end: float


class Flight:
    """One pass while it runs. All that changes is changed under the lock of its lanes.

    step: the number of its batch, where several overlap. own: whether the caller alone runs its pieces, ahead of all
    others.
    """

    def __init__(self, part: Part, arguments: Sequence[Any], step: int | None = None, own: bool = False) -> None:
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


class Lanes:
    """Runs pieces of several passes, on the caller's thread and `streams - 1` helpers; updates on the caller's.

    trace: a list to which every piece that ran is appended.
    """

    def __init__(self, streams: int, trace: list[Ran] | None = None) -> None:
        self.streams, self.trace = streams, trace
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
        if share != threads:
            torch.set_num_threads(share)
        helpers = [pool(lanes).submit(self._work, lane, goal, share) for lane in range(1, lanes)]
        try:
            self._work(0, goal, share)
        finally:
            self._stop(helpers)
            if share != threads:
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

    def _stop(self, helpers: list[Future[None]]) -> None:
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
                self.trace.append(Ran(flight.step, i, piece.name, lane, start, end))
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


def first_values(cut: Cut, *arguments: Any) -> dict[str, Any]:
    """The values that are there before the first piece runs, by name."""
    table = dict(zip(cut.arguments, arguments, strict=False))
    if cut.arguments[-1:] == ("retain",):
        retain = table.setdefault("retain", False)
        for name, position in cut.saved:
            table[name] = table["saved"][position]
        if not retain:  # from here on the table alone keeps what is still to be read
            table["saved"][:] = [None] * len(table["saved"])
    return table


def release(table: dict[str, Any], read: Iterable[str], readers: dict[str, int]) -> None:
    """Let go of the values that had their last reader."""
    for name in read:
        readers[name] -= 1
        if not readers[name]:
            del table[name]


_helpers: tuple[int, int, ThreadPoolExecutor] | None = None
"""(process, number of threads, pool): the threads that help the caller, shared by all models of a process."""
_helpers_lock = threading.Lock()


def pool(lanes: int) -> ThreadPoolExecutor:
    """The helpers of so many lanes; one lane is the caller's own thread."""
    global _helpers
    with _helpers_lock:
        if _helpers is None or _helpers[0] != os.getpid() or _helpers[1] < lanes - 1:
            if _helpers is not None and _helpers[0] == os.getpid():
                _helpers[2].shutdown(wait=False)  # what runs on it still ends
            _helpers = os.getpid(), lanes - 1, ThreadPoolExecutor(lanes - 1, "graphlocal-lane")
        return _helpers[2]


def join(helpers: list[Future[None]]) -> None:
    """Wait for the helpers that have started; those that have not found a free thread are called off."""
    started = [helper for helper in helpers if not helper.cancel()]
    wait(started)
