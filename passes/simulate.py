"""A discrete-event simulator: tasks with durations and dependencies on resources that run a few at a time.

It knows nothing of models. `simulate(tasks, capacity)` starts, whenever a resource has room, the first task in the
list whose dependencies are over (greedy list scheduling); a schedule with a fixed order is given by dependencies.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter

from graphlocal.errors import InputError


@dataclass(frozen=True)
class Task:
    """resource: what it occupies for `seconds`; "" for nothing. after: names of the tasks that it waits for.

    delay: seconds from its end until those that wait for it may start (the latency of a link). label: in pictures.
    bytes: that it moves, to the resource `to`.
    """

    name: str
    resource: str
    seconds: float
    after: tuple[str, ...] = ()
    delay: float = 0.0
    label: str = ""
    bytes: int = 0
    to: str = ""


@dataclass(frozen=True)
class Slot:
    """When a task ran."""

    task: Task
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What `simulate` returns: every task once, by start; makespan in seconds."""

    slots: tuple[Slot, ...]
    capacity: Mapping[str, int] = field(default_factory=dict)

    @property
    def makespan(self) -> float:
        return max((slot.end + slot.task.delay for slot in self.slots), default=0.0)

    def busy(self, resource: str) -> float:
        """Seconds of work on a resource."""
        return sum(slot.end - slot.start for slot in self.slots if slot.task.resource == resource)

    def bubble(self, resources: Sequence[str]) -> float:
        """The share of the resources' time, from 0 to the makespan, in which they stand idle."""
        available = self.makespan * sum(self.capacity.get(r, 1) for r in resources)
        return 1 - sum(map(self.busy, resources)) / available if available else 0.0

    @property
    def bytes(self) -> int:
        """What the tasks move, together."""
        return sum(slot.task.bytes for slot in self.slots)


def simulate(tasks: Sequence[Task], capacity: Mapping[str, int] | None = None) -> Timeline:
    """Run the tasks. capacity: how many a resource runs at one time; 1 where nothing is said.

    Raises InputError for two tasks of one name, a dependency on a task that isn't there, and a cycle.
    """
    capacity = dict(capacity or {})
    place = {task.name: i for i, task in enumerate(tasks)}
    _require_sound(tasks, place)
    followers: list[list[int]] = [[] for _ in tasks]
    waiting = [len(task.after) for task in tasks]
    for i, task in enumerate(tasks):
        for name in task.after:
            followers[place[name]].append(i)
    room: defaultdict[str, int] = defaultdict(lambda: 1, capacity)
    ready: defaultdict[str, list[int]] = defaultdict(list)
    events: list[tuple[float, int, int]] = []  # (time, 0: the resource is free, 1: followers may start, task)
    slots: list[Slot] = []

    def start(resource: str, now: float) -> None:
        while ready[resource] and (not resource or room[resource]):
            i = heapq.heappop(ready[resource])
            room[resource] -= 1
            end = now + tasks[i].seconds
            slots.append(Slot(tasks[i], now, end))
            heapq.heappush(events, (end, 0, i))
            heapq.heappush(events, (end + tasks[i].delay, 1, i))

    for i, count in enumerate(waiting):
        if not count:
            heapq.heappush(ready[tasks[i].resource], i)
    for resource in list(ready):
        start(resource, 0.0)
    while events:
        now = events[0][0]
        touched: set[str] = set()
        while events and events[0][0] == now:  # all that happens now, before anything starts
            _, kind, i = heapq.heappop(events)
            if kind == 0:
                room[tasks[i].resource] += 1
                touched.add(tasks[i].resource)
                continue
            for j in followers[i]:
                waiting[j] -= 1
                if not waiting[j]:
                    heapq.heappush(ready[tasks[j].resource], j)
                    touched.add(tasks[j].resource)
        for resource in sorted(touched):
            start(resource, now)
    if len(slots) < len(tasks):
        done = {slot.task.name for slot in slots}
        stuck = [task.name for task in tasks if task.name not in done]
        raise InputError(f"the tasks wait for each other in a cycle: {', '.join(stuck[:5])}")
    return Timeline(tuple(sorted(slots, key=lambda slot: (slot.start, place[slot.task.name]))), capacity)


def _require_sound(tasks: Sequence[Task], place: Mapping[str, int]) -> None:
    if len(place) < len(tasks):
        raise InputError("two tasks have one name")
    for task in tasks:
        if task.seconds < 0 or task.delay < 0:
            raise InputError(f"the task {task.name} takes {task.seconds} s with a delay of {task.delay} s")
        for name in task.after:
            if name not in place:
                raise InputError(f"the task {task.name} waits for {name!r}, which isn't there")


def critical_path(tasks: Sequence[Task]) -> float:
    """The longest chain of dependent tasks, in seconds: no number of resources makes it shorter."""
    known = {task.name: task for task in tasks}
    ends: dict[str, float] = {}
    for name in _in_order(known):
        task = known[name]
        ends[name] = max((ends[other] for other in task.after), default=0.0) + task.seconds + task.delay
    return max(ends.values(), default=0.0)


def _in_order(known: Mapping[str, Task]) -> list[str]:
    return list(TopologicalSorter({name: task.after for name, task in known.items()}).static_order())


def grid(timeline: Timeline, resources: Sequence[str], slot: float | None = None, columns: int = 24) -> list[str]:
    """A row for each resource, a column for each stretch of `slot` seconds (by default the makespan by `columns`).

    A cell names the task that ran longest in it, or is `.` where the resource stood idle for more than half of it.
    """
    width = slot or timeline.makespan / columns
    count = max(1, round(timeline.makespan / width + 0.499)) if width else 1
    shares: defaultdict[tuple[str, int], defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for ran in timeline.slots:
        first, last = int(ran.start / width + 1e-9), int(ran.end / width - 1e-9)
        for k in range(first, min(last, count - 1) + 1):
            share = min(ran.end, (k + 1) * width) - max(ran.start, k * width)
            shares[ran.task.resource, k][ran.task.label or ran.task.name] += share
    rows = [["", *map(str, range(1, count + 1))]]
    for resource in resources:
        rows.append([resource, *(_cell(shares.get((resource, k)), width) for k in range(count))])
    widths = [max(len(row[k]) for row in rows) for k in range(count + 1)]
    return [" ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(shares: Mapping[str, float] | None, width: float) -> str:
    if not shares or sum(shares.values()) < width / 2 - 1e-12:
        return "."
    return max(shares, key=lambda label: shares[label])
