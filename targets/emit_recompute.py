"""The part of the eager target that recomputes: subgraphs that run forward without autograd, and again for an update.

What a first run changes is put back for the second: it draws the random numbers of the first, works on copies of the
states that it writes, and runs under the same autocast.
"""

from __future__ import annotations

import fnmatch
import operator
from typing import Any

import torch
from torch import fx, nn

from graphlocal.autocast import Autocast, autocast_now, under
from graphlocal.errors import InputError, nearest
from graphlocal.ir import LocalGraph, Subgraph
from graphlocal.rules import Rule
from graphlocal.targets.bodies import preactivations
from graphlocal.targets.emit_reread import arguments_of
from graphlocal.targets.emitter import Emitter
from graphlocal.targets.reread import Body, Snapshot, draws_random, written_states


class Unrecorded(nn.Module):
    """A subgraph that runs without autograd, so that nothing of its interior is kept."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body

    def forward(self, *arguments: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            return self.body(*arguments)  # type: ignore[no-any-return]


class Circumstances(nn.Module):
    """What a subgraph's run depends on besides its arguments, as it is just before: (snapshot, autocast)."""

    def __init__(self, random: bool) -> None:
        super().__init__()
        self.snapshot = Snapshot(random)

    def forward(self, *states: torch.Tensor) -> tuple[Any, Autocast]:
        return self.snapshot(*states), autocast_now()


class Again(nn.Module):
    """forward(circumstances, *arguments) -> the subgraph's results, with their autograd history."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, circumstances: tuple[Any, Autocast], *arguments: Any) -> tuple[Any, ...]:
        snapshot, autocast = circumstances
        with torch.enable_grad(), under(autocast):
            return self.body(snapshot, arguments)


def may_run_twice(graph: LocalGraph, subgraph: Subgraph) -> bool:
    """Whether recomputation takes a subgraph: not if it trains nothing, or holds opaque code or guards."""
    operations = [graph.operation[name] for name in subgraph.operations]
    fixed = any(op.target.startswith("opaque") or "guard" in op.effects for op in operations)
    return subgraph.name in graph.neuron and not fixed


def chosen(graph: LocalGraph, rule: Rule, wanted: bool | tuple[str, ...]) -> frozenset[str]:
    """The subgraphs whose interior is not kept, by globs (True: all), but for those that can't run twice.

    Raises InputError for a glob that matches no subgraph, and for a rule that evaluates subgraphs again by itself.
    """
    if not wanted:
        return frozenset()
    if rule.engine != "schedule" or rule.relaxes or rule.rereads or rule.halting is not None:
        raise InputError(
            f"recompute={wanted!r} with the rule {rule}",
            why="it evaluates subgraphs more than once by itself, or has no forward pass that could keep less",
            remedy="leave recompute out, or use a rule of one forward and one error pass",
        )
    paths = {s.name: [s.name, *s.regions, *_enclosing(s.name)] for s in graph.subgraphs}
    globs = wanted if isinstance(wanted, tuple) else ("*",)
    for glob in globs:
        if not any(fnmatch.filter(names, glob) for names in paths.values()):
            raise InputError(
                f"recompute: the glob {glob!r} matches no subgraph of {graph.name}: {nearest(glob, list(paths))}",
                remedy="globs are matched with the subgraphs that print(local.graph) shows, and what encloses them",
            )
    return frozenset(
        subgraph.name
        for subgraph in graph.subgraphs
        if may_run_twice(graph, subgraph) and any(fnmatch.filter(paths[subgraph.name], glob) for glob in globs)
    )


def _enclosing(path: str) -> list[str]:
    """`a.b.c` -> `["a", "a.b"]`."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


class Recomputation:
    """The subgraphs of one emitted graph whose interior is not kept. names: of the subgraphs."""

    def __init__(self, emitter: Emitter, names: frozenset[str]) -> None:
        self.emitter, self.names = emitter, names
        self.before: dict[str, fx.Node] = {}
        self.bodies: dict[str, fx.GraphModule] = {}

    def forward(self, subgraph: Subgraph, body: fx.GraphModule) -> nn.Module:
        """What runs the subgraph in the forward pass."""
        emitter, graph = self.emitter, self.emitter.graph
        if subgraph.name not in self.names:
            return body
        number = graph.number[subgraph.name]
        states = map(emitter.attribute, written_states(graph, subgraph))
        circumstances = Circumstances(draws_random(graph, subgraph))
        self.before[subgraph.name] = emitter.call_module(f"S{number}", circumstances, *states)
        self.bodies[subgraph.name] = body
        return Unrecorded(body)

    def repeat(self, subgraph: Subgraph) -> None:
        """Run the subgraph again, for its error neuron and its update."""
        emitter, graph = self.emitter, self.emitter.graph
        if subgraph.name not in self.before:
            return
        arguments = arguments_of(emitter, subgraph)
        first = len(arguments) - len(subgraph.states) - sum(name in graph.twins for name in subgraph.states)
        written = tuple(first + subgraph.states.index(name) for name in written_states(graph, subgraph))
        module = Again(Body(self.bodies[subgraph.name], written))
        name = f"R{graph.number[subgraph.name]}"
        slope = [] if emitter.slope is None else [emitter.slope]
        result = emitter.call_module(name, module, self.before[subgraph.name], *arguments, *slope)
        names = [*(output.value for output in subgraph.outputs), *preactivations(subgraph)]
        names += emitter.scores[subgraph.name]
        for i, value in enumerate(names):
            emitter.attached[value] = emitter.call(operator.getitem, result, i, name=f"{value}_in_{name}")
