"""The rule on the schedule: every action once, and none before what it needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from graphlocal.ir import Action, ActionKind, Connection, LocalGraph
from graphlocal.text.summary import schedule_grid
from graphlocal.verify.rule import Broken, Rule

Key = tuple[ActionKind, int]
_AROUND = 2
"""Steps shown before and after an error."""


def action_dependencies(graph: LocalGraph) -> dict[Key, set[Key]]:
    """What each action of the graph needs to be done before it, in an order that respects it.

    `F` of a subgraph needs `F` of those that it waits for. `D` needs `F` of its subgraph and, for each error
    that reaches the neuron, the loss (so every `F`), `U` of the source of a vjp, `D` of that of a feedback; a local
    head needs nothing more.
    `U` needs `D` of its subgraph. Only subgraphs with an error neuron have `D` and `U`.
    """
    number = graph.number
    needs: dict[Key, set[Key]] = {}
    for name, n in number.items():
        needs["F", n] = {("F", number[before]) for before in graph.quotient.predecessors(name)}
    forward = set(needs)
    for name, n in number.items():
        if name in graph.neuron:
            needs["D", n] = {("F", n)}
            for connection in graph.incoming(name):
                if connection.kind != "head":
                    needs["D", n] |= forward if connection.kind == "loss" else {_sent(graph, connection)}
            needs["U", n] = {("D", n)}
    return needs


def _sent(graph: LocalGraph, connection: Connection) -> Key:
    """The action after which the message of a connection between two subgraphs is known."""
    return "U" if connection.kind == "vjp" else "D", graph.number[connection.source]


def _schedule_legal(graph: LocalGraph) -> Iterator[Broken]:
    if not graph.schedule:
        return
    needs = action_dependencies(graph)
    found = Counter((action.kind, action.subgraph) for action in graph.schedule)
    for kind, n in needs:
        if found[kind, n] == 0:
            yield Broken(f"the schedule has no {kind}{n} (subgraph {graph.subgraphs[n - 1].name!r})")
    done: dict[Key, Action] = {}
    last = Action(0, 0, "F", 1)
    for action in graph.schedule:
        key = (action.kind, action.subgraph)
        missing = [need for need in sorted(needs.get(key, ())) if not _before(done.get(need), action)]
        if key not in needs:
            yield _broken(graph, action, "is no action of this graph: there is no such subgraph or error neuron")
        elif key in done:
            yield _broken(graph, action, f"is there {found[key]} times")
        elif (action.step, action.stream) < (last.step, last.stream):
            yield _broken(graph, action, f"is listed after {last}, which is later (step {last.step})")
        elif missing:
            listed = ", ".join(f"{kind}{n} (subgraph {graph.subgraphs[n - 1].name!r})" for kind, n in missing)
            yield _broken(graph, action, f"runs before what it needs: {listed}")
        done.setdefault(key, action)
        last = action


def _before(done: Action | None, action: Action) -> bool:
    """Whether an action that is listed earlier is over when `action` starts."""
    return done is not None and (done.step < action.step or (done.step == action.step and done.stream == action.stream))


def _broken(graph: LocalGraph, action: Action, problem: str) -> Broken:
    steps = sorted({a.step for a in graph.schedule})
    at = steps.index(action.step)
    shown = set(steps[max(at - _AROUND, 0) : at + _AROUND + 1])
    grid = schedule_grid([a for a in graph.schedule if a.step in shown], mark=action)
    place = f"step {action.step}, stream {action.stream}"
    return Broken(f"{action} {problem} ({place})\n" + "\n".join(f"  {row}" for row in grid))


RULES = (
    Rule(
        "schedule-legal",
        _schedule_legal,
        needs=("acyclic-quotient", "acyclic-error-graph"),
        why="an action is over before the next step, and before the next action of its own stream",
        remedy="put the action behind what it needs; report a schedule that graphlocal itself made",
    ),
)
