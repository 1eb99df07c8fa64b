"""`graphlocal.plan`: what a training step would take on several devices, beside backpropagation's pipelines."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from graphlocal import units
from graphlocal.compiler import Compiled, Options, build
from graphlocal.errors import InputError
from graphlocal.ir import LocalGraph
from graphlocal.measured import Measured, measure
from graphlocal.memory import Memory, OptimizerClass
from graphlocal.memory import memory as memory_of
from graphlocal.passes import pipelines
from graphlocal.passes.cost import KINDS, Device, Key, Sizes, roofline
from graphlocal.passes.overlap import seconds_a_step
from graphlocal.passes.pipelines import Link, balanced, device_name
from graphlocal.passes.simulate import Timeline, grid, simulate
from graphlocal.rules import Backprop
from graphlocal.runtime import LocalModule


@dataclass(frozen=True)
class Plan:
    """The simulated schedules. place: the device of each subgraph, in order.

    timelines: by name, `local`, `gpipe` and `1f1b`. one_device: seconds of a step of `local` and of `backprop` on one
    device with one microbatch. measured: the times that the plan was made from, None for the roofline. memory: what a
    step of the whole batch on one device needs, if it was asked for. in_a_row: seconds that one more step takes on one
    device that runs two actions (or `streams`) at a time, by how steps overlap.
    """

    graph: LocalGraph
    place: tuple[int, ...]
    microbatches: int
    timelines: Mapping[str, Timeline]
    one_device: Mapping[str, float]
    measured: Measured | None = None
    memory: Memory | None = None
    in_a_row: Mapping[str, float] = field(default_factory=dict)

    @property
    def devices(self) -> list[str]:
        """The devices that have a subgraph."""
        return [device_name(d) for d in range(max(self.place) + 1)]

    def speedup(self, name: str) -> float:
        """How many times as fast as backpropagation on one device."""
        return self.one_device["backprop"] / self.timelines[name].makespan

    def __str__(self) -> str:
        lines = [f"{self.graph.name} on {len(self.devices)} devices, {self.microbatches} microbatches"]
        lines += [f"  device {d}: {_members(self, d)}" for d in range(len(self.devices))]
        lines += ["", *self._table(), ""]
        for name, timeline in self.timelines.items():
            lines += [f"{name}:", *(f"  {row}" for row in grid(timeline, self.devices)), ""]
        lines += self._notes()
        return "\n".join([*lines, "", str(self.memory)] if self.memory else lines)

    def _table(self) -> list[str]:
        rows = [["schedule", "step", "bubble", "moved", "speed-up"]]
        for name, timeline in self.timelines.items():
            cells = [units.time_label(timeline.makespan), f"{100 * timeline.bubble(self.devices):.0f} %"]
            rows.append([name, *cells, units.bytes_label(timeline.bytes), f"{self.speedup(name):.2f}"])
        for name, seconds in self.one_device.items():
            speedup = f"{self.one_device['backprop'] / seconds:.2f}"
            rows.append([f"{name}, 1 device", units.time_label(seconds), "0 %", "0 B", speedup])
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]

    def _notes(self) -> list[str]:
        notes = [
            "speed-up: against backprop on one device. A cell F3.2 is F3 of microbatch 2; B: a whole backward pass."
        ]
        notes.append("The optimizer's own time is left out of all of them.")
        if self.in_a_row:
            listed = ", ".join(f"{units.time_label(seconds)} {name}" for name, seconds in self.in_a_row.items())
            notes.append(f"A step on one device with several streams: {listed}.")
        if self.measured is None:
            notes.append("Times are from the roofline of the given rates, not measured.")
        else:
            ratio = self.one_device["local"] / self.measured.step
            notes.append(f"Times are measured here, action by action; their sum is {ratio:.2f} of the measured step.")
        return notes


def _members(plan: Plan, device: int) -> str:
    names = [s.name for s, d in zip(plan.graph.subgraphs, plan.place, strict=True) if d == device]
    return ", ".join(names) if len(names) < 6 else f"{names[0]} to {names[-1]} ({len(names)} subgraphs)"


def plan(
    local: LocalModule, devices: int = 8, bandwidth: str | float = "10Gb", latency: str | float = "5us",
    streams: int = 1, microbatches: int = 8, *, flops: str | float = "1T", memory: str | float = "100GB",
    measured: bool = False, peak: bool = False, optimizer: OptimizerClass = torch.optim.Adam,
) -> Plan:  # fmt: skip
    """Simulate a training step of a compiled model on several devices, for the batch of its example inputs.

    devices: neighbouring subgraphs are spread over at most so many, balanced by their cost. bandwidth, latency: of a
    device's link to the others, per second (`10Gb` gigabits, `10GB` gigabytes). streams: actions that a device runs at
    one time, each at full speed, which is an upper bound. microbatches: parts that the batch is cut into.
    flops, memory: a device's rates of arithmetic and memory traffic, for the roofline; measured: time every action,
    and backpropagation's, once on this machine instead. peak: predict and measure the memory of a step on one device
    too, with an `optimizer` that is made from a list of parameters.

    Raises InputError for numbers and units that make no sense, NotLowered if a model can't be measured.
    """
    if not isinstance(local, LocalModule):
        raise InputError("plan needs a compiled model", remedy="pass graphlocal.compile(model, ...)")
    counts = {"devices": devices, "streams": streams, "microbatches": microbatches}
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(f"{name} is {count!r}", remedy="give a whole number of 1 or more")
    link = Link(units.bandwidth(bandwidth), units.seconds(latency))
    device = Device(units.rate(flops), units.bandwidth(memory, "memory"))
    graph, found = local.graph, None
    sizes = Sizes(graph, _dims(local))
    if measured:
        found, true = measure(local.compiled), measure(_by_backprop(local.compiled))
        costs, exact = _complete(graph, found.actions), _complete(graph, true.actions)
    else:
        costs, exact = roofline(graph, sizes, device), roofline(graph, sizes, device, exact=True)
    place = balanced([sum(costs.get((k, n), 0.0) for k in KINDS) for n in graph.number.values()], devices)
    capacity = {device_name(d): streams for d in range(devices)}
    timelines = {"local": simulate(pipelines.local(graph, place, costs, microbatches, link, sizes), capacity)}
    for name in ("gpipe", "1f1b"):
        timelines[name] = simulate(pipelines.backprop(graph, place, exact, microbatches, link, sizes, name))
    alone = {"local": sum(costs.values()), "backprop": sum(exact.values())}
    needs = memory_of(local.compiled, optimizer) if peak else None
    ways = {"by itself": None, "overlapping (step.run)": 0, "with staleness=1": 1}
    in_a_row = {name: seconds_a_step(graph, costs, max(streams, 2), k) for name, k in ways.items()}
    return Plan(graph, tuple(place), microbatches, timelines, alone, found, needs, in_a_row)


def _dims(local: LocalModule) -> dict[str, int]:
    """The sizes that the graph leaves open, as the example inputs have them."""
    found: dict[str, int] = {}
    for item, leaf in zip(local.graph.inputs, local.compiled.traced.arguments.leaves, strict=True):
        if item.type is not None and isinstance(leaf, Tensor):
            found |= {d: n for d, n in zip(item.type.shape, leaf.shape, strict=True) if isinstance(d, str)}
    return found


def _by_backprop(compiled: Compiled) -> Compiled:
    """A copy of the model, cut into the same subgraphs, trained by backpropagation."""
    owner = compiled.graph.owner
    options = Options(Backprop(), partition=lambda op: owner[op.name])
    return build(copy.deepcopy(compiled.model), compiled.traced.arguments, options, nn.Module())


def _complete(graph: LocalGraph, actions: Mapping[Key, float]) -> dict[Key, float]:
    """Times of all actions; those that the lowered graph has no operators for take none."""
    return {(kind, n): actions.get((kind, n), 0.0) for n in graph.number.values() for kind in KINDS}
