"""Partition policies: which operations a person would draw as one box.

A policy gives **labels**: operation -> name of its box, with no entry for operations that it leaves open.
`complete` then gives every open operation to a neighbouring box:

1. an open operation with a parameter gets a box of its own;
2. an elementwise operation, or one that combines values (a residual addition), joins the box that made its
   latest input, so that a box ends with its activation function;
3. any other operation (pooling, reshaping, dropout, attention's products) joins the box that reads it, if
   that is one box, else the box that made its latest input;
4. what is left after the last parameter (the loss inside a model, a final softmax) is the `tail`, and what
   comes before every parameter and serves several boxes (an attention mask) is the `prelude`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import networkx as nx

from graphlocal.errors import InputError, PartitionError, nearest
from graphlocal.ir import LocalGraph, Operation

Labels = dict[str, str]
Policy = str | int | Sequence[str] | Callable[[Operation], str | None]

_COMBINES = re.compile(r"aten\.(add|sub|mul|div|maximum|minimum)\.")
PRELUDE, TAIL = "prelude", "tail"
POLICIES = ("auto", "leaf")


def labels(graph: LocalGraph, policy: Policy) -> Labels:
    """Label every operation by a policy; boxes may still form cycles.

    Raises InputError for an unknown policy and PartitionError for a glob without a match.
    """
    operations = graph.operations
    if policy == "auto":
        return complete(graph, operations, module_boxes(graph, operations))
    if policy == "leaf":
        return complete(graph, operations, {})
    if isinstance(policy, str):
        raise InputError(
            f"unknown partition {policy!r}: {nearest(policy, POLICIES)}",
            remedy='use "auto", "leaf", a number of segments, a list of globs of module paths, or a callable',
        )
    if isinstance(policy, int):
        return _segments(graph, policy)
    if callable(policy):
        chosen = {op.name: policy(op) for op in operations}
        return complete(graph, operations, {name: box for name, box in chosen.items() if box is not None})
    return complete(graph, operations, _globs(graph, policy))


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


def complete(graph: LocalGraph, operations: Sequence[Operation], given: Labels) -> Labels:
    """Give every operation a box, by the four cases of the module's docstring."""
    members = {op.name for op in operations}
    found = dict(given)
    by_module = {op.module: op for op in operations if is_parametric(graph, op)}
    for op in operations:  # case 1, and a buffer's update goes with its module's operation
        if op.name not in found and is_parametric(graph, op):
            found[op.name] = _box_name(op, found.values())
    for op in operations:
        if op.name not in found and not op.inputs and op.module in by_module:
            found[op.name] = found[by_module[op.module].name]
    position = {op.name: i for i, op in enumerate(graph.operations)}
    trailing = _trailing(graph, operations, found)
    readers = _readers(operations)
    for op in operations:  # case 2
        if op.name not in found and (op.pointwise or _COMBINES.match(op.target)) and op.name not in trailing:
            _join_producer(op, found, position)
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
            elif not _join_producer(op, found, position):
                found[op.name] = PRELUDE
    _join_groups(operations, found)
    return {name: box for name, box in found.items() if name in members}


def _box_name(op: Operation, taken: Iterable[str]) -> str:
    name = op.module or op.name
    return name if name not in set(taken) else f"{name}:{op.name}"


def _join_producer(op: Operation, found: Labels, position: dict[str, int]) -> bool:
    producers = [source for source in op.inputs if source in found and found[source] != PRELUDE]
    if not producers:
        return False
    found[op.name] = found[max(producers, key=position.__getitem__)]
    return True


def _readers(operations: Sequence[Operation]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for op in operations:
        for source in op.inputs:
            found.setdefault(source, []).append(op.name)
    return found


def _trailing(graph: LocalGraph, operations: Sequence[Operation], found: Labels) -> set[str]:
    """Open operations that nothing in a box comes after, and that do not combine two boxes' values."""
    readers = _readers(operations)
    outside = {name for op in graph.operations for name in op.inputs} - {
        name for op in operations for name in op.inputs
    }
    trailing: set[str] = set()
    for op in reversed(operations):
        if op.name in found or op.name in outside or not (op.inputs or op.name in graph.outputs):
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


# Boxes by module structure.


@dataclass
class _Module:
    """A module (in one of its calls): its own operations, the modules inside, and its number of weights."""

    path: str
    operations: list[Operation]
    own: int = 0
    weights: int = 0
    children: dict[str, _Module] | None = None


def module_boxes(graph: LocalGraph, operations: Sequence[Operation], root: str = "") -> Labels:
    """Boxes along the modules below `root`: repeated blocks whole, plain containers layer by layer.

    A module is split into its parts if it is the root, holds a stack (two or more consecutive numbered parts
    with two or more weights each, such as `layer1.0, layer1.1`), is a plain container that is not itself part
    of a stack, or holds more than half of all weights. What is not split is one box.
    """
    tree = _module_tree(graph, operations, root)
    boxes: dict[str, list[Operation]] = {}
    _split(tree, tree.weights, False, graph, boxes, force=True)
    found = {op.name: path for path, members in boxes.items() for op in members}
    return _merge_normalizations(graph, operations, found)


def _module_tree(graph: LocalGraph, operations: Sequence[Operation], root: str) -> _Module:
    top = _Module(root, [], children={})
    depth = root.count(".") + 1 if root else 0
    for op in operations:
        node = top
        prefixes = module_prefixes(op)
        inside = prefixes[depth:] if not root or root in prefixes else []
        for path in inside:
            assert node.children is not None
            node.operations.append(op)
            node.weights += has_weights(graph, op)
            node = node.children.setdefault(path, _Module(path, [], children={}))
        node.operations.append(op)
        node.weights += has_weights(graph, op)
        node.own += bool(node.children is not None)
    return top


def _split(module: _Module, total: int, in_stack: bool, graph: LocalGraph,
           boxes: dict[str, list[Operation]], force: bool = False) -> None:  # fmt: skip
    assert module.children is not None
    holds = _holds_stack(module, graph)
    plain = module.own == 0 and not in_stack and module.weights > 1
    large = not in_stack and module.weights > 1 and 2 * module.weights > total
    if not module.children or not (force or holds or plain or large):
        boxes[module.path] = module.operations
        return
    stacked = {child.path for child in _stack(module, graph)}
    for child in module.children.values():
        _split(child, total, in_stack or child.path in stacked, graph, boxes)


def _holds_stack(module: _Module, graph: LocalGraph) -> bool:
    assert module.children is not None
    return bool(_stack(module, graph)) or any(_holds_stack(child, graph) for child in module.children.values())


def _stack(module: _Module, graph: LocalGraph) -> list[_Module]:
    """The numbered parts with two or more weights each that run one after the other."""
    assert module.children is not None
    families: dict[str, list[_Module]] = {}
    for child in module.children.values():
        name = child.path.rpartition(".")[2].partition("@")[0]
        stem = re.fullmatch(r"(.*?)\d+", name)
        repeated = "@" in child.path.rpartition(".")[2]
        if child.weights > 1 and (stem or repeated):
            families.setdefault(stem[1] if stem else name, []).append(child)
    for family in families.values():
        if len(family) > 1 and _runs_before(family[0], family[1], graph):
            return family
    return []


def _runs_before(first: _Module, second: _Module, graph: LocalGraph) -> bool:
    """True if the second module depends on the first: they are in sequence, not side by side."""
    after = nx.descendants(graph.operation_dag, next(op.name for op in first.operations if has_weights(graph, op)))
    return any(op.name in after for op in second.operations)


def _merge_normalizations(graph: LocalGraph, operations: Sequence[Operation], found: Labels) -> Labels:
    """A normalization without weights goes with the layer before it, or else with what reads it."""
    members: dict[str, list[Operation]] = {}
    for op in operations:
        if op.name in found:
            members.setdefault(found[op.name], []).append(op)
    readers = _readers(operations)
    merged = dict(found)
    for box, inside in members.items():
        parametric = [op for op in inside if is_parametric(graph, op)]
        if any(has_weights(graph, op) for op in parametric):
            continue
        sources = {merged.get(s) for op in inside for s in op.inputs} - {box}
        source = sources.pop() if len(sources) == 1 else None
        single = source is not None and sum(has_weights(graph, op) for op in members.get(source, ())) == 1
        target = source if parametric and single else None
        if target is None and parametric:
            targets = _next_boxes(inside[-1].name, readers, merged, box)
            target = targets.pop() if len(targets) == 1 else None
        for op in inside:
            if target is not None:
                merged[op.name] = target
                members.setdefault(target, []).append(op)
            elif not parametric:
                del merged[op.name]  # an activation or pooling module: `complete` places it
    return merged


def _next_boxes(name: str, readers: dict[str, list[str]], found: Labels, box: str) -> set[str]:
    """The boxes that read a value, looking through operations that are in no box yet."""
    pending, boxes, seen = [name], set(), set()
    while pending:
        for reader in readers.get(pending.pop(), ()):
            if reader in seen:
                continue
            seen.add(reader)
            if reader in found and found[reader] != box:
                boxes.add(found[reader])
            else:
                pending.append(reader)
    return boxes


# Boxes by glob and by number.


def _globs(graph: LocalGraph, patterns: Sequence[str]) -> Labels:
    """One box for each outermost module that a glob matches; the rest by module structure."""
    modules = list(dict.fromkeys(path for op in graph.operations for path in module_prefixes(op)))
    for pattern in patterns:
        if not fnmatch.filter(modules, pattern):
            raise PartitionError(
                f"the glob {pattern!r} matches no module of {graph.name}: {nearest(pattern, modules)}",
                remedy="globs are matched with module paths such as 'layer1.0'; print(local.graph) shows them",
            )
    found: Labels = {}
    for op in graph.operations:
        match = next((m for m in module_prefixes(op) if any(fnmatch.fnmatch(m, p) for p in patterns)), None)
        if match is not None:
            found[op.name] = match
    rest = [op for op in graph.operations if op.name not in found]
    return {**module_boxes(graph, rest), **found}


def _segments(graph: LocalGraph, count: int) -> Labels:
    """`count` segments of consecutive boxes with about equal cost, cut where few tensors cross."""
    leaves = complete(graph, graph.operations, {})
    order: dict[str, list[Operation]] = {}
    for op in graph.operations:
        order.setdefault(leaves[op.name], []).append(op)
    chain = _topological(graph, leaves, order)
    parametric = [box for box in chain if any(is_parametric(graph, op) for op in order[box])]
    if not 1 <= count <= len(parametric):
        raise PartitionError(
            f"{count} segments are wanted, but {graph.name} has {len(parametric)} operations with parameters",
            remedy=f"pass a number from 1 to {len(parametric)}",
        )
    cuts = _balanced_cuts(graph, chain, order, leaves, set(parametric), count)
    found: Labels = {}
    segment = 1
    for i, box in enumerate(chain):
        segment += i in cuts
        found.update((op.name, f"segment{segment}") for op in order[box])
    return found


def _topological(graph: LocalGraph, leaves: Labels, order: dict[str, list[Operation]]) -> list[str]:
    """Boxes in topological order, those of one cycle side by side."""
    dag = nx.DiGraph()
    dag.add_nodes_from(order)
    dag.add_edges_from({(leaves[a], leaves[b]) for a, b in graph.operation_dag.edges if leaves[a] != leaves[b]})
    rank = {box: i for i, box in enumerate(order)}
    condensed = nx.condensation(dag)
    first = {c: min(rank[box] for box in data["members"]) for c, data in condensed.nodes(data=True)}
    sequence = nx.lexicographical_topological_sort(condensed, key=first.__getitem__)
    return [box for c in sequence for box in sorted(condensed.nodes[c]["members"], key=rank.__getitem__)]


def _balanced_cuts(graph: LocalGraph, chain: list[str], order: dict[str, list[Operation]], leaves: Labels,
                   parametric: set[str], count: int) -> set[int]:  # fmt: skip
    """Positions in the chain before which to cut: near equal cost, then where the fewest values cross."""
    costs = [1 + sum(op.flops for op in order[box]) for box in chain]
    rank = {box: i for i, box in enumerate(chain)}
    last_read = {
        source: max(rank[leaves[reader]] for reader in readers)
        for source, readers in _readers(graph.operations).items()
        if source in leaves
    }
    crossing = [0] * (len(chain) + 1)
    for source, last in last_read.items():
        for i in range(rank[leaves[source]] + 1, last + 1):
            crossing[i] += 1
    total, done = sum(costs), [sum(costs[:i]) for i in range(len(chain))]
    candidates = [i for i, box in enumerate(chain) if i > 0 and box in parametric]
    first = next(i for i, box in enumerate(chain) if box in parametric)
    candidates = [i for i in candidates if i > first]
    cuts: list[int] = []
    for k in range(1, count):
        left = candidates[len(cuts) :] if not cuts else [i for i in candidates if i > cuts[-1]]
        left = left[: len(left) - (count - 1 - k)] or left
        goal = k * total / count
        window = total / count / 4
        near = [i for i in left if abs(done[i] - goal) <= window] or [min(left, key=lambda i: abs(done[i] - goal))]
        cuts.append(min(near, key=lambda i: (crossing[i], abs(done[i] - goal))))
    return set(cuts)
