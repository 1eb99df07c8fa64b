"""The verifier: a table of named rules that every graph keeps, run before and after every pass.

A rule says nothing about what a graph does not have yet: without subgraphs, the rules on the partition hold.
`verify` raises the first broken rule, `violations` lists all of them. The rules, in the order they run:

- the operations: `unique-names`, `program-order`;
- the partition: `coverage`, `groups`, `regions`, `convexity`, `acyclic-quotient`, `topological`, `boundary`,
  `tail`;
- the error graph: `error-neurons`, `connections`, `acyclic-error-graph`, `error-reach`, `message-shapes`;
- the schedule: `schedule-legal`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from graphlocal.errors import InputError, VerifyError, nearest
from graphlocal.ir import LocalGraph
from graphlocal.verify import error_graph, operations, partition, schedule
from graphlocal.verify.error_graph import (
    carries_derivative,
    dead_parameters,
    has_no_derivative,
    influential_operations,
    learning_values,
)
from graphlocal.verify.rule import Rule
from graphlocal.verify.schedule import action_dependencies

__all__ = [
    "RULES",
    "Rule",
    "action_dependencies",
    "carries_derivative",
    "dead_parameters",
    "has_no_derivative",
    "influential_operations",
    "learning_values",
    "verify",
    "violations",
]

_TABLES = (operations.RULES, partition.RULES, error_graph.RULES, schedule.RULES)
RULES: dict[str, Rule] = {rule.name: rule for table in _TABLES for rule in table}


def verify(graph: LocalGraph, rules: Iterable[str] | None = None) -> None:
    """Raise the first broken one of all rules, or of those named: a VerifyError, for cycles a CycleError."""
    for error in _found(graph, tuple(RULES if rules is None else rules)):
        raise error


def violations(graph: LocalGraph) -> list[VerifyError]:
    """Every place where a rule is broken, without the rules whose `needs` are broken."""
    return list(_found(graph, tuple(RULES)))


def _found(graph: LocalGraph, names: tuple[str, ...]) -> Iterator[VerifyError]:
    for name in names:
        if name not in RULES:
            raise InputError(f"the verifier has no rule {name!r}", remedy=nearest(name, RULES))
    doubtful: set[str] = set()  # broken, or not checked because of a broken one
    for rule in RULES.values():
        if rule.name not in names:
            continue
        if not doubtful.isdisjoint(rule.needs):
            doubtful.add(rule.name)
            continue
        for error in rule.violations(graph):
            doubtful.add(rule.name)
            yield error
