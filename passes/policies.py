"""Partition policies: which operations a person would draw as one box."""

from __future__ import annotations

import bisect
import fnmatch
import itertools
import re
from collections.abc import Callable, Sequence

import networkx as nx

from graphlocal.errors import InputError, PartitionError, nearest
from graphlocal.ir import LocalGraph, Operation
from graphlocal.passes.articulation import merge_between_articulations
from graphlocal.passes.boxes import Labels, complete, is_parametric, module_prefixes, readers_of
from graphlocal.passes.module_boxes import has_stack, module_boxes
from graphlocal.passes.order import boxes_in_order
from graphlocal.rules.base import normalizes

Policy = str | int | Sequence[str] | Callable[[Operation], str | None]

POLICIES = ("auto", "blocks", "leaf")
WITH_HEADS = re.compile(r"(\d+|\d+(?::\d+)+)\+head")
_REMEDY = 'use "auto", "blocks", "leaf", a number of segments, "3:1+head", globs of module paths, or a callable'


def labels(graph: LocalGraph, policy: Policy) -> Labels:
    """Label every operation by a policy; boxes may still form cycles.

    Raises InputError for an unknown policy and PartitionError for a glob without a match.
    """
    operations = graph.operations
    if policy in ("auto", "blocks"):
        boxes = complete(graph, operations, module_boxes(graph, operations), light=False)
        return boxes if has_stack(graph) else merge_between_articulations(graph, boxes)
    if policy == "leaf":
        return complete(graph, operations, {})
    if isinstance(policy, str) and (segments := WITH_HEADS.fullmatch(policy)):
        shares = [int(share) for share in segments[1].split(":")]
        return _segments_and_heads(graph, shares if len(shares) > 1 else [1] * shares[0])
    if isinstance(policy, str):
        raise InputError(f"unknown partition {policy!r}: {nearest(policy, POLICIES)}", remedy=_REMEDY)
    if isinstance(policy, int) and not isinstance(policy, bool):
        return _segments(graph, policy)
    if callable(policy):
        chosen = {op.name: policy(op) for op in operations}
        for op, box in chosen.items():
            if not (box is None or isinstance(box, str)):
                message = f"partition gives operation {op!r} the box {box!r}, a {type(box).__name__}"
                raise InputError(message, remedy="return the name of a box, or None to leave the operation open")
        return complete(graph, operations, {name: box for name, box in chosen.items() if box is not None})
    if not isinstance(policy, Sequence) or not policy or not all(isinstance(glob, str) for glob in policy):
        raise InputError(f"partition is {policy!r}", remedy=_REMEDY)
    return complete(graph, operations, _globs(graph, policy))


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


_SLACK = 0.25
"""How much costlier than in the best balance the costliest of several segments may be, to cut fewer values."""


def _segments(graph: LocalGraph, count: int) -> Labels:
    """`count` segments of consecutive boxes with about equal cost, cut where few tensors cross."""
    leaves = complete(graph, graph.operations, {})
    order: dict[str, list[Operation]] = {}
    for op in graph.operations:
        order.setdefault(leaves[op.name], []).append(op)
    chain = boxes_in_order(graph, leaves)
    parametric = _parametric(graph, leaves, chain)
    if not 1 <= count <= len(parametric):
        raise PartitionError(
            f"{count} segments are wanted, but {graph.name} has {len(parametric)} operations with parameters",
            remedy=f"pass a number from 1 to {len(parametric)}",
        )
    return _cut(graph, chain, order, leaves, set(parametric), [1] * count)


def _parametric(graph: LocalGraph, boxes: Labels, chain: list[str]) -> list[str]:
    found = {boxes[op.name] for op in graph.operations if is_parametric(graph, op)}
    return [box for box in chain if box in found]


def _segments_and_heads(graph: LocalGraph, shares: Sequence[int]) -> Labels:
    """Segments with costs in proportion to `shares`, and each of the model's last layers as a box of its own.

    A last layer has no parameters of another one after it, or is the normalization that such a layer reads. A small
    model has fewer segments, those of the last shares.
    """
    if not shares or min(shares) < 1:
        raise PartitionError(f"segments of shares {list(shares)} are wanted", remedy='pass "2+head", or "3:1+head"')
    layers = complete(graph, graph.operations, {}, light=False)
    order: dict[str, list[Operation]] = {}
    for op in graph.operations:
        order.setdefault(layers[op.name], []).append(op)
    chain = boxes_in_order(graph, layers)
    parametric = _parametric(graph, layers, chain)
    dag = nx.DiGraph((layers[a], layers[b]) for a, b in graph.operation_dag.edges)
    dag.add_nodes_from(chain)
    followers = {box: nx.descendants(dag, box) - {box} for box in parametric}
    heads = {box for box in parametric if followers[box].isdisjoint(parametric)}
    apart = heads.union(*(followers[box] for box in heads))
    apart |= {box for box in parametric if followers[box] <= apart and _is_normalization(graph, order[box])}
    below = [box for box in parametric if box not in apart]
    found = {op.name: layers[op.name] for op in graph.operations if layers[op.name] in apart}
    if below:
        chain = [box for box in chain if box not in apart]
        found |= _cut(graph, chain, order, layers, set(below), shares[-len(below) :])
    return found if below else layers


def _is_normalization(graph: LocalGraph, box: list[Operation]) -> bool:
    """Whether a box reads one value, normalizes it, and does nothing more but what is elementwise."""
    inside = [op for op in box if op.type is None or op.type.is_float]
    made = {op.name for op in box} | {op.name for op in graph.sizes}
    read = {value for op in inside for value in op.inputs} - made
    return len(read) == 1 and any(map(normalizes, inside)) and all(normalizes(op) or op.pointwise for op in inside)


def _cut(graph: LocalGraph, chain: list[str], order: dict[str, list[Operation]], leaves: Labels,
         parametric: set[str], shares: Sequence[int]) -> Labels:  # fmt: skip
    """The boxes of a chain as segments with costs in proportion to `shares`."""
    cuts = _balanced_cuts(graph, chain, order, leaves, parametric, shares)
    found: Labels = {}
    segment = 1
    for i, box in enumerate(chain):
        segment += i in cuts
        found.update((op.name, f"segment{segment}") for op in order[box])
    return found


def _balanced_cuts(graph: LocalGraph, chain: list[str], order: dict[str, list[Operation]], leaves: Labels,
                   parametric: set[str], shares: Sequence[int]) -> set[int]:  # fmt: skip
    """Positions in the chain before which to cut: near the best balance, then where the fewest values cross."""
    costs = [1 + sum(op.flops for op in order[box]) for box in chain]
    rank = {box: i for i, box in enumerate(chain)}
    last_read = {
        source: max(rank.get(leaves[reader], len(chain)) for reader in readers)
        for source, readers in readers_of(graph.operations).items()
        if leaves.get(source) in rank
    }
    crossing = [0] * (len(chain) + 1)
    for source, last in last_read.items():
        for i in range(rank[leaves[source]] + 1, last + 1):
            crossing[i] += 1
    done = [0, *itertools.accumulate(costs)]
    first = next(i for i, box in enumerate(chain) if box in parametric)
    allowed = [i for i, box in enumerate(chain) if i > first and box in parametric]
    limit = (1 + _SLACK) * _least_maximum(done, allowed, shares)
    return _fewest_crossings(done, allowed, crossing, shares, limit)


def _least_maximum(done: list[int], allowed: list[int], shares: Sequence[int]) -> float:
    """The largest cost of a segment for each unit of its share, in the best cut of a chain; done: cumulated costs."""
    if len(set(shares)) == 1:
        return _least_equal(done, allowed, len(shares)) / shares[0]
    ways: dict[int, float] = {0: 0}
    for k, share in enumerate(shares, 1):
        ends = allowed if k < len(shares) else [len(done) - 1]
        ways = {
            end: min(max(worst, (done[end] - done[start]) / share) for start, worst in ways.items() if start < end)
            for end in ends
            if end > min(ways)
        }
    return min(ways.values())


def _least_equal(done: list[int], allowed: list[int], count: int) -> int:
    """The cost of the costliest of `count` segments in the best cut."""
    ends = [*allowed, len(done) - 1]

    def possible(limit: int) -> bool:
        segments, start, previous = 1, 0, 0
        for end in ends:
            if done[end] - done[start] > limit:
                if previous == start:
                    return False
                segments, start = segments + 1, previous
                if done[end] - done[start] > limit:
                    return False
            previous = end
        return segments <= count

    return bisect.bisect_left(range(done[-1]), True, key=possible)


def _fewest_crossings(
    done: list[int], allowed: list[int], crossing: list[int], shares: Sequence[int], limit: float
) -> set[int]:
    """The cuts that the fewest values cross, then the most equal ones, with no segment's cost above limit * share."""
    ways: dict[int, tuple[int, float, tuple[int, ...]]] = {0: (0, 0, ())}
    for k, share in enumerate(shares, 1):
        found = {}
        starts = sorted(ways)
        for end in allowed if k < len(shares) else [len(done) - 1]:
            options = []
            for start in reversed(starts[: bisect.bisect_left(starts, end)]):
                cost = done[end] - done[start]
                if cost > limit * share:
                    break
                crossed, spread, cuts = ways[start]
                options.append((crossed + crossing[end], spread + cost**2 / share, (*cuts, end)))
            if options:
                found[end] = min(options)
        ways = found
    (_, _, cuts), *_ = ways.values()
    return set(cuts[:-1])
