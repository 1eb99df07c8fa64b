"""Feedback twins and direct feedback: each rule against a plain transcription, and against its exact identity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from training import assert_same_forward, assert_same_gradients, step

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.rules import DirectFeedbackAlignment, FeedbackAlignment, KolenPollack, Rule, SignSymmetric

DOUBLE = torch.float64
TWINS = [FeedbackAlignment(), KolenPollack(), *(SignSymmetric(m) for m in ("uniform", "batch", "fixed"))]
ALL = [*TWINS, DirectFeedbackAlignment()]


def compiled(model: zoo.ZooModel, rule: Rule, **options) -> graphlocal.LocalModule:
    example = model.example(DOUBLE)
    return graphlocal.compile(model.make(DOUBLE), example_inputs=example, rule=rule, **options)


def stored(local: graphlocal.LocalModule, parameter: str) -> Tensor:
    return getattr(local.error_weights, f"twin_{parameter.replace('.', '__')}").detach()


@pytest.mark.parametrize("model", zoo.models(exclude=("sign_mlp",)))  # whose true gradient is zero
def test_twins_that_equal_the_weights_give_the_gradients_of_autograd(model):
    local = compiled(model, FeedbackAlignment())
    parameters = dict(local.original.named_parameters())
    for name in local.graph.twins:
        stored(local, name).copy_(parameters[name].detach())
    found = step(local, model.example(DOUBLE), model.loss)
    true = step(model.make(DOUBLE), model.example(DOUBLE), model.loss)
    assert_same_forward(found, true)
    assert_same_gradients(found.gradients, true.gradients)


@pytest.mark.parametrize("rule", [rule for rule in ALL if rule != SignSymmetric("batch")], ids=str)
@pytest.mark.parametrize("model", zoo.models(include=("mlp", "small_resnet", "language_model", "unet", "lstm", "vit")))
def test_forward_is_that_of_the_model_and_every_parameter_gets_an_update(model, rule):
    """But for the rule that draws random numbers of its own."""
    found = step(compiled(model, rule), model.example(DOUBLE), model.loss)
    true = step(model.make(DOUBLE), model.example(DOUBLE), model.loss)
    assert_same_forward(found, true)
    for name, gradient in true.gradients.items():
        if gradient is not None and gradient.abs().max() > 1e-12:
            assert found.gradients[name].isfinite().all(), name
            assert found.gradients[name].any(), name


@pytest.mark.parametrize("partition", ["leaf", 1, 3])
def test_the_update_by_twins_does_not_depend_on_the_partition(partition):
    model = zoo.MODELS["small_resnet"]
    updates = []
    for cut in ("auto", partition):
        torch.manual_seed(0)
        updates.append(step(compiled(model, FeedbackAlignment(), partition=cut), model.example(DOUBLE), model.loss))
    assert_same_gradients(updates[0].gradients, updates[1].gradients)


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def by_hand(model: nn.Sequential, x: Tensor, feedback: dict[int, Tensor]) -> dict[str, Tensor]:
    """delta_l = (delta_(l+1) B_(l+1)) * phi'(h_l); Delta W_l = delta_l^T z_(l-1), for the loss mean(y^2)."""
    z = [x]
    for layer in (0, 2, 4):
        h = z[-1] @ model[layer].weight.detach().T + model[layer].bias.detach()
        z.append(h if layer == 4 else torch.tanh(h))
    delta = 2 * z[-1] / z[-1].numel()
    updates = {}
    for layer, before in ((4, 2), (2, 1), (0, 0)):
        updates[f"{layer}.weight"] = delta.T @ z[before]
        updates[f"{layer}.bias"] = delta.sum(0)
        if layer:
            delta = (delta @ feedback[layer]) * (1 - z[before] ** 2)
    return updates


def updates_of(local: graphlocal.LocalModule, x: Tensor) -> dict[str, Tensor]:
    local.zero_grad()
    local(x).square().mean().backward()
    return {name: p.grad for name, p in local.original.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("rule", [FeedbackAlignment(), KolenPollack()], ids=str)
def test_feedback_alignment_equals_its_transcription(rule):
    model, x = perceptron(), torch.randn(4, 5, dtype=DOUBLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
    twins = {layer: stored(local, f"{layer}.weight") for layer in (2, 4)}
    assert_equal(updates_of(local, x), by_hand(model, x, twins))


@pytest.mark.parametrize("magnitudes", ["uniform", "fixed"])
def test_sign_symmetric_equals_its_transcription(magnitudes):
    model, x = perceptron(), torch.randn(4, 5, dtype=DOUBLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=SignSymmetric(magnitudes), partition="leaf")
    twins = {}
    for layer in (2, 4):
        weight = model[layer].weight.detach()
        size = 2 * stored(local, f"{layer}.weight") if magnitudes == "fixed" else 1.0
        twins[layer] = weight.sign() * weight.abs().mean() * size
    assert_equal(updates_of(local, x), by_hand(model, x, twins))


def test_sign_symmetric_follows_the_signs_and_its_random_magnitudes_change():
    model, x = perceptron(), torch.randn(4, 5, dtype=DOUBLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=SignSymmetric("batch"))
    first, second = updates_of(local, x), updates_of(local, x)
    assert torch.equal(first["4.weight"], second["4.weight"])
    assert not torch.equal(first["0.weight"], second["0.weight"])
    assert not list(local.error_weights.buffers())


def test_direct_feedback_alignment_equals_its_transcription():
    model, x = perceptron(), torch.randn(4, 5, dtype=DOUBLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=DirectFeedbackAlignment(), partition="leaf")
    maps = {}
    for connection in local.graph.connections:
        if connection.kind == "feedback":
            names = graphlocal.feedback.weight_names(local.graph)[connection.name]
            factors = [getattr(local.error_weights, name) for name in names]
            maps[connection.target] = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
    z1 = torch.tanh(model[0](x)).detach()
    z2 = torch.tanh(model[2](z1)).detach()
    output = model[4](z2).detach()
    e = 2 * output / output.numel()
    d1, d2 = (e @ maps["0"].T) * (1 - z1**2), (e @ maps["2"].T) * (1 - z2**2)
    expected = {"0.weight": d1.T @ x, "2.weight": d2.T @ z1, "4.weight": e.T @ z2, "0.bias": d1.sum(0)}
    assert_equal(updates_of(local, x), expected)


@pytest.mark.parametrize("fused", [False, True], ids=["drop-in", "train_step"])
def test_kolen_pollack_twins_converge_to_the_weights_under_weight_decay(fused):
    """W - B shrinks by 1 - lr * decay a step."""
    model, x = perceptron(), torch.randn(4, 5, dtype=DOUBLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=KolenPollack(), partition="leaf")
    optimizer = torch.optim.SGD(local.parameters(), 0.1, weight_decay=0.5)
    before = {layer: (model[layer].weight - stored(local, f"{layer}.weight")).detach() for layer in (2, 4)}
    fused_step = graphlocal.train_step(local, lambda y, target: (y - target).square().mean(), optimizer)
    for _ in range(20):
        if fused:
            fused_step(x, torch.ones(4, 3, dtype=DOUBLE))
        else:
            local(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for layer, difference in before.items():
        after = (model[layer].weight - stored(local, f"{layer}.weight")).detach()
        torch.testing.assert_close(after, difference * 0.95**20, rtol=1e-9, atol=1e-12)


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided, padded, grouped": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
    "dilated": lambda: nn.Conv2d(4, 6, (3, 1), dilation=(2, 1)),
    "padding by name": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2),
}


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_errors_go_through_the_twin_of_a_convolution(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), layer()).double()
    x = torch.randn(3, 2, 7, 7, dtype=DOUBLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=FeedbackAlignment(), partition=1)
    found = updates_of(local, x)
    z = model[0](x).detach().requires_grad_()
    error = (2 * model[1](z) / model[1](z).numel()).detach()
    model.zero_grad()
    model[1](z).backward(error)
    torch.testing.assert_close(found["1.weight"], model[1].weight.grad)
    with torch.no_grad():
        model[1].weight.copy_(stored(local, "1.weight"))
    (through,) = torch.autograd.grad(model[1](z), z, error)
    expected = torch.einsum("bfhw,bchw->fc", through, x)[:, :, None, None]
    torch.testing.assert_close(found["0.weight"], expected)


def test_twins_are_printed_and_parse_back():
    local = compiled(zoo.MODELS["mlp"], FeedbackAlignment())
    text = graphlocal.text.to_text(local.graph)
    assert "twin 0.weight\n" in text
    assert graphlocal.text.parse(text) == local.graph
    assert "errors through feedback twins of 3 weights" in str(local.graph)


def test_unknown_magnitudes_are_refused():
    with pytest.raises(InputError, match=r"magnitudes='random'(.|\n)*'uniform', 'batch', 'fixed'"):
        SignSymmetric("random")
