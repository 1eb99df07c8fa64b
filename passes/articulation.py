"""Blocks without names: merge the layers between which more than one value crosses.

In `x -> conv1 -> conv2 (+ x)` two values cross between conv1 and conv2, so they are one residual block; where a
single value crosses, the model can be cut. This finds residual and attention blocks in models that are written
as one flat forward.
"""

from __future__ import annotations

from graphlocal.ir import LocalGraph, Operation
from graphlocal.passes.boxes import PRELUDE, TAIL, Labels, has_weights, readers_of
from graphlocal.passes.order import boxes_in_order


def merge_between_articulations(graph: LocalGraph, boxes: Labels) -> Labels:
    """Merge consecutive boxes that are not separated by a single crossing value.

    A run that would hold more than half of the model's weights stays as it is: a U-Net's long connections do
    not make it one block.
    """
    chain = boxes_in_order(graph, boxes)
    members: dict[str, list[Operation]] = {}
    for op in graph.operations:
        members.setdefault(boxes[op.name], []).append(op)
    crossing = _crossing_values(graph, boxes, chain)
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


def _crossing_values(graph: LocalGraph, boxes: Labels, chain: list[str]) -> list[int]:
    """How many values of learning boxes are read on both sides of each place in the chain."""
    rank = {box: i for i, box in enumerate(chain)}
    crossing = [0] * (len(chain) + 1)
    for source, readers in readers_of(graph.operations).items():
        if source in boxes and boxes[source] != PRELUDE:
            for i in range(rank[boxes[source]] + 1, max(rank[boxes[reader]] for reader in readers) + 1):
                crossing[i] += 1
    return crossing
