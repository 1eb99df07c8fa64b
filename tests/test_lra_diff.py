"""LRA-diff against a plain transcription, against backpropagation where they agree, and on any model."""

from __future__ import annotations

import pytest
import torch
from any_model import any_model, assert_learns
from torch import Tensor, nn
from training import assert_same_forward, assert_same_gradients, step

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.ir import Operation
from graphlocal.rules import LRADiff

DOUBLE = torch.float64
UNBOUNDED = {"c1": None, "c2": None}


def compiled(model: zoo.ZooModel, rule: LRADiff, **options) -> graphlocal.LocalModule:
    return graphlocal.compile(model.make(DOUBLE), example_inputs=model.example(DOUBLE), rule=rule, **options)


def perceptron(unit: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), unit(), nn.Linear(7, 6), unit(), nn.Linear(6, 3)).double()


def normalized(v: Tensor, bound: float | None) -> Tensor:
    return v if bound is None or v.norm() < bound else v * bound / v.norm()


DERIVATIVES = {"cauchy": lambda u: 2 * u / (1 + u * u), "l2": lambda u: u, "l1": torch.sign}


def by_hand(model: nn.Sequential, x: Tensor, rule: LRADiff) -> dict[str, Tensor]:
    """Sample by sample, for the loss mean over outputs of their squares; all derivatives written out."""
    updates = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    derivative = DERIVATIVES[rule.local_loss]
    weights = [model[layer].weight.detach() for layer in (0, 2, 4)]
    biases = [model[layer].bias.detach() for layer in (0, 2, 4)]
    for row in x:
        z, h = [row], []
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            h.append(weight @ z[-1] + bias)
            z.append(h[-1] if number == 2 else torch.tanh(h[-1]))
        target = z[3] - 2 * z[3] / 3
        for number in (2, 1, 0):
            top = number == 2
            error = z[3] - target if top else derivative(z[number + 1] - target) * (1 - z[number + 1] ** 2)
            updates[f"{2 * number}.weight"] += torch.outer(error, z[number]) / len(x)
            updates[f"{2 * number}.bias"] += error / len(x)
            if number == 0:
                break
            below = h[number - 1].clone()
            for _ in range(rule.steps):
                candidate = torch.tanh(below)
                above = weights[number] @ candidate + biases[number]
                up = above - target if top else derivative(torch.tanh(above) - target) * (1 - torch.tanh(above) ** 2)
                d = (weights[number].T @ up) * (1 - candidate**2)
                below = below - rule.beta * normalized(d, rule.c2)
            target = torch.tanh(below)
    return {name: normalized(update, rule.c1) for name, update in updates.items()}


def updates_of(local: graphlocal.LocalModule, x: Tensor) -> dict[str, Tensor]:
    local.zero_grad()
    local(x).square().mean(1).mean().backward()
    return {name: p.grad for name, p in local.original.named_parameters()}


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("bounds", [{}, {"c1": 0.05, "c2": 0.02}, UNBOUNDED], ids=str)
@pytest.mark.parametrize("local_loss", list(DERIVATIVES))
def test_updates_equal_the_transcription(local_loss, bounds, steps):
    model, x = perceptron(), torch.randn(4, 5, dtype=DOUBLE)
    rule = LRADiff(steps=steps, local_loss=local_loss, beta=0.3, **bounds)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
    expected = by_hand(model, x, rule)
    for name, update in updates_of(local, x).items():
        torch.testing.assert_close(update, expected[name], rtol=1e-9, atol=1e-13, msg=name)


LINEAR = ("mixture_of_experts", "vit", "transformer_dropout", "language_model_loss", "convnext", "densenet")
"""Models whose representations are pre-activations too: phi is the identity."""


@pytest.mark.parametrize("model", zoo.models(include=LINEAR))
def test_where_phi_is_the_identity_the_updates_are_the_gradients_of_autograd(model):
    """Lemma 1, for one step, the squared loss, beta 1 and no bounds."""
    rule = LRADiff(local_loss="l2", beta=1.0, **UNBOUNDED)
    local = compiled(model, rule)
    assert not any(local.graph.tail(output) for output in local.graph.representation.values())
    true = step(model.make(DOUBLE), model.example(DOUBLE), model.loss)
    assert_same_gradients(step(local, model.example(DOUBLE), model.loss).gradients, true.gradients)


SEVERAL = ("mlp", "dropout_mlp", "transformer_dropout", "small_resnet", "lstm", "siamese", "unet", "sign_mlp")


@pytest.mark.parametrize("model", zoo.models(include=SEVERAL))
def test_two_small_steps_are_one_of_twice_the_size(model):
    """So readers are evaluated again with the random numbers and the states of the forward pass."""
    rules = [LRADiff(steps=k, beta=beta, local_loss="l2", **UNBOUNDED) for k, beta in ((2, 5e-5), (1, 1e-4))]
    trainers = [compiled(model, rule, partition=2) for rule in rules]  # errors of deeper cuts would be rounding alone
    twice, once = (step(local, model.example(DOUBLE), model.loss) for local in trainers)
    assert_same_forward(twice, once)
    for name, update in once.gradients.items():
        if update is not None:
            scale = float(update.abs().max()) + 1e-13
            torch.testing.assert_close(twice.gradients[name] / scale, update / scale, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("fused", [False, True], ids=["drop-in", "train_step"])
def test_three_training_steps_equal_those_of_the_transcription(fused):
    """In the fused form a parameter changes only when no candidate needs it any more."""
    x, rule = torch.randn(4, 5, dtype=DOUBLE), LRADiff(steps=3, beta=0.3)
    model, by_formula = perceptron(), perceptron()
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
    optimizer = torch.optim.SGD(local.parameters(), 0.5)
    fused_step = graphlocal.train_step(local, lambda output, _: output.square().mean(1).mean(), optimizer)
    for _ in range(3):
        if fused:
            fused_step(x, None)
        else:
            updates_of(local, x)
            optimizer.step()
        updates = by_hand(by_formula, x, rule)
        with torch.no_grad():
            for name, parameter in by_formula.named_parameters():
                parameter -= 0.5 * updates[name]
    for (name, parameter), expected in zip(model.named_parameters(), by_formula.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("model", any_model("unused"))
def test_every_parameter_of_any_model_gets_a_finite_update(model):
    assert_learns(model, LRADiff(steps=3))


OPAQUE = [pytest.param(zoo.HARD[name], id=name) for name in ("branch_in_block", "top_one_experts")]


@pytest.mark.parametrize("model", OPAQUE)
def test_opaque_leaves_are_evaluated_again_and_left_as_they_were(model):
    local, _ = assert_learns(model, LRADiff(steps=2))
    assert local.compiled.traced.opaque


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x))
        return self.second(2 * z if z.sum() > 0 else z)


def test_a_path_that_the_data_decide_is_refused_where_it_would_be_evaluated_again():
    x = torch.randn(4, 5)

    def partition(op: Operation) -> str:
        return "below" if op.name in ("linear", "tanh") else "above"

    graphlocal.compile(Branching(), example_inputs=(x,), rule=LRADiff(), partition=partition)
    with pytest.raises(InputError, match=r"evaluates subgraph 'above'(.|\n)*steps=1"):
        graphlocal.compile(Branching(), example_inputs=(x,), rule=LRADiff(steps=2), partition=partition)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"steps": 0}, "steps=0"), ({"local_loss": "l3"}, "local_loss='l3'"), ({"beta": -1.0}, r"beta=-1\.0")],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        LRADiff(**options)
