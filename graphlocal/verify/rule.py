"""What a rule of the verifier is: a name, a check, and words for its errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx

from graphlocal.errors import CycleError, VerifyError
from graphlocal.ir import LocalGraph

REPORT = "this is a fault of the pass that ran last, not of the model: please report it with print(graph)"

_MOST = 8
"""Lists in messages are cut short beyond this."""


@dataclass(frozen=True)
class Broken:
    """One place where a rule does not hold; `why` and `remedy` replace those of the rule.

    cycle: the subgraphs of a cycle, the first one again at the end.
    """

    message: str
    where: str | None = None
    why: str | None = None
    remedy: str | None = None
    cycle: tuple[str, ...] = ()


Check = Callable[[LocalGraph], Iterator[Broken]]


@dataclass(frozen=True)
class Rule:
    """A named rule. `needs`: the rules that must hold for this one's check to make sense."""

    name: str
    check: Check
    why: str
    needs: tuple[str, ...] = ()
    remedy: str = REPORT

    def violations(self, graph: LocalGraph) -> Iterator[VerifyError]:
        for broken in self.check(graph):
            why, remedy = broken.why or self.why, broken.remedy or self.remedy
            if broken.cycle:
                yield CycleError(self.name, broken.message, broken.cycle, why=why, remedy=remedy)
            else:
                yield VerifyError(self.name, broken.message, where=broken.where, why=why, remedy=remedy)


def place(graph: LocalGraph, operation: str) -> str:
    """`relu in layer1.0.relu, resnet.py:93`: where an operation stands in the user's model."""
    op = graph.operation[operation]
    module = f" in {op.module}" if op.module else ""
    return op.name + module + (f", {op.source}" if op.source else "")


def repeated(names: Iterable[str]) -> list[str]:
    """The names that come more than once, each once."""
    return [name for name, count in Counter(names).items() if count > 1]


def listed(names: Iterable[str]) -> str:
    """`'a', 'b'`, or `none`; many are cut short."""
    first, *rest = [repr(name) for name in names] or ["none"]
    more = [f"{len(rest) - _MOST + 1} more"] if len(rest) >= _MOST else []
    return ", ".join([first, *rest[: _MOST - 1], *more])


def steps(lines: Iterable[str]) -> str:
    """The lines below a message, indented; many are cut short in the middle."""
    lines = [f"\n    {line}" for line in lines]
    if len(lines) > 2 * _MOST:
        lines[_MOST:-_MOST] = [f"\n    ... {len(lines) - 2 * _MOST} more ..."]
    return "".join(lines)


def shortest_cycles(graph: nx.DiGraph, order: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """For each knot of cycles, a shortest one through its first node in `order`, which ends as it starts."""
    knot = {node: number for number, part in enumerate(nx.strongly_connected_components(graph)) for node in part}
    seen: set[int] = set()
    for node in order:
        inside = [after for after in graph.successors(node) if knot[after] == knot[node]]
        if inside and knot[node] not in seen:
            seen.add(knot[node])
            ways_back = (nx.shortest_path(graph, after, node) for after in inside)
            yield (node, *min(ways_back, key=len))
