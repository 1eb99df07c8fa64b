"""Partition policies: which operations a person would draw as one box."""

from __future__ import annotations

import bisect
import fnmatch
import itertools
from collections.abc import Callable, Sequence

from graphlocal.errors import InputError, PartitionError, nearest
from graphlocal.ir import LocalGraph, Operation
from graphlocal.passes.articulation import merge_between_articulations
from graphlocal.passes.boxes import Labels, complete, is_parametric, module_prefixes, readers_of
from graphlocal.passes.module_boxes import has_stack, module_boxes
from graphlocal.passes.order import boxes_in_order

Policy = str | int | Sequence[str] | Callable[[Operation], str | None]

POLICIES = ("auto", "leaf")
_REMEDY = 'use "auto", "leaf", a number of segments, a list of globs of module paths, or a callable'


def labels(graph: LocalGraph, policy: Policy) -> Labels:
    """Label every operation by a policy; boxes may still form cycles.

    Raises InputError for an unknown policy and PartitionError for a glob without a match.
    """
    operations = graph.operations
    if policy == "auto":
        boxes = complete(graph, operations, module_boxes(graph, operations), light=False)
        return boxes if has_stack(graph) else merge_between_articulations(graph, boxes)
    if policy == "leaf":
        return complete(graph, operations, {})
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


def _balanced_cuts(graph: LocalGraph, chain: list[str], order: dict[str, list[Operation]], leaves: Labels,
                   parametric: set[str], count: int) -> set[int]:  # fmt: skip
    """Positions in the chain before which to cut: near the best balance, then where the fewest values cross."""
    costs = [1 + sum(op.flops for op in order[box]) for box in chain]
    rank = {box: i for i, box in enumerate(chain)}
    last_read = {
        source: max(rank[leaves[reader]] for reader in readers)
        for source, readers in readers_of(graph.operations).items()
        if source in leaves
    }
    crossing = [0] * (len(chain) + 1)
    for source, last in last_read.items():
        for i in range(rank[leaves[source]] + 1, last + 1):
            crossing[i] += 1
    done = [0, *itertools.accumulate(costs)]
    first = next(i for i, box in enumerate(chain) if box in parametric)
    allowed = [i for i, box in enumerate(chain) if i > first and box in parametric]
    limit = (1 + _SLACK) * _least_maximum(done, allowed, count)
    return _fewest_crossings(done, allowed, crossing, count, limit)


def _least_maximum(done: list[int], allowed: list[int], count: int) -> int:
    """The cost of the costliest segment in the best cut of a chain into `count`; done: cumulated costs."""
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


def _fewest_crossings(done: list[int], allowed: list[int], crossing: list[int], count: int, limit: float) -> set[int]:
    """The cuts that the fewest values cross, then the most equal ones, with no segment's cost above the limit."""
    ways: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for k in range(1, count + 1):
        found = {}
        starts = sorted(ways)
        for end in allowed if k < count else [len(done) - 1]:
            options = []
            for start in reversed(starts[: bisect.bisect_left(starts, end)]):
                cost = done[end] - done[start]
                if cost > limit:
                    break
                crossed, spread, cuts = ways[start]
                options.append((crossed + crossing[end], spread + cost**2, (*cuts, end)))
            if options:
                found[end] = min(options)
        ways = found
    (_, _, cuts), *_ = ways.values()
    return set(cuts[:-1])
