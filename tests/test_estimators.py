"""Estimators of the gradient of stochastic and discrete units, against transcriptions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphlocal
from graphlocal.errors import InputError
from graphlocal.nn import Bernoulli, Signum
from graphlocal.rules import Backprop

DOUBLE = torch.float64
SLOPES = {
    "bernoulli": lambda h: torch.sigmoid(h) * (1 - torch.sigmoid(h)),
    "sign of tanh": lambda h: 1 - torch.tanh(h) ** 2,
    "sign": torch.ones_like,
}
UNITS = {"bernoulli": Bernoulli(), "sign of tanh": nn.Sequential(nn.Tanh(), Signum()), "sign": Signum()}


def network(unit: str) -> nn.Sequential:
    layers = [nn.Linear(5, 7), UNITS[unit], nn.Linear(7, 6), UNITS[unit], nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def by_hand(model: nn.Sequential, x: Tensor, y: Tensor, unit: str, adjusted: bool) -> dict[str, Tensor]:
    """The chain rule with dz/dh replaced by 1, or by the slope of the smooth unit."""
    first, second, third = model[0], model[2], model[4]
    with torch.no_grad():
        h1 = x @ first.weight.T + first.bias
        z1 = model[1](h1)
        h2 = z1 @ second.weight.T + second.bias
        z2 = model[3](h2)
        e3 = (torch.softmax(z2 @ third.weight.T + third.bias, 1) - F.one_hot(y, 3)) / len(x)
        e2 = (e3 @ third.weight) * (SLOPES[unit](h2) if adjusted else 1)
        e1 = (e2 @ second.weight) * (SLOPES[unit](h1) if adjusted else 1)
        pairs = {"0": (e1, x), "2": (e2, z1), "4": (e3, z2)}
        found = {f"{name}.weight": e.T @ below for name, (e, below) in pairs.items()}
        return found | {f"{name}.bias": e.sum(0) for name, (e, _) in pairs.items()}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("estimator", ["straight-through", "slope-adjusted"])
@pytest.mark.parametrize("partition", ["leaf", 1])
def test_the_estimator_equals_its_transcription(unit, estimator, partition):
    model = network(unit)
    x, y = torch.randn(9, 5, dtype=DOUBLE), torch.randint(3, (9,))
    rule = Backprop(estimator=estimator)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition=partition)
    state = torch.get_rng_state()
    F.cross_entropy(local(x), y).backward()
    torch.set_rng_state(state)
    expected = by_hand(model, x, y, unit, estimator == "slope-adjusted")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-9, msg=name)


def test_without_an_estimator_the_gradient_below_a_unit_is_zero():
    x = torch.randn(9, 5, dtype=DOUBLE)
    local = graphlocal.compile(network("bernoulli"), example_inputs=(x,), rule="backprop")
    local(x).sum().backward()
    gradient = local.original[0].weight.grad
    assert gradient is None or not gradient.any()


def accuracy(estimator: str | None) -> float:
    """Of two stochastic units on 20 inputs, one of which decides the class: readouts of random projections fail."""
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(20, 2), Bernoulli(), nn.Linear(2, 2))
    local = graphlocal.compile(model, example_inputs=(x,), rule=Backprop(estimator=estimator))
    step = graphlocal.train_step(local, F.cross_entropy, torch.optim.Adam(model.parameters(), 0.03))
    for _ in range(150):
        step(x, y)
    local.eval()
    return float((local(x).argmax(1) == y).float().mean())


def test_the_estimators_learn_where_backprop_does_not():
    learned = {estimator: accuracy(estimator) for estimator in (None, "straight-through", "slope-adjusted")}
    assert learned[None] < 0.75
    assert learned["straight-through"] > 0.9
    assert learned["slope-adjusted"] > 0.9


def test_other_estimators_are_refused():
    with pytest.raises(InputError, match="estimator"):
        Backprop(estimator="gumbel")
