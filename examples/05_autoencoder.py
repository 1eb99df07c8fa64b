"""Auto-association: an autoencoder learns to reconstruct, its skip-errors starting from the pixels."""

import copy

import torch
from torch import nn

import graphlocal
from graphlocal.data import batches, load

torch.manual_seed(0)
data = load("digits")
model = nn.Sequential(
    nn.Flatten(),
    nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 12), nn.Tanh(),
    nn.Linear(12, 48), nn.Tanh(), nn.Linear(48, 64), nn.Sigmoid(),
    nn.Unflatten(1, (1, 8, 8)),
)  # fmt: skip
error = nn.functional.mse_loss(data.train_x.mean(0).expand_as(data.test_x), data.test_x)
print(f"test error of the mean image {error:.4f}")

for rule in ("backprop", "rec-lra"):
    local = graphlocal.compile(copy.deepcopy(model), example_inputs=(data.train_x[:8],), rule=rule)
    if rule == "rec-lra":
        print(local.graph)  # E from 64 pixels, none with more than a quarter of the model's parameters
    optimizer = torch.optim.Adam(local.parameters(), 2e-3)
    step = graphlocal.train_step(local, nn.functional.binary_cross_entropy, optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for x, _ in batches(data.train_x, data.train_y, 32, generator):
            step(x, x)
    local.eval()
    with torch.no_grad():
        error = nn.functional.mse_loss(local(data.test_x), data.test_x)
    print(f"test error of {rule} {error:.4f}")
