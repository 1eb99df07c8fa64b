"""Blocks without names: merge the layers between which more than one box's values cross.

In `x -> conv1 -> conv2 (+ x)` two boxes' values cross between conv1 and conv2, so they are one residual block; where
those of a single box cross, the model can be cut. This finds residual and attention blocks in models that are written
as one flat forward.
"""

from __future__ import annotations

from itertools import accumulate

from graphlocal.ir import LocalGraph, Operation
from graphlocal.passes.boxes import PRELUDE, TAIL, Labels, has_weights, readers_of
from graphlocal.passes.order import boxes_in_order


def merge_between_articulations(graph: LocalGraph, boxes: Labels) -> Labels:
    """Merge consecutive boxes that are not separated by a single crossing box.

    A run that would hold more than half of the model's weights stays as it is: a U-Net's long connections do
    not make it one block.
    """
    chain = boxes_in_order(graph, boxes)
    members: dict[str, list[Operation]] = {}
    for op in graph.operations:
        members.setdefault(boxes[op.name], []).append(op)
    crossing = _crossing_boxes(graph, boxes, chain)
    weights = {box: sum(has_weights(graph, op) for op in members[box]) for box in chain}
    merged = dict(boxes)
    run: list[str] = []
    for i, box in enumerate(chain):
        if box in (PRELUDE, TAIL):
            continue
        run.append(box)
        if i + 1 == len(chain) or crossing[i + 1] <= 1:
            if len(run) > 1 and 2 * sum(weights[b] for b in run) <= sum(weights.values()):
                first = next((b for b in run if weights[b]), run[0])
                merged.update((op.name, first) for b in run for op in members[b])
            run = []
    return merged


def _crossing_boxes(graph: LocalGraph, boxes: Labels, chain: list[str]) -> list[int]:
    """How many learning boxes before each place in the chain are read after it.

    Those are counted together that come from one box, and only before boxes that come from it too: the two towers of
    a siamese net are no block.
    """
    rank = {box: i for i, box in enumerate(chain)}
    roots = _roots(graph, boxes, chain)
    last = dict(rank)
    for source, readers in readers_of(graph.operations).items():
        if source in boxes:
            box = boxes[source]
            last[box] = max(last[box], *(rank[boxes[reader]] for reader in readers))
    changes: dict[str, list[int]] = {}  # by root: how the number of crossing boxes changes at each place
    for box in chain:
        for root in roots[box]:
            change = changes.setdefault(root, [0] * (len(chain) + 2))
            change[rank[box] + 1] += 1
            change[last[box] + 1] -= 1
    counts = {root: list(accumulate(change)) for root, change in changes.items()}
    return [max((counts[root][i] for root in roots[box]), default=0) for i, box in enumerate(chain)]


def _roots(graph: LocalGraph, boxes: Labels, chain: list[str]) -> dict[str, frozenset[str]]:
    """The boxes that each box depends on and that depend on none themselves."""
    sources: dict[str, set[str]] = {box: set() for box in chain}
    for op in graph.operations:
        sources[boxes[op.name]].update(boxes[source] for source in op.inputs if source in boxes)
    roots: dict[str, frozenset[str]] = {PRELUDE: frozenset()}
    for box in chain:
        before = frozenset[str]().union(*(roots.get(source, frozenset()) for source in sources[box] - {box}))
        roots[box] = before or frozenset({box} - {PRELUDE})
    return roots
