"""A residual net, recursively: blocks learn from the output's error, layers from their block's error."""

import torch
from torch import nn

import graphlocal
from graphlocal.data import batches, load
from graphlocal.demo import SmallResNet
from graphlocal.rules import RecLRA

torch.manual_seed(0)
data = load("digits")
model = SmallResNet()
local = graphlocal.compile(model, example_inputs=(data.train_x[:8],), rule=RecLRA(depth=2))
print(local.graph)

# The fused step updates each subgraph as soon as its error is known and frees its memory.
step = graphlocal.train_step(local, nn.functional.cross_entropy, torch.optim.Adam(local.parameters(), 1e-3))
generator = torch.Generator().manual_seed(0)
for epoch in range(5):
    local.train()
    for x, y in batches(data.train_x, data.train_y, 32, generator):
        loss = step(x, y)
    # running statistics lag behind fast local updates
    graphlocal.recalibrate(local, data.train_x.split(128))
    local.eval()
    with torch.no_grad():
        accuracy = (local(data.test_x).argmax(1) == data.test_y).float().mean()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {100 * accuracy:.1f} %")
