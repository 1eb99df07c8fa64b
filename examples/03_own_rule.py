"""A learning rule of your own: direct feedback alignment, from the output's error to every subgraph."""

from dataclasses import dataclass

import torch
from torch import nn

import graphlocal
from graphlocal.data import batches, load
from graphlocal.rules import Rule, feedback_connection, loss_connections


@dataclass(frozen=True)
class DirectFeedback(Rule):
    """d = E e_L with a fixed random E; the target is z - d, so the error is d itself, times phi'."""

    name = "my-dfa"
    feeds = "representation"  # the update starts at z and goes through phi'

    def connect(self, graph):
        exact = loss_connections(graph)
        (output,) = exact  # one output, one loss
        others = [n for n in graph.error_neurons if n.subgraph != output.target]
        return *exact, *(
            feedback_connection(graph, output.target, output.value, n.subgraph, value, depth=1)
            for n in others for value in n.values
        )  # fmt: skip


torch.manual_seed(0)
data = load("digits")
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
local = graphlocal.compile(model, example_inputs=(data.train_x[:8],), rule=DirectFeedback())
step = graphlocal.train_step(local, nn.functional.cross_entropy, torch.optim.Adam(local.parameters(), 1e-3))
for _ in range(10):
    for x, y in batches(data.train_x, data.train_y, 32, torch.Generator()):
        step(x, y)
print(local.graph)
print(f"test accuracy {100 * (local.eval()(data.test_x).argmax(1) == data.test_y).float().mean():.1f} %")
