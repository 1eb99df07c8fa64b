"""The streams target: a pass in pieces, each of which starts as soon as what it needs is there.

On a CPU the lanes are threads: the caller's own and `streams - 1` more, which all models share; torch leaves Python's
lock while a kernel runs. On a GPU the lanes are CUDA streams, with events between them. A piece runs the kernels
that it would run in the sequential target, what touches the same memory keeps its order, and the optimizer sees
its updates in program order, on the caller's thread: results are equal bit for bit (on a CPU at the same number of
threads inside a kernel; the lanes divide `torch.get_num_threads()` among them).
"""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphlocal.targets.flat import flatten
from graphlocal.targets.pieces import Cut, cut


@dataclass(frozen=True)
class Ran:
    """One piece that ran: its place, the lane, and seconds of `time.perf_counter`."""

    piece: int
    lane: int
    start: float
    end: float


class StreamedPass:
    """A pass of the lowered training graph on several lanes; called like the pass.

    streams: the number of lanes. trace: set it to a list to have every piece that ran appended.
    """

    def __init__(self, cut: Cut, streams: int, device: torch.device) -> None:
        self.cut, self.streams = cut, streams
        self.trace: list[Ran] | None = None
        self.followers: list[list[int]] = [[] for _ in cut.pieces]
        for i, needs in enumerate(cut.needs):
            for j in needs:
                self.followers[j].append(i)
        self.readers = Counter(name for piece in cut.pieces for name in piece.reads) + Counter(cut.returned)
        self._run = _CudaLanes(self, device) if device.type == "cuda" else self._run_on_threads

    def __call__(self, *arguments: Any) -> Any:
        table = first_values(self.cut, *arguments)
        with torch.no_grad():
            self._run(table)
            return self.cut.finish(*(table[name] for name in self.cut.returned))

    def _run_on_threads(self, table: dict[str, Any]) -> None:
        lanes = 1 if torch._C._len_torch_dispatch_stack() else min(self.streams, len(self.cut.pieces))
        threads = torch.get_num_threads()
        share = max(threads // lanes, 1)
        run = _Dispatch(self, table, share)
        if share != threads:
            torch.set_num_threads(share)
        helpers = [pool(lanes).submit(run.work, lane) for lane in range(1, lanes)]
        try:
            run.work(0)
        finally:
            join(helpers)
            if share != threads:
                torch.set_num_threads(threads)
        if run.failure is not None:
            raise run.failure


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


class _Dispatch:
    """One run of a pass on threads. All that it holds is changed under `lock`.

    waiting: how many pieces each one still waits for. ready, updates: heaps of places, for any lane and for the
    caller's. idle: where a lane without work waits, the caller's (lane 0) and the helpers'.
    """

    def __init__(self, streamed: StreamedPass, table: dict[str, Any], threads: int) -> None:
        self.streamed, self.table, self.threads = streamed, table, threads
        cut = streamed.cut
        self.waiting = [len(needs) for needs in cut.needs]
        self.left = len(cut.pieces)
        self.readers = dict(streamed.readers)
        self.ready: list[int] = []
        self.updates: list[int] = []
        self.lock = threading.Lock()
        self.idle = threading.Condition(self.lock), threading.Condition(self.lock)
        self.failure: BaseException | None = None
        for i, count in enumerate(self.waiting):
            if not count:
                self._make_ready(i)

    def work(self, lane: int) -> None:
        """Run pieces until none is left, or one has failed. Lane 0 is the caller's, which alone calls the optimizer."""
        try:
            if lane and torch.get_num_threads() != self.threads:
                torch.set_num_threads(self.threads)
            with torch.no_grad():
                while (i := self._next(lane)) is not None:
                    self._run(i, lane)
        except BaseException as error:  # Ctrl-C too: the other lanes have to stop before the caller goes on
            with self.lock:
                self.failure = self.failure or error
                self._wake_all()

    def _next(self, lane: int) -> int | None:
        with self.lock:
            while self.left and self.failure is None:
                if not lane and self.updates:
                    return heapq.heappop(self.updates)
                if self.ready:
                    return heapq.heappop(self.ready)
                self.idle[lane > 0].wait()
        return None

    def _run(self, i: int, lane: int) -> None:
        streamed, table = self.streamed, self.table
        piece = streamed.cut.pieces[i]
        start = time.perf_counter()
        results = streamed.cut.functions[i](*(table[name] for name in piece.reads))
        end = time.perf_counter()
        with self.lock:
            if streamed.trace is not None:
                streamed.trace.append(Ran(i, lane, start, end))
            table.update(zip(piece.writes, results, strict=True))
            release(table, piece.reads, self.readers)
            self.left -= 1
            for j in streamed.followers[i]:
                self.waiting[j] -= 1
                if not self.waiting[j]:
                    self._make_ready(j)
            self._wake(lane)

    def _wake(self, lane: int) -> None:
        """Wake as many lanes as there is work for beside what this one takes next; a wake-up costs microseconds."""
        if not self.left:
            self._wake_all()
        beside = len(self.ready) - (0 if self.updates and not lane else 1)
        if beside > 0:
            self.idle[1].notify(beside)
        if lane and (self.updates or beside > 0):
            self.idle[0].notify()

    def _wake_all(self) -> None:
        for condition in self.idle:
            condition.notify_all()

    def _make_ready(self, i: int) -> None:
        heapq.heappush(self.updates if self.streamed.cut.pieces[i].updates else self.ready, i)


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


class _CudaLanes:
    """Runs the pieces on CUDA streams: the caller's thread issues all, in program order. Not yet run on a GPU.

    lanes: of each piece; updates are all on lane 0, since the optimizer may put gradients off to a later update.
    """

    def __init__(self, streamed: StreamedPass, device: torch.device) -> None:
        self.streamed, self.device = streamed, device
        self.streams = [torch.cuda.Stream(device) for _ in range(streamed.streams)]
        self.lanes = assign_lanes(streamed.cut, streamed.streams)

    def __call__(self, table: dict[str, Any]) -> None:
        streamed, readers = self.streamed, dict(self.streamed.readers)
        caller = torch.cuda.current_stream(self.device)
        for stream in self.streams:
            stream.wait_stream(caller)
        home = dict.fromkeys(table, -1)  # the lane on which each value was made; -1 is the caller's stream
        over: list[torch.cuda.Event] = []
        for i, piece in enumerate(streamed.cut.pieces):
            lane = self.lanes[i]
            stream = self.streams[lane]
            for j in sorted(streamed.cut.needs[i]):
                if self.lanes[j] != lane:
                    stream.wait_event(over[j])
            for name in piece.reads:
                if home[name] != lane:
                    _record(table[name], stream)
            with torch.cuda.stream(stream):
                results = streamed.cut.functions[i](*(table[name] for name in piece.reads))
            over.append(stream.record_event())
            table.update(zip(piece.writes, results, strict=True))
            home.update(dict.fromkeys(piece.writes, lane))
            release(table, piece.reads, readers)
        for stream in self.streams:
            caller.wait_stream(stream)
        for name in streamed.cut.returned:
            _record(table[name], caller)


def _record(value: Any, stream: torch.cuda.Stream) -> None:
    """Keep memory that another stream made until this stream is done with it."""
    if isinstance(value, Tensor) and value.is_cuda:
        value.record_stream(stream)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _record(item, stream)


def assign_lanes(cut: Cut, streams: int) -> tuple[int, ...]:
    """A lane for each piece: that of the piece it follows directly, else the one with the fewest operators."""
    load = [0] * streams
    last = [-1] * streams
    lanes: list[int] = []
    for i, piece in enumerate(cut.pieces):
        free = [lane for lane in range(streams) if last[lane] in cut.needs[i]]
        lane = 0 if piece.updates else min(free or range(streams), key=lambda lane: (load[lane], lane))
        lanes.append(lane)
        load[lane] += len(piece.nodes)
        last[lane] = i
    return tuple(lanes)


def streamed(module: fx.GraphModule, streams: int) -> Callable[..., Any]:
    """A pass on `streams` lanes; in one piece where nothing in it could run side by side, or devices are mixed."""
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    pieces = cut(module)
    if len(pieces.pieces) < 2 or len(devices) != 1 or (device := devices.pop()).type not in ("cpu", "cuda"):
        return torch.no_grad()(flatten(module))
    return StreamedPass(pieces, streams, device)
