"""Partition: divide the operations into subgraphs, the leaves of a tree of regions.

The pass, step by step:

1. a policy labels the operations with boxes (`graphlocal.passes.policies`, `boxes`);
2. boxes on a cycle become one box (an error instead, where the user drew them);
3. with `depth` above 1, every box is split again inside, level by level, down to single parametric operations;
4. each innermost box becomes a `Subgraph`, with its inputs, outputs, states, and pre-activations.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count

import networkx as nx

from graphlocal.errors import PartitionError
from graphlocal.ir import LABELS, OUTPUT, LocalGraph, Operation, Representation, Subgraph
from graphlocal.passes.boxes import PRELUDE, TAIL, Labels, complete, is_parametric
from graphlocal.passes.module_boxes import module_boxes
from graphlocal.passes.policies import Policy, labels

FULL = 64
"""A recursion depth that no model exceeds."""


@dataclass(frozen=True)
class Partition:
    """Divide the model into subgraphs.

    policy: "auto" (what `preferred` says, else blocks), "blocks" (repeated blocks, else layers), "leaf" (one
    parametric operation each), an int (that many segments of about equal cost), "2+head" or "3:1+head" (segments of
    equal cost or of these proportions, and the last layers by themselves), globs of module paths, or a callable
    `Operation -> box name or None`.
    depth: levels of the partition tree; 1 keeps the policy's boxes whole. preferred: what "auto" stands for.
    """

    policy: Policy = "auto"
    depth: int = 1
    preferred: Callable[[LocalGraph], str | int] | None = None
    name: str = "partition"

    def apply(self, graph: LocalGraph) -> LocalGraph:
        """Raises PartitionError if the policy's boxes are not convex or a glob matches nothing."""
        policy = self.preferred(graph) if self.policy == "auto" and self.preferred else self.policy
        strict = not isinstance(policy, (str, int))
        boxes = _without_cycles(graph, graph.operations, labels(graph, policy), strict)
        paths = _refine(graph, graph.operations, boxes, (), self.depth - 1 if policy != "leaf" else 0)
        return replace(graph, subgraphs=_subgraphs(graph, paths))


def _refine(
    graph: LocalGraph, operations: Sequence[Operation], boxes: Labels, regions: tuple[str, ...], depth: int
) -> dict[str, tuple[str, ...]]:
    """The path of regions and box of every operation, after splitting each box `depth` times."""
    paths: dict[str, tuple[str, ...]] = {}
    members: dict[str, list[Operation]] = {}
    for op in operations:
        members.setdefault(boxes[op.name], []).append(op)
    for box, inside in members.items():
        parts = _parts(graph, box, inside) if depth > 0 and box not in (PRELUDE, TAIL) else {}
        if len(set(parts.values())) > 1:
            paths.update(_refine(graph, inside, parts, (*regions, box), depth - 1))
        else:
            paths.update((op.name, (*regions, box)) for op in inside)
    return paths


def _parts(graph: LocalGraph, box: str, inside: list[Operation]) -> Labels:
    """A box's parts: along its module's structure if that divides it, else one parametric operation each."""
    if sum(is_parametric(graph, op) for op in inside) < 2:
        return {}
    for given in (module_boxes(graph, inside, root=box), {}):
        parts = complete(graph, inside, given)
        first = next(parts[op.name] for op in inside if is_parametric(graph, op))
        # inside a box there is no prelude and no tail: what serves all its parts goes with the first
        names = {
            PRELUDE: first,
            TAIL: next(parts[op.name] for op in reversed(inside) if is_parametric(graph, op)),
        }
        parts = {name: names.get(part, part) for name, part in parts.items()}
        parts = _without_cycles(graph, inside, parts, strict=False)
        if len(set(parts.values())) > 1:
            return parts
    return {}


def _without_cycles(graph: LocalGraph, operations: Sequence[Operation], boxes: Labels, strict: bool) -> Labels:
    """Merge the boxes of every cycle, or refuse the cycle if the user drew the boxes."""
    dag = nx.DiGraph()
    dag.add_nodes_from(dict.fromkeys(boxes[op.name] for op in operations))
    inside = graph.operation_dag.subgraph([op.name for op in operations])
    cause: dict[tuple[str, str], tuple[str, str]] = {}
    for a, b in inside.edges:
        if boxes[a] != boxes[b]:
            cause.setdefault((boxes[a], boxes[b]), (a, b))
    dag.add_edges_from(cause)
    weights = {op.name for op in operations if is_parametric(graph, op)}
    merged: dict[str, str] = {}
    for component in nx.strongly_connected_components(dag):
        if len(component) == 1:
            continue
        if strict:
            raise _not_convex(graph, nx.find_cycle(dag.subgraph(component)), cause)
        ordered = sorted(component, key=list(dag).index)
        holding = [box for box in ordered if any(boxes[name] == box for name in weights)]
        chosen = next((box for box in holding if box not in (PRELUDE, TAIL)), ordered[0])
        merged.update(dict.fromkeys(component, chosen))
    return {name: merged.get(box, box) for name, box in boxes.items()}


def _not_convex(
    graph: LocalGraph, cycle: list[tuple[str, str]], cause: dict[tuple[str, str], tuple[str, str]]
) -> PartitionError:
    lines = []
    for a, b in cycle:
        source, reader = cause[a, b]
        place = graph.operation[reader].source
        lines.append(f"{a} -> {b}  ({reader} needs {source}{f', {place}' if place else ''})")
    return PartitionError(
        f"the cut is not convex: values leave {cycle[0][0]} and come back to it",
        why="\n    ".join(lines),
        remedy="put the boxes of this cycle into one, or let go of the operations between them",
    )


def _subgraphs(graph: LocalGraph, paths: dict[str, tuple[str, ...]]) -> tuple[Subgraph, ...]:
    """Subgraphs in topological order, ties in program order."""
    members: dict[tuple[str, ...], list[Operation]] = {}
    for op in graph.operations:
        members.setdefault(paths[op.name], []).append(op)
    names = _unique_names(graph, members)
    owner = {op.name: path for path, inside in members.items() for op in inside}
    dag = nx.DiGraph()
    dag.add_nodes_from(members)
    dag.add_edges_from((owner[a], owner[b]) for a, b in graph.operation_dag.edges if owner[a] != owner[b])
    rank = {path: i for i, path in enumerate(members)}
    order = nx.lexicographical_topological_sort(dag, key=rank.__getitem__)
    readers: dict[str, set[tuple[str, ...]]] = {}
    for op in graph.operations:
        for source in op.inputs:
            readers.setdefault(source, set()).add(owner[op.name])
    return tuple(_subgraph(graph, names[path], path, members[path], readers) for path in order)


def _unique_names(graph: LocalGraph, members: dict[tuple[str, ...], list[Operation]]) -> dict[tuple[str, ...], str]:
    """The box's own name; `box:operation` where a region has that name already, or a source of the error graph."""
    names: dict[tuple[str, ...], str] = {}
    taken: set[str] = {OUTPUT, LABELS, *(box for path in members for box in path[:-1])}
    for path, inside in members.items():
        main = next((op for op in inside if is_parametric(graph, op)), inside[0])
        numbered = (f"{path[-1]}#{i}" for i in count(2))
        candidates = chain((path[-1], f"{path[-1]}:{main.name}"), numbered)
        names[path] = next(name for name in candidates if name not in taken)
        taken.add(names[path])
    return names


def _subgraph(graph: LocalGraph, name: str, path: tuple[str, ...], inside: list[Operation],
              readers: dict[str, set[tuple[str, ...]]]) -> Subgraph:  # fmt: skip
    own = {op.name for op in inside}
    sizes = {op.name for op in graph.sizes}
    outputs = [
        op for op in inside if op.name in graph.outputs or any(reader != path for reader in readers.get(op.name, ()))
    ]
    return Subgraph(
        name=name,
        operations=tuple(op.name for op in inside),
        inputs=tuple(dict.fromkeys(s for op in inside for s in op.inputs if s not in own and s not in sizes)),
        states=tuple(dict.fromkeys(s for op in inside for s in op.states)),
        outputs=tuple(_representation(graph, op, own) for op in outputs),
        regions=path[:-1],
    )


def _representation(graph: LocalGraph, output: Operation, own: set[str]) -> Representation:
    """Walk back over discrete units and the elementwise tail before them, which must stay inside the subgraph."""
    op, smooth = output, ""
    while True:
        if op.discrete_of in own:
            op = graph.operation[op.discrete_of]
            smooth = op.name
        elif op.pointwise and op.inputs[0] in own and not _written_later(graph, op):
            op = graph.operation[op.inputs[0]]
        else:
            return Representation(output.name, op.name, _feature_axis(graph, output), smooth)


_IN_PLACE = re.compile(r"aten\.\w+_\.")


def _written_later(graph: LocalGraph, op: Operation) -> bool:
    """Whether an in-place operation may change the result, which is then no function of the operation's input."""
    if not op.group:
        return False
    after = graph.operations[graph.operations.index(op) + 1 :]
    return any(other.group == op.group and _IN_PLACE.match(other.target) for other in after)


_FEATURES_SECOND = ("conv", "batch_norm", "group_norm", "instance_norm", "_pool")
_FEATURES_LAST = ("linear", "layer_norm", "rms_norm", "embedding", "lstm", "gru", "rnn", "addmm", "einsum")


def _feature_axis(graph: LocalGraph, op: Operation) -> int:
    """The axis of features, from the nearest operation before whose layout is known.

    A value of fewer than two axes has an implied feature axis of size 1 after its last.
    """
    if op.type is None or len(op.type.shape) < 2:
        return 0 if op.type is None else len(op.type.shape)
    axes = len(op.type.shape)
    pending, seen = deque([op]), {op.name}
    while pending and axes > 2:
        current = pending.popleft()
        if any(part in current.target for part in _FEATURES_SECOND):
            return 1
        if any(part in current.target for part in _FEATURES_LAST):
            return axes - 1
        for source in current.inputs:
            known = graph.operation.get(source)
            if known and source not in seen and known.type and known.type.shape == op.type.shape:
                seen.add(source)
                pending.append(known)
    return 1 if axes in (2, 4, 5) else axes - 1
