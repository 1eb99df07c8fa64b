"""Train an MLP with local updates: one call, then the training loop that you have."""

import torch
from torch import nn

import graphlocal
from graphlocal.data import batches, load

torch.manual_seed(0)
data = load("digits")
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
local = graphlocal.compile(model, example_inputs=(data.train_x[:8],), rule="rec-lra")
print(local.graph)

optimizer = torch.optim.Adam(local.parameters(), 1e-3)
generator = torch.Generator().manual_seed(0)
for epoch in range(10):
    for x, y in batches(data.train_x, data.train_y, 32, generator):
        loss = nn.functional.cross_entropy(local(x), y)
        loss.backward()  # local updates land in p.grad; no pass back through the model
        optimizer.step()
        optimizer.zero_grad()
    local.eval()  # from here on, `local` is the original model
    accuracy = (local(data.test_x).argmax(1) == data.test_y).float().mean()
    local.train()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {100 * accuracy:.1f} %")

x, y = data.train_x[:128], data.train_y[:128]
print(graphlocal.alignment(local, (x,), lambda output: nn.functional.cross_entropy(output, y)))
