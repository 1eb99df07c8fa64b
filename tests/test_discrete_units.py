"""Errors pass by discrete and stochastic units: found wherever they stop a gradient, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphlocal
from graphlocal.compiler import Options
from graphlocal.errors import InputError
from graphlocal.passes.discrete_units import FindDiscreteUnits
from graphlocal.rules import Backprop, RecLRA

UNITS = {
    "sign": torch.sign,
    "round": lambda x: torch.round(torch.tanh(x) * 4) / 4,
    "heaviside": lambda x: torch.heaviside(x, torch.zeros((), dtype=x.dtype)),
    "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
    "threshold": lambda x: (x > 0.5).to(x.dtype),
    "falling threshold": lambda x: (x < 0.5).to(x.dtype),
    "threshold by where": lambda x: torch.where(x > 0, 1.0, -1.0).to(x.dtype),
    "comparison with noise": lambda x: (torch.rand_like(x) < torch.sigmoid(x)).to(x.dtype),
}
GATES = {
    "relu as a product": lambda x: x * (x > 0).to(x.dtype),
    "straight-through": lambda x: x + (torch.sign(x) - x).detach(),
    "smooth": torch.tanh,
}


class Net(nn.Module):
    def __init__(self, unit) -> None:
        super().__init__()
        self.first, self.second, self.unit = nn.Linear(4, 6), nn.Linear(6, 3), unit

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.unit(self.first(x)))


def compiled(unit, **options) -> graphlocal.LocalModule:
    return graphlocal.compile(Net(unit).double(), example_inputs=(torch.randn(5, 4).double(),), **options)


def marked(local: graphlocal.LocalModule) -> list[str]:
    return [op.discrete_of for op in local.graph.operations if op.discrete_of]


@pytest.mark.parametrize("unit", UNITS.values(), ids=list(UNITS))
@pytest.mark.parametrize("partition", ["auto", 1])
def test_every_layer_below_a_discrete_unit_learns(unit, partition):
    local = compiled(unit, partition=partition)
    assert len(marked(local)) == 1
    local(torch.randn(5, 4).double()).square().sum().backward()
    for name, parameter in local.original.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("unit", UNITS.values(), ids=list(UNITS))
def test_a_discrete_unit_ends_the_subgraph_that_makes_its_value(unit):
    local = compiled(unit)
    first, second = local.graph.subgraphs
    assert [op.split("_")[0] for op in second.operations] == ["linear"]
    (z,) = first.outputs
    assert unit is UNITS["falling threshold"] or z.preactivation == "linear"


@pytest.mark.parametrize("unit", GATES.values(), ids=list(GATES))
def test_what_a_gradient_passes_is_left_alone(unit):
    assert marked(compiled(unit)) == []


@pytest.mark.parametrize("unit", [u for name, u in UNITS.items() if name != "heaviside"])
def test_backprop_keeps_the_derivative_that_autograd_has(unit):
    assert marked(compiled(unit, rule="backprop")) == []


def test_the_target_of_a_discrete_unit_is_set_for_its_smooth_part():
    """z = sign(tanh(h)): e = tanh(h) - tanh(h - beta d), and Delta W = mean(e x^T)."""
    local = compiled(lambda x: torch.sign(torch.tanh(x)), rule=RecLRA(beta=0.3, rescale=None))
    x = torch.randn(5, 4).double()
    h = local.original.first(x).detach()
    output = local(x)
    output.square().mean().backward()
    left, right = local.error_weights.buffers()
    d = 5 * (2 * output.detach() / output.numel()) @ (left @ right).T
    e = (torch.tanh(h) - torch.tanh(h - 0.3 * d)) / 5
    assert torch.allclose(local.original.first.weight.grad, e.T @ x, rtol=1e-10)


def test_inside_a_subgraph_the_error_passes_the_unit_as_if_it_were_the_identity():
    local = compiled(lambda x: (x < 0.5).to(x.dtype), partition=1)
    x = torch.randn(5, 4).double()
    output = local(x)
    output.sum().backward()
    error = -torch.ones(5, 3).double() @ local.original.second.weight.detach()
    assert torch.allclose(local.original.first.weight.grad, error.T @ x, rtol=1e-10)


def test_units_of_frozen_layers_and_of_the_input_are_left_alone():
    model = Net(torch.sign)
    model.first.requires_grad_(False)
    local = graphlocal.compile(model, example_inputs=(torch.randn(5, 4),))
    assert marked(local) == []


class Gated(nn.Module):
    """Two layers, with a discrete gate between them that depends on a parameter or a buffer, not on the input."""

    def __init__(self, gate) -> None:
        super().__init__()
        self.first, self.second, self.gate = nn.Linear(4, 6), nn.Linear(6, 3), gate
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6))
        self.register_buffer("p", torch.full((6,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) * self.gate(self.weight, self.p))


GATES_OF_STATES = {
    "sign": lambda w, p: torch.sign(w),
    "sign and round": lambda w, p: torch.sign(w).round(),
    "mask by a buffer": lambda w, p: torch.bernoulli(p),
}


@pytest.mark.parametrize("rule", [RecLRA(), Backprop(estimator="straight-through")], ids=["rec-lra", "estimator"])
@pytest.mark.parametrize("gate", GATES_OF_STATES.values(), ids=list(GATES_OF_STATES))
def test_a_unit_of_a_parameter_or_buffer_itself_has_no_input_to_treat(gate, rule):
    local = graphlocal.compile(Gated(gate), example_inputs=(torch.randn(5, 4),), rule=rule)
    assert all("round" in op.name for op in local.graph.operations if op.discrete_of)
    local(torch.randn(5, 4)).square().sum().backward()
    assert local.original.first.weight.grad.any()
    gradient = local.original.weight.grad
    assert gradient is None or not gradient.any()  # as in autograd


class Threshold(nn.Module):
    """A step at a threshold that is a state, on either side of the comparison."""

    def __init__(self, compare) -> None:
        super().__init__()
        self.first, self.second, self.compare = nn.Linear(4, 6), nn.Linear(6, 3), compare
        self.register_buffer("threshold", torch.linspace(-0.2, 0.2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.compare(self.first(x), self.threshold).to(x.dtype))


@pytest.mark.parametrize(
    ("compare", "sign"),
    [(lambda x, t: x > t, ""), (lambda x, t: t > x, "-"), (lambda x, t: x <= t, "-"), (lambda x, t: t <= x, ""),
     (lambda x, t: t < x, ""), (lambda x, t: t >= x, "-")],
)  # fmt: skip
def test_a_step_rises_or_falls_whatever_side_its_threshold_is_on(compare, sign):
    local = graphlocal.compile(Threshold(compare), example_inputs=(torch.randn(5, 4),))
    assert marked(local) == [f"{sign}linear"]
    x = torch.randn(5, 4)
    assert torch.equal(local(x), local.original(x))


def test_an_estimator_refuses_a_squashed_parameter_and_takes_its_copy():
    def compiled(gate) -> graphlocal.LocalModule:
        rule = Backprop(estimator="straight-through")
        return graphlocal.compile(Gated(gate), example_inputs=(torch.randn(5, 4),), rule=rule)

    with pytest.raises(InputError, match="applied to the parameter 'weight' itself") as caught:
        compiled(lambda w, p: (torch.sigmoid(w) > 0.5).float())
    assert "sigmoid" in caught.value.message
    assert "test_discrete_units.py" in caught.value.where
    assert "clone()" in caught.value.remedy
    assert marked(compiled(lambda w, p: (torch.sigmoid(w.clone()) > 0.5).float())) == ["clone"]


def test_the_pass_is_left_out_for_rules_that_keep_true_derivatives():
    names = [step.name for step in graphlocal.compiler.passes(Options(RecLRA()))]
    assert FindDiscreteUnits().name in names
    backprop = Options(Backprop())
    assert FindDiscreteUnits().name not in [step.name for step in graphlocal.compiler.passes(backprop)]


class Spiking(nn.Module):
    """A leaky integrate-and-fire layer over time, with reset by subtraction."""

    def __init__(self) -> None:
        super().__init__()
        self.current, self.readout = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        potential, total = torch.zeros_like(self.current(x[:, 0])), 0.0
        for t in range(x.shape[1]):
            potential = 0.9 * potential + self.current(x[:, t])
            spikes = (potential > 1.0).to(x.dtype)
            potential = potential - spikes.detach()
            total = total + spikes
        return self.readout(total)


def test_a_spiking_layer_learns_through_time():
    local = graphlocal.compile(Spiking(), example_inputs=(torch.rand(6, 5, 4),))
    assert len(marked(local)) == 5
    local(torch.rand(6, 5, 4)).square().sum().backward()
    assert local.original.current.weight.grad.abs().sum() > 0
