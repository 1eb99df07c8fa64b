"""Auto-association: the loss compares the output with the input, so that skip-errors start from a wide output."""

from __future__ import annotations

import itertools
import math

import pytest
import reference
import torch
from reference import Settings
from torch import Tensor, nn
from torch.nn import functional as F

import graphlocal
from graphlocal.data import load
from graphlocal.feedback import layout, weight_names
from graphlocal.rules import DirectFeedbackAlignment, RecLRA, Rule

DOUBLE = torch.float64
WHOLE = {"feedback_share": 1e6, "feedback_total": 1e6}


def perceptron(*sizes: int) -> nn.Sequential:
    layers = [part for i, o in itertools.pairwise(sizes) for part in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


class Convolutional(nn.Module):
    """8 x 8 images to a code of 6 numbers and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 6), nn.Tanh())
        self.decoder = nn.Sequential(
            nn.Linear(6, 128), nn.Tanh(), nn.Unflatten(1, (8, 4, 4)), nn.ConvTranspose2d(8, 1, 2, 2), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


@pytest.mark.parametrize("error_update", [None, "kp"])
def test_under_binary_cross_entropy_the_error_of_the_output_is_p_minus_x(error_update):
    """Algorithm 1 with e_L = p - x, read before the sigmoid, where dloss/dp is divided by p (1 - p)."""
    torch.manual_seed(0)
    model, x = perceptron(20, 12, 4, 12, 20).double(), torch.rand(7, 20, dtype=DOUBLE)
    rule = RecLRA(error_weights=error_update or "fixed", **WHOLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule)
    F.binary_cross_entropy(local(x), x, reduction="sum").div(len(x)).backward()
    linears = [model[i] for i in (0, 2, 4, 6)]
    settings = Settings("tanh", error_update=error_update)
    with torch.no_grad():
        h, z = reference.mlp_forward([w.weight for w in linears], [w.bias for w in linears], x, settings)
        e_L = torch.sigmoid(h[-1]) - x
        names = weight_names(local.graph)
        E = {c.target: names[c.name][0] for c in local.graph.connections if c.kind == "feedback"}
        for i, layer in enumerate(linears):
            e = e_L
            if i < 3:
                weight = getattr(local.error_weights, E[str(2 * i)])
                d = e_L @ weight.T
                e = reference.local_error(h[i], d, settings)
                if error_update:
                    expected = reference.error_weight_gradient(torch.tanh(h[i]), d, e_L, settings)
                    torch.testing.assert_close(weight.grad, expected, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(layer.weight.grad, reference.mean_outer(e, z[i]), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(layer.bias.grad, e.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("positions", ["shared", "own"])
def test_all_maps_together_hold_no_more_numbers_than_the_model_has_parameters(positions):
    model = nn.Sequential(nn.Flatten(), perceptron(784, 128, 32, 128, 784))
    for module, x in ((model, torch.rand(2, 1, 28, 28)), (Convolutional(), torch.rand(2, 1, 8, 8))):
        local = graphlocal.compile(module, example_inputs=(x,), rule=RecLRA(positions=positions))
        parameters = sum(p.numel() for p in module.parameters())
        sizes = [math.prod(c.weight) for c in local.graph.connections if len(c.weight) == 2]
        sizes += [c.weight[1] * (c.weight[0] + c.weight[2]) for c in local.graph.connections if len(c.weight) == 3]
        assert sizes
        assert max(sizes) <= 0.25 * parameters
        assert sum(sizes) == sum(b.numel() for b in local.error_weights.buffers()) <= parameters


def whole(local: graphlocal.LocalModule) -> dict[str, tuple[Tensor, tuple[int, ...], tuple[int, ...]]]:
    """E of each skip-error, and the shapes of its ends without the batch, by target."""
    names, graph = weight_names(local.graph), local.graph
    return {
        c.target: (
            getattr(local.error_weights, names[c.name][0]),
            graph.type(c.value).shape[1:],
            graph.type(c.source_value).shape[1:],
        )
        for c in graph.connections
        if c.kind == "feedback"
    }


def test_an_e_of_its_own_for_each_position_is_one_matrix_on_flattened_values():
    """From an image to a code, to an image of another size, and to one of the same size, where E stays on features."""
    torch.manual_seed(0)
    local = graphlocal.compile(
        Convolutional().double(), example_inputs=(torch.rand(2, 1, 8, 8, dtype=DOUBLE),),
        rule=RecLRA(positions="own", **WHOLE), partition="leaf",
    )  # fmt: skip
    drawn = {c.target: c for c in local.graph.connections if c.kind == "feedback"}
    for target, (E, to, start) in whole(local).items():
        assert E.shape == (math.prod(to), math.prod(start)), target
        error, like = torch.randn(3, *start, dtype=DOUBLE), torch.empty(3, *to, dtype=DOUBLE)
        message = layout(local.graph, drawn[target]).apply([E], error, like)
        torch.testing.assert_close(message, (error.flatten(1) @ E.T).view(3, *to))
    assert len(drawn) == 3


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (3, 4, 5)])
def test_own_positions_work_with_features_on_any_axis(shape):
    """From logits to a map (features second) and to tokens (features last)."""
    maps = len(shape) == 4
    part = nn.Conv2d(5, 5, 1) if maps else nn.Linear(5, 5)
    model = nn.Sequential(part, nn.Tanh(), nn.Flatten(), nn.Linear(math.prod(shape[1:]), 3)).double()
    x = torch.randn(shape, dtype=DOUBLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=RecLRA(positions="own", **WHOLE), partition="leaf")
    ((E, to, _),) = whole(local).values()
    (connection,) = [c for c in local.graph.connections if c.kind == "feedback"]
    e = torch.randn(3, 3, dtype=DOUBLE)
    message = layout(local.graph, connection).apply([E], e, torch.empty(shape, dtype=DOUBLE))
    d = (e @ E.T).view(3, 5, *(to[1:] if maps else to[:1]))  # features first, then positions
    torch.testing.assert_close(message, d if maps else d.movedim(1, -1))


def reconstruction(model: nn.Module, rule: Rule, epochs: int) -> list[float]:
    """Mean squared error on the digits' test images before and after training under binary cross-entropy."""
    data = load("digits")
    local = graphlocal.compile(model, example_inputs=(data.train_x[:8],), rule=rule)
    step = graphlocal.train_step(local, F.binary_cross_entropy, torch.optim.Adam(local.parameters(), 2e-3))
    found = []
    for epoch in range(epochs + 1):
        local.eval()
        with torch.no_grad():
            found.append(float(F.mse_loss(local(data.test_x), data.test_x)))
        local.train()
        for x in data.train_x.split(32) if epoch < epochs else ():
            step(x, x)
    return found


def variance() -> float:
    """What the mean image leaves."""
    data = load("digits")
    return float(F.mse_loss(data.train_x.mean(0).expand_as(data.test_x), data.test_x))


@pytest.mark.exhaustive  # examples/05_autoencoder.py has a run of its own
@pytest.mark.parametrize("rule", [RecLRA(), DirectFeedbackAlignment()], ids=str)
def test_a_perceptron_learns_to_reconstruct(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), perceptron(64, 48, 12, 48, 64), nn.Unflatten(1, (1, 8, 8)))
    assert reconstruction(model, rule, 10)[-1] < 0.75 * variance()


@pytest.mark.parametrize("positions", ["shared", "own"])
@pytest.mark.parametrize("partition", ["auto", "leaf"])
def test_every_parameter_of_a_convolutional_autoencoder_gets_an_update(positions, partition):
    x = torch.rand(3, 1, 8, 8)
    model = Convolutional()
    local = graphlocal.compile(model, example_inputs=(x,), rule=RecLRA(positions=positions), partition=partition)
    F.binary_cross_entropy(local(x), x).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
