"""FindDiscreteUnits: mark sign, round, thresholds and samples, which stop a gradient, for errors to pass by.

A discrete unit g(f) takes a float value f to a float value and has no useful derivative: one operation (`sign`,
`round`, `heaviside`, `bernoulli`), or a comparison and what makes a float of it (`(f > 1).float()`, `rand < f`).
It is marked where it would stop learning: f depends on a trainable parameter, the unit's result can reach an output
of the model, and no derivative of an output with respect to f exists by any other way. So a gate `f * (f > 0)` is left
alone, since its product rule is right; and so is a unit of a parameter itself, which is no value: `sign(w)` has the
derivative that autograd gives it, `sign(w.clone())` is a unit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from graphlocal.errors import InputError
from graphlocal.ir import LocalGraph, Operation
from graphlocal.verify import carries_derivative, has_no_derivative, learning_values
from graphlocal.verify.rule import place

_UNIT = re.compile(r"aten\.(sign|sgn|round|floor|ceil|trunc|fix|heaviside|bernoulli)\.(default|out|decimals)$")
_SQUASHING = re.compile(r"aten\.(sigmoid|tanh|hardtanh|hardsigmoid)\.")
_RISING, _FALLING = re.compile(r"aten\.(gt|ge)\."), re.compile(r"aten\.(lt|le)\.")
_CONVERTS = re.compile(r"aten\.(to|_to_copy|type_as|where|mul)\b")


@dataclass(frozen=True)
class FindDiscreteUnits:
    """Set `discrete_of` on the last operation of every discrete unit, and group the unit's operations.

    before_squashing: where f is a sigmoid or tanh of x, take x for f. beside_derivatives: also where a derivative of an
    output with respect to f exists by another way, for estimators that add to it.

    Raises InputError where f is a sigmoid or tanh of a parameter itself, and x so no value.
    """

    before_squashing: bool = False
    beside_derivatives: bool = False
    name: str = "discrete-units"

    def apply(self, graph: LocalGraph) -> LocalGraph:
        units = _units(graph, self.beside_derivatives)
        changed: dict[str, Operation] = {}
        for last, (f, chain) in units.items():
            if self.before_squashing:
                f, chain = _before_squashing(graph, f, chain)
            group = next((graph.operation[op].group for op in chain if graph.operation[op].group), f"unit {last}")
            for name in chain if len(chain) > 1 else ():
                changed[name] = replace(changed.get(name, graph.operation[name]), group=group)
            changed[last] = replace(changed.get(last, graph.operation[last]), discrete_of=f)
        return replace(graph, operations=tuple(changed.get(op.name, op) for op in graph.operations)) if units else graph


def _before_squashing(graph: LocalGraph, f: str, chain: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The value f and the unit's operations, with the sigmoid or tanh before them taken into the unit."""
    sign, value = ("-", f[1:]) if f.startswith("-") else ("", f)
    op = graph.operation.get(value)
    if op is None or not _SQUASHING.match(op.target):
        return f, chain
    if not op.inputs:
        state = ", ".join(op.states)
        raise InputError(
            f"errors can't pass by {op.name!r}, since it is applied to the parameter {state!r} itself",
            where=place(graph, op.name),
            why="an estimator sends the error of a discrete unit to the value before its sigmoid or tanh, and a "
            "parameter is no value of the graph",
            remedy="apply it to a copy, parameter.clone()",
        )
    return sign + op.inputs[0], (value, *chain)


def _units(graph: LocalGraph, beside_derivatives: bool) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For the last operation of each unit: f, with its sign, and the unit's operations."""
    learning = learning_values(graph)
    smooth = {value for value in graph.outputs if graph.is_float(value)}  # by derivatives alone
    reached = set(smooth)  # also past units
    candidates: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {}  # by f: (last, f with sign, operations)
    pending: dict[str, tuple[str, ...]] = {}  # comparisons whose float result is reached: the chain after them
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for op in reversed(graph.operations):
        if op.name in candidates and (beside_derivatives or op.name not in smooth):
            reached.add(op.name)
            found.update({last: (f, chain) for last, f, chain in candidates[op.name]})
        if op.name in pending:
            chain = (op.name, *pending[op.name])
            for f, sign in _compared(graph, op, learning):
                candidates.setdefault(f, []).append((chain[-1], sign + f, chain))
        elif op.name in reached:
            source = _converted(graph, op)
            if op.inputs and _UNIT.match(op.target):
                candidates.setdefault(op.inputs[0], []).append((op.name, op.inputs[0], (op.name,)))
            elif source is not None:
                pending[source] = (op.name,)
            elif not has_no_derivative(op):
                sources = {value for value in op.inputs if _may_carry(graph, value)}
                reached |= sources
                smooth |= sources if op.name in smooth else set()
    return {last: unit for last, unit in found.items() if unit[0].removeprefix("-") in learning}


def _compared(graph: LocalGraph, op: Operation, learning: frozenset[str]) -> list[tuple[str, str]]:
    """The float operand of a comparison that learns, and the sign with which the result follows it."""
    if not (_RISING.match(op.target) or _FALLING.match(op.target)):
        return []
    operands = [value for value in op.inputs if value in learning]
    if len(operands) != 1:
        return []
    first = op.inputs[0] == operands[0]
    return [(operands[0], "" if bool(_RISING.match(op.target)) == first else "-")]


def _converted(graph: LocalGraph, op: Operation) -> str | None:
    """The comparison that the operation makes a float of."""
    if not _CONVERTS.match(op.target) or not op.inputs:
        return None
    source = graph.operation.get(op.inputs[0])
    constants = all(not _may_carry(graph, value) for value in op.inputs[1:])
    boolean = source is not None and source.type is not None and source.type.dtype == "bool"
    return source.name if source is not None and boolean and constants else None


def _may_carry(graph: LocalGraph, value: str) -> bool:
    return value in graph.operation and carries_derivative(graph.operation[value])
