"""Several training steps in a row on one device, as tasks for the simulator: one by one, or overlapping.

Overlapping, the forward pass of a subgraph waits for its own update in the step before, and no longer for those of
the others; with a staleness of k, for its update k steps further back. A step's errors wait for the updates of the step
before, since its loss is handed out in between.
"""

from __future__ import annotations

from collections.abc import Mapping

from graphlocal.ir import ActionKind, LocalGraph
from graphlocal.passes.cost import Key
from graphlocal.passes.simulate import Task, simulate
from graphlocal.verify import action_dependencies

DEVICE = "device"


def steps_in_a_row(
    graph: LocalGraph, costs: Mapping[Key, float], count: int, staleness: int | None
) -> tuple[Task, ...]:
    """The actions of `count` steps, the most urgent first. staleness: None lets each step wait for the one before."""
    needs = action_dependencies(graph)
    forward = [key for key in needs if key[0] == "F"]
    after = sorted((key for key in needs if key[0] != "F"), key=lambda key: (key[1], key[0]))
    urgent: list[tuple[int, bool, int, Task]] = []
    for step in range(count):
        for place, key in enumerate((*forward, *after)):
            before = {_name(step, need) for need in needs[key]}
            if key[0] != "F":
                before |= {_name(step, need) for need in forward}  # the loss
                before |= {_name(step - 1, need) for need in after if step}
            elif staleness is None:
                before |= {_name(step - 1, need) for need in (after or forward) if step}
            else:
                own: ActionKind = "U" if ("U", key[1]) in needs else "F"
                before |= {_name(step - 1, key)} if step else set()
                before |= {_name(step - 1 - staleness, (own, key[1]))} if step > staleness else set()
                before |= {_name(step - 1 - staleness, need) for need in forward if step > staleness}
            task = Task(_name(step, key), DEVICE, costs.get(key, 0.0), tuple(sorted(before)), label=_name(step, key))
            urgent.append((step, key[0] != "F", place, task))
    behind = 0 if staleness is None else 1 + staleness  # forward passes go before the learning of earlier steps
    urgent.sort(key=lambda entry: (entry[0] + behind * entry[1], entry[1], entry[2]))
    return tuple(task for *_, task in urgent)


def seconds_a_step(
    graph: LocalGraph, costs: Mapping[Key, float], streams: int, staleness: int | None, steps: int = 6
) -> float:
    """The time that one more step takes, on a device that runs so many actions at one time."""
    few, many = (
        simulate(steps_in_a_row(graph, costs, n, staleness), {DEVICE: streams}).makespan for n in (steps // 2, steps)
    )
    return (many - few) / (steps - steps // 2)


def _name(step: int, key: Key) -> str:
    return f"{key[0]}{key[1]}.{step}"
