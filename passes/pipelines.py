"""The training step of a partitioned model on several devices, as tasks for the simulator.

A device holds neighbouring subgraphs (in topological order). A value that a subgraph on another device reads is sent
once to each such device; a device sends one message at a time. Microbatches accumulate gradients, so that all
schedules compute the same step. The loss is computed on one device, from all outputs, which are sent there, and sends
their errors back:

- **local**: the forward pipeline; then, once the loss of a microbatch is known, its errors are broadcast along the
  skip-errors, and every device displaces and updates on its own (local heads don't wait for the loss);
- **gpipe** (Huang et al. 2019): all forward passes, then all backward passes;
- **1f1b** (Narayanan et al. 2019, PipeDream-Flush): one forward, one backward, in turn, after a warm-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from graphlocal.ir import LocalGraph
from graphlocal.passes.cost import KINDS, Key, Sizes
from graphlocal.passes.simulate import Task, Timeline
from graphlocal.verify import action_dependencies


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes a second. latency: seconds."""

    bandwidth: float = 1.25e9
    latency: float = 5e-6


def balanced(costs: Sequence[float], parts: int) -> list[int]:
    """The part of each item, in order: contiguous parts with the smallest possible largest sum."""
    parts = max(1, min(parts, len(costs)))
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = [[float("inf")] * (len(costs) + 1) for _ in range(parts + 1)]
    cut = [[0] * (len(costs) + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for p in range(1, parts + 1):
        for end in range(p, len(costs) + 1):
            for start in range(p - 1, end):
                largest = max(best[p - 1][start], sums[end] - sums[start])
                if largest < best[p][end]:
                    best[p][end], cut[p][end] = largest, start
    place, end = [0] * len(costs), len(costs)
    for p in range(parts, 0, -1):
        place[cut[p][end] : end] = [p - 1] * (end - cut[p][end])
        end = cut[p][end]
    return place


def device_name(device: int) -> str:
    """What the simulator calls a device."""
    return f"device {device}"


@dataclass
class Tasks:
    """Collects the tasks of one schedule. place: the device of each subgraph, by its number minus 1.

    sizes: of the whole batch, None for messages that cost nothing; a microbatch's part of it is sent.
    """

    graph: LocalGraph
    place: Sequence[int]
    microbatches: int
    link: Link
    sizes: Sizes | None
    tasks: list[Task] = field(default_factory=list)
    sent: dict[tuple[str, int, int, int], str] = field(default_factory=dict)

    def run(self, label: str, device: int, seconds: float, after: Iterable[str], k: int) -> str:
        """An action of microbatch k; returns the task's name."""
        name = f"{label}.{k}"
        shown = name if self.microbatches > 1 else label
        self.tasks.append(Task(name, device_name(device), seconds, tuple(dict.fromkeys(after)), label=shown))
        return name

    def send(self, value: str, what: str, source: int, target: int, after: Sequence[str], k: int) -> list[str]:
        """The tasks after which `what` (a value's z, e or gradient) of microbatch k is on the target's device."""
        if source == target:
            return list(after)
        key = (f"{what} {value}", source, target, k)
        if key not in self.sent:
            size = 0 if self.sizes is None else -(-self.sizes.of(value) // self.microbatches)
            name = f"{what} {value} {source}>{target}.{k}"
            seconds = size / self.link.bandwidth
            delay = self.link.latency if self.sizes is not None else 0.0
            port, to = f"port {source}", device_name(target)
            self.tasks.append(Task(name, port, seconds, tuple(after), delay, label=what, bytes=size, to=to))
            self.sent[key] = name
        return [self.sent[key]]

    def owner(self, value: str) -> int | None:
        """The number of the subgraph that computes a value; None for inputs and sizes."""
        name = self.graph.owner.get(value)
        return None if name is None else self.graph.number[name]

    def device(self, number: int) -> int:
        return self.place[number - 1]

    def outputs(self) -> list[tuple[str, int]]:
        """The values that the model returns, each once, with their devices."""
        owners = ((v, self.owner(v)) for v in dict.fromkeys(self.graph.outputs))
        return [(v, self.device(owner)) for v, owner in owners if owner]

    def loss_device(self) -> int:
        """Where the loss is computed: the last device that gives an output."""
        return max(device for _, device in self.outputs())

    def forward(self, costs: Mapping[Key, float]) -> None:
        """The forward pipeline."""
        for k in range(1, self.microbatches + 1):
            for subgraph in self.graph.subgraphs:
                n = self.graph.number[subgraph.name]
                after = [name for v in subgraph.inputs if self.owner(v) for name in self.value(v, self.device(n), k)]
                after += [f"F{self.graph.number[p]}.{k}" for p in self.graph.quotient.predecessors(subgraph.name)]
                self.run(f"F{n}", self.device(n), costs["F", n] / self.microbatches, after, k)

    def value(self, value: str, device: int, k: int) -> list[str]:
        """The tasks after which a representation is on a device."""
        owner = self.owner(value)
        assert owner is not None
        return self.send(value, "z", self.device(owner), device, [f"F{owner}.{k}"], k)


def local(
    graph: LocalGraph, place: Sequence[int], costs: Mapping[Key, float], microbatches: int = 1,
    link: Link = Link(), sizes: Sizes | None = None,
) -> list[Task]:  # fmt: skip
    """The step of local learning. costs: seconds of each action on the whole batch."""
    tasks = Tasks(graph, place, microbatches, link, sizes)
    tasks.forward(costs)
    last = tasks.loss_device()
    order = [key for key in action_dependencies(graph) if key[0] != "F"]
    scheduled = [(a.kind, a.subgraph) for a in graph.schedule if a.kind != "F"]
    for k in range(1, microbatches + 1):
        loss = [name for v, _ in tasks.outputs() for name in tasks.value(v, last, k)]
        for kind, n in scheduled or order:
            after = [f"D{n}.{k}"] if kind == "U" else [f"F{n}.{k}", *_messages(tasks, n, last, loss, k)]
            tasks.run(f"{kind}{n}", tasks.device(n), costs[kind, n] / microbatches, after, k)
    return sorted(tasks.tasks, key=lambda task: _URGENCY.get(task.label[0], 0))


_URGENCY = {"D": 0, "F": 1, "U": 2}
"""What a device runs first: errors are short, and others wait for them; updates are waited for by nobody."""


def _messages(tasks: Tasks, n: int, last: int, loss: list[str], k: int) -> list[str]:
    """The tasks after which the errors that reach subgraph n are on its device."""
    found: list[str] = []
    device = tasks.device(n)
    for c in tasks.graph.incoming(tasks.graph.subgraphs[n - 1].name):
        if c.kind == "head":  # the labels are on every device
            continue
        if c.kind == "loss":
            found += tasks.send(c.value, "e", last, device, loss, k)
            continue
        source = tasks.graph.number[c.source]
        value, sender = (c.value, f"U{source}.{k}") if c.kind == "vjp" else (c.source_value, f"D{source}.{k}")
        found += tasks.send(value, "e", tasks.device(source), device, [sender], k)
    return found


def backprop(
    graph: LocalGraph, place: Sequence[int], costs: Mapping[Key, float], microbatches: int = 1,
    link: Link = Link(), sizes: Sizes | None = None, schedule: str = "gpipe",
) -> list[Task]:  # fmt: skip
    """The step of backpropagation on the same devices, by `gpipe` or `1f1b`; a stage is all of a device's subgraphs.

    costs: seconds of `F` and `U` (here: the whole backward) of each subgraph on the whole batch.
    """
    tasks = Tasks(graph, place, microbatches, link, sizes)
    stages = max(place) + 1
    members = [[n for n, d in enumerate(place, 1) if d == stage] for stage in range(stages)]
    forward, backward = (
        [sum(costs.get((kind, n), 0.0) for n in numbers for kind in kinds) / microbatches for numbers in members]
        for kinds in (KINDS[:1], KINDS[1:])
    )
    crossing = _crossing(tasks)
    orders = [_order(schedule, stage, stages, microbatches) for stage in range(stages)]
    before = {task: previous for order in orders for previous, task in pairwise(order)}
    for k in range(1, microbatches + 1):
        for stage in range(stages):
            after = [t for v, a, b in crossing if b == stage for t in tasks.send(v, "z", a, b, [f"F{a + 1}.{k}"], k)]
            after += [before[f"F{stage + 1}.{k}"]] if f"F{stage + 1}.{k}" in before else []
            tasks.run(f"F{stage + 1}", stage, forward[stage], after, k)
    for k in range(1, microbatches + 1):
        errors = _errors(tasks, k)
        for stage in reversed(range(stages)):
            after = [f"F{stage + 1}.{k}", *errors.get(stage, ())]
            below = [(v, b) for v, a, b in crossing if a == stage and graph.is_float(v)]
            after += [t for v, b in below for t in tasks.send(v, "g", b, stage, [f"B{b + 1}.{k}"], k)]
            after += [before[f"B{stage + 1}.{k}"]] if f"B{stage + 1}.{k}" in before else []
            tasks.run(f"B{stage + 1}", stage, backward[stage], after, k)
    return tasks.tasks


def _crossing(tasks: Tasks) -> list[tuple[str, int, int]]:
    """The values that one device computes and another reads, as (value, from, to)."""
    read = ((v, tasks.owner(v), tasks.graph.number[s.name]) for s in tasks.graph.subgraphs for v in s.inputs)
    found = {(v, tasks.device(owner), tasks.device(reader)) for v, owner, reader in read if owner}
    return sorted((v, a, b) for v, a, b in found if a != b)


def _errors(tasks: Tasks, k: int) -> dict[int, list[str]]:
    """For each stage that gives outputs, the tasks after which their errors of microbatch k are on its device.

    The loss waits for all outputs of the microbatch.
    """
    last, learning = tasks.loss_device(), {v for neuron in tasks.graph.error_neurons for v in neuron.values}
    loss = [t for v, a in tasks.outputs() for t in tasks.send(v, "z", a, last, [f"F{a + 1}.{k}"], k)]
    found: dict[int, list[str]] = {}
    for v, a in tasks.outputs():
        if v in learning:
            found.setdefault(a, []).extend(tasks.send(v, "e", last, a, loss, k))
    return found


def busiest_link(timeline: Timeline) -> tuple[str, float] | None:
    """The device whose messages take longest, with where they go (`device 2 -> device 3`), and those seconds.

    None if nothing is sent.
    """
    sent: dict[str, list[Task]] = {}
    for slot in timeline.slots:
        if slot.task.to and slot.task.seconds:
            sent.setdefault(slot.task.resource, []).append(slot.task)
    if not sent:
        return None
    port, tasks = max(sent.items(), key=lambda item: sum(task.seconds for task in item[1]))
    targets = " and ".join(sorted({task.to for task in tasks}))
    return f"{port.replace('port', 'device')} -> {targets}", sum(task.seconds for task in tasks)


def _order(schedule: str, stage: int, stages: int, microbatches: int) -> list[str]:
    """The order of a stage's tasks."""
    forward = [f"F{stage + 1}.{k}" for k in range(1, microbatches + 1)]
    backward = [f"B{stage + 1}.{k}" for k in range(1, microbatches + 1)]
    if schedule == "gpipe":
        return forward + backward
    warm = min(stages - 1 - stage, microbatches)
    order = forward[:warm]
    for k in range(microbatches):
        order += [*forward[warm + k : warm + k + 1], backward[k]]
    return order
