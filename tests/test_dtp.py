"""Difference target propagation against a plain transcription, its decoders, and any model."""

from __future__ import annotations

import itertools

import pytest
import torch
from any_model import any_model, assert_learns
from torch import Tensor, nn
from training import step

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.feedback import weight_names
from graphlocal.rules import DifferenceTargetPropagation

DOUBLE = torch.float64
WHOLE = {"feedback_share": 10.0, "feedback_total": 10.0}


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    widths = (5, 8, 7, 6, 3)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def decoders_of(local: graphlocal.LocalModule) -> dict[int, tuple[nn.Parameter, nn.Parameter]]:
    """(V, c) by the number of the layer whose representation is decoded, the first being 1."""
    names = weight_names(local.graph)
    found = {}
    for connection in local.graph.connections:
        if connection.kind == "feedback":
            name = names[connection.name][0]
            weights = local.error_weights
            found[int(connection.target) // 2 + 1] = getattr(weights, name), getattr(weights, f"{name}_bias")
    return found


def by_hand(model: nn.Sequential, decoders: dict[int, tuple[Tensor, Tensor]], x: Tensor, rule, seed: int
            ) -> dict[str, Tensor]:  # fmt: skip
    """One step of the paper's Algorithm 1 for the loss mean(y^2), its errors divided by eta."""
    count = len(model) // 2 + 1
    weights = [model[2 * layer].weight.detach() for layer in range(count)]
    biases = [model[2 * layer].bias.detach() for layer in range(count)]
    z = [x]
    for layer in range(count):
        h = z[-1] @ weights[layer].T + biases[layer]
        z.append(h if layer == count - 1 else torch.tanh(h))
    output_error = 2 * z[-1] / z[-1].shape[1]
    errors = {count: output_error, count - 1: output_error @ weights[-1]}
    targets = {count - 1: z[count - 1] - rule.eta * errors[count - 1]}
    updates: dict[str, Tensor] = {}
    torch.manual_seed(seed)
    for layer in range(count - 2, 0, -1):
        v, c = (p.detach() for p in decoders[layer])
        targets[layer] = z[layer] + torch.tanh(targets[layer + 1] @ v.T + c) - torch.tanh(z[layer + 1] @ v.T + c)
        errors[layer] = (z[layer] - targets[layer]) / rule.eta
        noisy = z[layer] + rule.noise * torch.randn_like(z[layer])
        up = torch.tanh(noisy @ weights[layer].T + biases[layer])
        back = torch.tanh(up @ v.T + c)
        at = 2 * (back - noisy) * (1 - back**2) / len(x)
        updates[f"V{layer}"], updates[f"c{layer}"] = at.T @ up, at.sum(0)
    for layer in range(1, count + 1):
        delta = errors[layer] if layer == count else errors[layer] * (1 - z[layer] ** 2)
        updates[f"{2 * layer - 2}.weight"] = delta.T @ z[layer - 1] / len(x)
        updates[f"{2 * layer - 2}.bias"] = delta.mean(0)
    return updates


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_updates_of_weights_and_decoders_equal_the_transcription(noise):
    model, x = perceptron(), torch.randn(4, 5, dtype=DOUBLE)
    rule = DifferenceTargetPropagation(eta=0.4, noise=noise, **WHOLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
    decoders = decoders_of(local)
    assert sorted(decoders) == [1, 2]
    with torch.no_grad():
        for _, bias in decoders.values():
            bias.normal_()
    torch.manual_seed(7)
    local(x).square().mean().backward()
    expected = by_hand(model, decoders, x, rule, seed=7)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-13, msg=name)
    for layer, (v, c) in decoders.items():
        torch.testing.assert_close(v.grad, expected[f"V{layer}"], rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(c.grad, expected[f"c{layer}"], rtol=1e-9, atol=1e-13)


def test_with_linear_decoders_that_are_the_transposed_weights_the_updates_are_gradients():
    """Where the layers are linear: g(y) - g(z) is then exact."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in ((5, 8), (8, 7), (7, 6), (6, 3)))).double()
    x = torch.randn(4, 5, dtype=DOUBLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=DifferenceTargetPropagation(**WHOLE), partition="leaf")
    names = weight_names(local.graph)
    with torch.no_grad():
        for connection in local.graph.connections:
            if connection.kind == "feedback":
                decoder = getattr(local.error_weights, names[connection.name][0])
                decoder.copy_(model[int(connection.source)].weight.T)
    local(x).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("fused", [False, True], ids=["drop-in", "train_step"])
def test_decoders_learn_to_reconstruct_and_the_loss_falls(fused):
    torch.manual_seed(0)
    model, x = perceptron(), torch.randn(64, 5, dtype=DOUBLE)
    y = torch.tanh(x[:, :3] * 2)
    local = graphlocal.compile(
        model, example_inputs=(x,), rule=DifferenceTargetPropagation(noise=0.0, **WHOLE), partition="leaf"
    )
    optimizer = torch.optim.Adam(local.parameters(), 5e-3)
    fused_step = graphlocal.train_step(local, nn.functional.mse_loss, optimizer)

    def misses() -> float:
        z1 = torch.tanh(model[0](x))
        v, c = decoders_of(local)[1]
        return (torch.tanh(torch.tanh(model[2](z1)) @ v.T + c) - z1).square().mean().item()

    first, before = nn.functional.mse_loss(model(x), y).item(), misses()
    for _ in range(300):
        if fused:
            fused_step(x, y)
        else:
            nn.functional.mse_loss(local(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert nn.functional.mse_loss(model(x), y).item() < 0.1 * first
    assert misses() < 0.2 * before


def test_the_error_of_a_class_token_stays_with_it():
    model = zoo.MODELS["vit"]
    example = model.example(DOUBLE)
    rule = DifferenceTargetPropagation()
    local = graphlocal.compile(model.make(DOUBLE), example_inputs=example, rule=rule)
    updates = step(local, example, model.loss).gradients
    assert updates["token"].any()
    assert not updates["patches.weight"].any()


@pytest.mark.parametrize("model", any_model("unused", "vit", "vit_torchvision"))
def test_every_parameter_of_any_model_gets_a_finite_update(model):
    """Without noise no random number is drawn beside those of the model."""
    local, _ = assert_learns(model, DifferenceTargetPropagation(noise=0.0))
    learned = [name for name, p in local.error_weights.named_parameters() if p.grad is not None]
    assert learned or not any(c.kind == "feedback" for c in local.graph.connections)


def test_skip_errors_of_the_user_are_refused():
    model = zoo.MODELS["mlp"]
    with pytest.raises(InputError, match="decoders of what a subgraph reads only"):
        graphlocal.compile(
            model.make(), example_inputs=model.example(), rule="dtp", skip_errors=[("output", "0")], partition="leaf"
        )


@pytest.mark.parametrize(("options", "said"), [({"eta": 0}, "eta=0"), ({"noise": -1}, "noise=-1")])
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        DifferenceTargetPropagation(**options)
