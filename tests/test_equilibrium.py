"""Equilibrium propagation against autograd through its relaxation, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.rules import EquilibriumPropagation

DOUBLE = torch.float64


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for layer in (0, 2, 4):
            model[layer].weight.mul_(0.7)  # so that the relaxation converges
    return model


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2), nn.Sigmoid(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    with torch.no_grad():
        for layer in (2, 5):
            model[layer].weight.mul_(0.5)
    return model


def by_hand(model: nn.Sequential, x: Tensor, steps: int, dt: float) -> Tensor:
    """The output after the free phase of the perceptron, with the transposed weights written out."""
    weights, biases = zip(*((model[layer].weight, model[layer].bias) for layer in (0, 2, 4)), strict=True)
    s1 = torch.tanh(x @ weights[0].T + biases[0])
    s2 = torch.tanh(s1 @ weights[1].T + biases[1])
    s3 = s2 @ weights[2].T + biases[2]
    for _ in range(steps):
        t1 = torch.tanh(x @ weights[0].T + biases[0] + s2 @ weights[1])
        t2 = torch.tanh(s1 @ weights[1].T + biases[1] + s3 @ weights[2])
        t3 = s2 @ weights[2].T + biases[2]
        s1, s2, s3 = ((1 - dt) * s + dt * t for s, t in ((s1, t1), (s2, t2), (s3, t3)))
    return s3


def test_the_output_in_training_mode_is_the_free_phase_of_the_transcription():
    model, x = perceptron(), torch.randn(4, 5, dtype=DOUBLE)
    rule = EquilibriumPropagation(free_steps=7, dt=0.3)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
    torch.testing.assert_close(local(x), by_hand(model, x, 7, 0.3), rtol=1e-12, atol=1e-14)
    assert torch.equal(local.eval()(x), model(x))


CONVERGED = {"free_steps": 300, "nudged_steps": 300, "dt": 0.5}


@pytest.mark.parametrize("sign", ["fixed", "random"])
def test_for_small_beta_the_update_is_the_gradient_of_the_loss_at_the_fixed_point(sign):
    """Autograd goes through all 300 steps of the free phase."""
    model, x, y = perceptron(), torch.randn(6, 5, dtype=DOUBLE), torch.tensor([0, 2, 1, 0, 1, 2])
    rule = EquilibriumPropagation(beta=1e-4, sign=sign, **CONVERGED)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
    F.cross_entropy(local(x), y).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(by_hand(model, x, 300, 0.5), y).backward()
    for name, parameter in model.named_parameters():
        cosine = F.cosine_similarity(found[name].flatten(), parameter.grad.flatten(), 0)
        assert cosine > 0.9999, name
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name] / scale, parameter.grad / scale, rtol=0, atol=1e-3, msg=name)


def test_convolutions_and_fused_steps_learn():
    model, x, y = convolutions(), torch.randn(12, 2, 7, 7, dtype=DOUBLE), torch.arange(12) % 3
    losses = {}
    for fused in (False, True):
        model = convolutions()
        rule = EquilibriumPropagation(sign="fixed")
        local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
        optimizer = torch.optim.Adam(local.parameters(), 1e-2)
        fused_step = graphlocal.train_step(local, F.cross_entropy, optimizer)
        for _ in range(40):
            if fused:
                loss = fused_step(x, y)
            else:
                loss = F.cross_entropy(local(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.setdefault(fused, []).append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-9)
    assert losses[True][-1] < 0.6 * losses[True][0]


TAKEN = {"mlp", "deep_mlp", "frozen_middle", "called_twice", "autoencoder", "scalar_gain"}


@pytest.mark.parametrize("model", zoo.models(exclude=("large", "torchvision", "unused")))
def test_every_model_learns_or_is_refused_with_the_place_of_the_obstacle(model):
    example = model.example(DOUBLE)
    options = {"example_inputs": example, "rule": "equilibrium", "partition": "leaf"}
    if model.name not in TAKEN:
        with pytest.raises(InputError, match=r"has no energy for this model(.|\n)*where: \w"):
            graphlocal.compile(model.make(DOUBLE), **options)
        return
    local = graphlocal.compile(model.make(DOUBLE), **options)
    model.loss(zoo.call(local, example)).backward()
    for name, parameter in local.original.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("options", "said"),
    [({"beta": 0}, "beta=0"), ({"sign": "both"}, "sign='both'"), ({"dt": 2.0}, "dt=2"), ({"free_steps": 0}, "steps=0")],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        EquilibriumPropagation(**options)
