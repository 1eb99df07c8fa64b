"""`graphlocal.plan`: what a training step would take on several devices, beside backpropagation's pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch

from graphlocal import units
from graphlocal.errors import InputError
from graphlocal.ir import LocalGraph
from graphlocal.measured import Measured
from graphlocal.memory import Memory, OptimizerClass
from graphlocal.memory import memory as memory_of
from graphlocal.passes import pipelines
from graphlocal.passes.cost import KINDS, Device, Sizes, open_sizes
from graphlocal.passes.overlap import seconds_a_step
from graphlocal.passes.pipelines import Link, balanced, busiest_link, device_name
from graphlocal.passes.simulate import Timeline, grid, simulate
from graphlocal.rules import RelaxingRule, Rule
from graphlocal.runtime import LocalModule
from graphlocal.step_costs import StepCosts, measured_costs, roofline_costs


@dataclass(frozen=True)
class Plan:
    """The simulated schedules. place: the device of each subgraph, in order.

    timelines: by name, `local`, `gpipe` and `1f1b`; for rules that fit their maps on every N-th step, `calibration` is
    such a step, and `local` the others. one_device: seconds of a step of `local`, `backprop` and `calibration` on one
    device with one microbatch. measured: the times that the plan was made from, None for the roofline. memory: what a
    step of the whole batch on one device needs, if it was asked for. in_a_row: seconds that one more step takes on one
    device that runs two actions (or `streams`) at a time, by how steps overlap, if each stream had cores of its own.
    streams: actions that a device runs at one time. every: N, 0 where nothing is fitted. notes: where times come from.
    """

    graph: LocalGraph
    place: tuple[int, ...]
    microbatches: int
    timelines: Mapping[str, Timeline]
    one_device: Mapping[str, float]
    measured: Measured | None = None
    memory: Memory | None = None
    in_a_row: Mapping[str, float] = field(default_factory=dict)
    streams: int = 1
    every: int = 0
    notes: tuple[str, ...] = ()

    @property
    def devices(self) -> list[str]:
        """The devices that have a subgraph."""
        return [device_name(d) for d in range(max(self.place) + 1)]

    def speedup(self, name: str) -> float:
        """How many times as fast as backpropagation on one device."""
        return self.one_device["backprop"] / self.timelines[name].makespan

    def mean(self, one_device: bool = False) -> float:
        """Seconds of a step of local learning, in the mean over its ordinary steps and those that fit its maps."""
        found = self.one_device if one_device else {name: t.makespan for name, t in self.timelines.items()}
        share = 1 / self.every if self.every else 0.0
        return (1 - share) * found["local"] + (share * found["calibration"] if share else 0.0)

    def __str__(self) -> str:
        lines = [f"{self.graph.name} on {len(self.devices)} devices, {self.microbatches} microbatches"]
        lines += [f"  device {d}: {_members(self, d)}" for d in range(len(self.devices))]
        lines += ["", *self._table(), ""]
        for name, timeline in self.timelines.items():
            lines += [f"{name}:", *(f"  {row}" for row in grid(timeline, self.devices)), *_link_line(timeline), ""]
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
        if self.streams > 1:
            notes.append(f"Local learning runs {self.streams} actions of a device at one time, {_ITS_OWN_CORES}.")
        if self.in_a_row:
            listed = ", ".join(f"{units.time_label(seconds)} {name}" for name, seconds in self.in_a_row.items())
            notes.append(f"A step on one device with {max(self.streams, 2)} streams, {_ITS_OWN_CORES}: {listed}.")
        if self.every:
            notes.append(_calibration_note(self))
        return [*notes, *self.notes]


_ITS_OWN_CORES = "if each stream had cores of its own"
"""Parallel actions are predicted at full speed; where they share cores, they can be slower than one after another."""


def _link_line(timeline: Timeline) -> list[str]:
    found = busiest_link(timeline)
    if found is None:
        return []
    name, seconds = found
    return [f"  busiest link: {name}, {units.time_label(seconds)} of {units.time_label(timeline.makespan)}"]


def _calibration_note(plan: Plan) -> str:
    parts = []
    for seconds, where in ((plan.mean(), "here"), (plan.mean(one_device=True), "on one device")):
        speedup = plan.one_device["backprop"] / seconds
        parts.append(f"{units.time_label(seconds)} {where} (speed-up {speedup:.2f})")
    times = "Every step" if plan.every == 1 else f"Every {plan.every}th step"
    return f"{times} is a calibration, of true gradients and the fit of the maps; in the mean: {', '.join(parts)}."


def _members(plan: Plan, device: int) -> str:
    names = [s.name for s, d in zip(plan.graph.subgraphs, plan.place, strict=True) if d == device]
    return ", ".join(names) if len(names) < 6 else f"{names[0]} to {names[-1]} ({len(names)} subgraphs)"


_MICROBATCHES = 8
"""Of the batch, unless it is smaller or the user says otherwise."""


def plan(
    local: LocalModule, devices: int = 8, bandwidth: str | float = "10Gb", latency: str | float = "5us",
    streams: int = 1, microbatches: int | None = None, *, flops: str | float = "1T", memory: str | float = "100GB",
    measured: bool = False, peak: bool = False, optimizer: OptimizerClass = torch.optim.Adam,
    launch: str | float = "0s",
) -> Plan:  # fmt: skip
    """Simulate a training step of a compiled model on several devices, for the batch of its example inputs.

    devices: neighbouring subgraphs are spread over at most so many, balanced by their cost. bandwidth, latency: of a
    device's link to the others, per second (`10Gb` gigabits, `10GB` gigabytes). streams: actions that a device runs at
    one time, each at full speed, which is an upper bound. microbatches: parts that the batch is cut into; None is 8, or
    the batch if that is smaller. The batch is the inputs' first axis; inputs that differ in it set no limit.
    flops, memory, launch: a device's rates of arithmetic and memory traffic, and its time to start an operator, for the
    roofline; measured: time every action, and backpropagation's, once on this machine instead. peak: predict and
    measure the memory of a step on one device too, with an `optimizer` that is made from a list of parameters.

    Raises InputError for numbers and units that make no sense, more microbatches than samples, rates beside `measured`,
    and rules whose step is not a schedule of F, D and U; NotLowered if a model can't be measured.
    """
    if not isinstance(local, LocalModule):
        raise InputError("plan needs a compiled model", remedy="pass graphlocal.compile(model, ...)")
    sizes = Sizes(local.graph, open_sizes(local.graph, local.compiled.traced.arguments.leaves))
    parts = min(_MICROBATCHES, sizes.batch or _MICROBATCHES) if microbatches is None else microbatches
    counts = {"devices": devices, "streams": streams, "microbatches": parts}
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(f"{name} is {count!r}", remedy="give a whole number of 1 or more")
    _require_samples(parts, sizes.batch)
    _require_schedule(local.options.rule, peak)
    link = Link(units.bandwidth(bandwidth), units.seconds(latency))
    device = Device(units.rate(flops), units.bandwidth(memory, "memory"), units.seconds(launch, "launch"))
    if measured:
        _require_no_rates(device)
    costs = measured_costs(local.compiled) if measured else roofline_costs(local.compiled, sizes, device)
    in_parts = costs
    if device.launch and parts > 1 and not measured:  # every microbatch starts all operators
        in_parts = roofline_costs(local.compiled, sizes, replace(device, launch=parts * device.launch))
    found = _simulated(local, costs, in_parts, sizes, link, counts)
    return replace(found, memory=memory_of(local.compiled, optimizer)) if peak else found


def _simulated(
    local: LocalModule, costs: StepCosts, in_parts: StepCosts, sizes: Sizes, link: Link, counts: Mapping[str, int]
) -> Plan:
    """The plan, but for the memory. costs: of the batch at once; in_parts: of all its microbatches together.

    counts: `devices`, `streams` and `microbatches`.
    """
    graph, streams, parts = local.graph, counts["streams"], counts["microbatches"]
    costly = [sum(costs.local.get((k, n), 0.0) for k in KINDS) for n in graph.number.values()]
    place = balanced(costly, counts["devices"])
    capacity = {device_name(d): streams for d in range(counts["devices"])}
    timelines = {"local": simulate(pipelines.local(graph, place, in_parts.local, parts, link, sizes), capacity)}
    alone = {"local": sum(costs.local.values()), "backprop": sum(costs.backprop.values())}
    for name in ("gpipe", "1f1b"):
        timelines[name] = simulate(pipelines.backprop(graph, place, in_parts.backprop, parts, link, sizes, name))
    every = 0
    if (
        costs.calibration is not None
        and in_parts.calibration is not None
        and local.options.rule.calibration is not None
    ):
        every, wired = local.options.rule.calibration.every, local.compiled.calibration.graph
        # the fits read the errors that the maps read
        wired = replace(wired, connections=(*wired.connections, *(c for c in graph.connections if c.fitted)))
        tasks = pipelines.local(wired, place, in_parts.calibration, parts, link, sizes)
        timelines["calibration"], alone["calibration"] = simulate(tasks, capacity), sum(costs.calibration.values())
    ways = {"by itself": None, "overlapping (step.run)": 0, "with staleness=1": 1}
    in_a_row = {name: seconds_a_step(graph, costs.local, max(streams, 2), k) for name, k in ways.items()}
    return Plan(
        graph, tuple(place), parts, timelines, alone, costs.measured, None, in_a_row, streams, every, costs.notes
    )


def _require_schedule(rule: Rule, peak: bool) -> None:
    """Raise InputError for a rule that runs no schedule, and for the memory of one whose step takes labels."""
    if rule.engine != "schedule" or isinstance(rule, RelaxingRule):
        does = "relaxes all subgraphs together, many times over" if rule.engine == "schedule" else "is no such pass"
        raise InputError(
            f"there is no plan for the rule {rule.name!r}",
            why=f"a plan places the actions F, D and U of one pass over the subgraphs; a step of this rule {does}",
            remedy="plan another rule, such as 'rec-lra', or time steps of graphlocal.train_step(local, ...)",
        )
    if peak and rule.needs_labels:
        raise InputError(
            f"the memory of a step of the rule {rule.name!r} is not measured",
            why="its local heads take labels, and the example inputs hold none",
            remedy="plan without peak",
        )


def _require_no_rates(device: Device) -> None:
    """Raise InputError for rates that a measured plan would take no notice of."""
    given = [f.name for f in fields(Device) if getattr(device, f.name) != f.default]
    names = " and ".join({"bytes": "memory"}.get(name, name) for name in given)
    if given:
        raise InputError(
            f"{names} and measured are given together",
            why="a device's rates are for the roofline, and a measured plan times every action on this machine",
            remedy=f"leave out {names}, or measured",
        )


def _require_samples(microbatches: int, batch: int | None) -> None:
    if batch is not None and microbatches > batch:
        raise InputError(
            f"microbatches is {microbatches}, and the batch of the example inputs {batch}",
            why="a microbatch is a part of the batch, of one sample at least",
            remedy=f"give at most {batch}, or compile with a larger batch of example inputs",
        )
