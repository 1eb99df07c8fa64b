"""Schedule: put the actions of a training step in order, on one or more streams."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

from graphlocal.ir import Action, ActionKind, LocalGraph
from graphlocal.verify import action_dependencies

Key = tuple[ActionKind, int]


@dataclass(frozen=True)
class Schedule:
    """List scheduling in unit time: each step starts the most urgent ready actions, one a stream.

    Forward actions go in topological order. Of the others, the subgraph nearest to the output is most urgent,
    and its update follows its error at once, so that its memory is freed as early as can be.
    streams: how many actions may run at one time.
    """

    streams: int = 1
    name: str = "schedule"

    def apply(self, graph: LocalGraph) -> LocalGraph:
        needs = action_dependencies(graph)
        waiting = {action: len(before) for action, before in needs.items()}
        unlocks: dict[Key, list[Key]] = {action: [] for action in needs}
        for action, before in needs.items():
            for other in before:
                unlocks[other].append(action)
        ready = [(_urgency(action), action) for action, count in waiting.items() if count == 0]
        heapq.heapify(ready)
        schedule: list[Action] = []
        step = 0
        while ready:
            running = [heapq.heappop(ready)[1] for _ in range(min(self.streams, len(ready)))]
            for stream, (kind, number) in enumerate(running):
                schedule.append(Action(step, stream, kind, number))
            for action in running:
                for follower in unlocks[action]:
                    waiting[follower] -= 1
                    if waiting[follower] == 0:
                        heapq.heappush(ready, (_urgency(follower), follower))
            step += 1
        return replace(graph, schedule=tuple(schedule))


def _urgency(action: Key) -> tuple[int, int, int]:
    kind, number = action
    return (0, number, 0) if kind == "F" else (1, -number, 0 if kind == "U" else 1)
