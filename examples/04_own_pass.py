"""A pass of your own: put the updates on parallel streams, and see the difference that it makes."""

from dataclasses import dataclass, replace

import torch

import graphlocal
from graphlocal.demo import SmallResNet
from graphlocal.ir import LocalGraph
from graphlocal.passes.schedule import Schedule
from graphlocal.pipeline import run


@dataclass(frozen=True)
class Interleave:
    """Run the forward pass and the updates on as many streams as there are subgraphs."""

    name: str = "interleave"

    def apply(self, graph: LocalGraph) -> LocalGraph:
        return Schedule(streams=len(graph.subgraphs)).apply(replace(graph, schedule=()))


local = graphlocal.compile(SmallResNet(), example_inputs=(torch.randn(4, 1, 8, 8),))
graph, records = run(local.graph, [Interleave()])  # verified before and after
print(records[0])
print(graph)
