"""The streams target: a pass in pieces, each of which starts as soon as what it needs is there.

On a CPU the lanes are threads (`graphlocal.targets.lanes`), on a GPU they are CUDA streams, with events between them.
A piece runs the kernels that it would run in the sequential target, what touches the same memory keeps its order, and
the optimizer sees its updates in program order, on the caller's thread: results are equal bit for bit (on a CPU at the
same number of threads inside a kernel; the lanes divide `torch.get_num_threads()` among them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphlocal.targets.flat import flatten
from graphlocal.targets.lanes import Flight, Lanes, Part, Ran, release
from graphlocal.targets.pieces import Cut, cut


class StreamedPass:
    """A pass of the lowered training graph on several lanes; called like the pass.

    streams: the number of lanes. trace: set it to a list to have every piece that ran on a CPU appended.
    """

    def __init__(self, cut: Cut, streams: int, device: torch.device) -> None:
        self.part, self.streams = Part(cut), streams
        self.trace: list[Ran] | None = None
        self._cuda = _CudaLanes(cut, streams, device) if device.type == "cuda" else None

    @property
    def cut(self) -> Cut:
        """Its pieces."""
        return self.part.cut

    def __call__(self, *arguments: Any) -> Any:
        flight = Flight(self.part, arguments)
        with torch.no_grad():
            if self._cuda is not None:
                self._cuda(flight)
            else:
                lanes = Lanes(min(self.streams, len(self.part.cut.pieces)), self.trace)
                lanes.add(flight)
                lanes.run(flight)
            return flight.result()


class _CudaLanes:
    """Runs the pieces on CUDA streams: the caller's thread issues all, in program order. Not yet run on a GPU.

    lanes: of each piece; updates are all on lane 0, since the optimizer may put gradients off to a later update.
    """

    def __init__(self, cut: Cut, streams: int, device: torch.device) -> None:
        self.cut, self.device = cut, device
        self.streams = [torch.cuda.Stream(device) for _ in range(streams)]
        self.lanes = assign_lanes(cut, streams)

    def __call__(self, flight: Flight) -> None:
        table = flight.table
        caller = torch.cuda.current_stream(self.device)
        for stream in self.streams:
            stream.wait_stream(caller)
        home = dict.fromkeys(table, -1)  # the lane on which each value was made; -1 is the caller's stream
        over: list[torch.cuda.Event] = []
        for i, piece in enumerate(self.cut.pieces):
            lane = self.lanes[i]
            stream = self.streams[lane]
            for j in sorted(self.cut.needs[i]):
                if self.lanes[j] != lane:
                    stream.wait_event(over[j])
            for name in piece.reads:
                if home[name] != lane:
                    _record(table[name], stream)
            with torch.cuda.stream(stream):
                results = self.cut.functions[i](*(table[name] for name in piece.reads))
            over.append(stream.record_event())
            table.update(zip(piece.writes, results, strict=True))
            home.update(dict.fromkeys(piece.writes, lane))
            release(table, piece.reads, flight.readers)
        for stream in self.streams:
            caller.wait_stream(stream)
        for name in self.cut.returned:
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
