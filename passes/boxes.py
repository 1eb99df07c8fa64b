"""Boxes: labels on operations, and how what no policy labelled joins a neighbouring box.

A policy gives **labels**: operation -> name of its box, with no entry for operations that it leaves open.
`complete` then gives every open operation to a box:

1. an open operation with a parameter gets a box of its own; where `light` ones don't, only if it applies weights to
   a value (`linear`, `matmul` with a transposed parameter), not if it only adds or scales by a parameter;
2. an elementwise operation, or one that combines values (a residual addition), joins the box that made its
   latest input, so that a box ends with its activation function;
3. any other operation (pooling, reshaping, dropout, attention's products) joins the box that reads it, if
   that is one box, else the box that made its latest input;
4. what is left after the last parameter (the loss inside a model, a final softmax) is the `tail`, and what
   comes before every parameter and serves several boxes (an attention mask) is the `prelude`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from graphlocal.ir import LocalGraph, Operation

Labels = dict[str, str]

_COMBINES = re.compile(r"aten\.(add|sub|mul|div|maximum|minimum)\.")
_LIGHT = re.compile(
    r"aten\.(add|sub|mul|div|maximum|minimum|prelu|expand|repeat|view|reshape|unsqueeze|squeeze|t|transpose|permute|"
    r"slice|select|cat|stack)\b"
)
_APPLIES = re.compile(r"aten\.(linear|matmul|mm|bmm|addmm|baddbmm|einsum|embedding|conv|lstm|gru|rnn|\w+_norm)\w*\b")
PRELUDE, TAIL = "prelude", "tail"


def is_parametric(graph: LocalGraph, op: Operation) -> bool:
    """True if the operation reads a parameter of the model, frozen or not."""
    return any(graph.state[name].kind == "parameter" for name in op.states)


def has_weights(graph: LocalGraph, op: Operation) -> bool:
    """True if the operation reads a parameter with two or more axes; a normalization does not."""
    states = (graph.state[name] for name in op.states)
    return any(state.kind == "parameter" and len(state.type.shape) > 1 for state in states)


def module_prefixes(op: Operation) -> list[str]:
    """`a.b.c` -> `["a", "a.b", "a.b.c"]`: the modules that the operation ran in, outermost first."""
    parts = op.module.split(".") if op.module else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def readers_of(operations: Sequence[Operation]) -> dict[str, list[str]]:
    """The operations that read each value, in program order."""
    found: dict[str, list[str]] = {}
    for op in operations:
        for source in op.inputs:
            found.setdefault(source, []).append(op.name)
    return found


def reading_parameters(graph: LocalGraph, operations: Sequence[Operation]) -> tuple[set[str], set[str]]:
    """The operations that read a parameter, or what was made of parameters alone; those that apply it as weights.

    Weights are applied where they are more than added or multiplied.
    """
    derived = {op.name for op in graph.sizes}  # what was made of sizes and parameters alone
    made, reading, applying = set[str](), set[str](), set[str]()
    for op in operations:
        if not is_parametric(graph, op) and made.isdisjoint(op.inputs):
            continue
        reading.add(op.name)
        alone = derived.issuperset(op.inputs)
        if (alone and _APPLIES.match(op.target)) or not (alone or op.pointwise or _LIGHT.match(op.target)):
            applying.add(op.name)
        elif alone:
            derived.add(op.name)
            made.add(op.name)
    return reading, applying


def complete(graph: LocalGraph, operations: Sequence[Operation], given: Labels, light: bool = True) -> Labels:
    """Give every operation a box, by the four cases of the module's docstring.

    light: whether operations that only add a parameter, or scale by it, get boxes of their own.
    """
    members = {op.name: op for op in operations}
    found = dict(given)
    parametric = heavy = {op.name for op in operations if is_parametric(graph, op)}
    if not light:
        parametric, heavy = reading_parameters(graph, operations)
    by_module = {op.module: op for op in operations if op.name in parametric}
    for op in operations:  # case 1, and a buffer's update goes with its module's operation
        if op.name not in found and op.name in heavy:
            found[op.name] = _box_name(op, found.values())
    for op in operations:
        if op.name not in found and not op.inputs and by_module.get(op.module, op).name in found:
            found[op.name] = found[by_module[op.module].name]
    position = {op.name: i for i, op in enumerate(graph.operations)}
    readers = readers_of(operations)
    trailing = _trailing(graph, operations, found, parametric, readers)
    for op in operations:  # case 2
        follows = op.pointwise or op.discrete_of or _COMBINES.match(op.target)
        if op.name in parametric and op.inputs and op.name not in found:
            _join_producer(op, found, position, members, at_once=False)
        elif follows and op.name not in found and op.name not in trailing:
            _join_producer(op, found, position, members)
    for op in reversed(operations):  # case 3
        if op.name not in found and op.name not in trailing:
            boxes = {found.get(reader) for reader in readers.get(op.name, ())}
            box = boxes.pop() if len(boxes) == 1 else None
            if box is not None:
                found[op.name] = box
    for op in operations:  # cases 3 and 4
        if op.name not in found:
            if op.name in trailing:
                found[op.name] = TAIL
            elif not _join_producer(op, found, position, members):
                found[op.name] = PRELUDE
    _join_groups(operations, found)
    return {name: box for name, box in found.items() if name in members}


def _box_name(op: Operation, taken: Iterable[str]) -> str:
    name = op.module or op.name
    return name if name not in set(taken) else f"{name}:{op.name}"


def _join_producer(
    op: Operation, found: Labels, position: dict[str, int], members: dict[str, Operation], at_once: bool = True
) -> bool:
    """Join the box of the latest input; an input that is in no box yet counts as those that it is made of.

    at_once: only if an input is in a box already.
    """
    inputs = [op.discrete_input] if op.discrete_of else list(op.inputs)
    if at_once and all(found.get(source, PRELUDE) == PRELUDE for source in inputs):
        return False
    producers, pending, seen = [], inputs, set[str]()
    while pending:
        source = pending.pop()
        if source in found:
            producers += [source] if found[source] != PRELUDE else []
        elif source in members and source not in seen:
            seen.add(source)
            pending += members[source].inputs
    if producers:
        found[op.name] = found[max(producers, key=position.__getitem__)]
    return bool(producers)


def _trailing(graph: LocalGraph, operations: Sequence[Operation], found: Labels, parametric: set[str],
              readers: dict[str, list[str]]) -> set[str]:  # fmt: skip
    """Open operations without a parameter that nothing in a box comes after, and that combine no two boxes' values."""
    outside = {name for op in graph.operations for name in op.inputs} - {
        name for op in operations for name in op.inputs
    }
    trailing: set[str] = set()
    for op in reversed(operations):
        if (
            op.name in found
            or op.name in parametric
            or op.name in outside
            or not (op.inputs or op.name in graph.outputs)
        ):
            continue
        boxes = {found[source] for source in op.inputs if source in found}
        combines = _COMBINES.match(op.target) and len(boxes) > 1
        if not combines and all(reader in trailing for reader in readers.get(op.name, ())):
            trailing.add(op.name)
    reached: set[str] = set()
    for op in operations:  # keep what really follows a box: a mask computed last is no tail
        if op.name in trailing and any(source in found or source in reached for source in op.inputs):
            reached.add(op.name)
    return reached


def _join_groups(operations: Sequence[Operation], found: Labels) -> None:
    """Operations of one group take the box of the group's first operation that has a parameter's box."""
    for op in operations:
        if op.group:
            members = [other.name for other in operations if other.group == op.group]
            boxes = [found[name] for name in members if found[name] not in (PRELUDE, TAIL)]
            for name in members:
                found[name] = (boxes or [found[members[0]]])[0]
