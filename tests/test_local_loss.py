"""Local heads against a plain transcription, the labels' ways in, and any model."""

from __future__ import annotations

import pytest
import torch
from any_model import any_model, assert_updates
from torch import Tensor, nn
from torch.nn import functional as F
from training import Step, assert_same_forward, step

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.rules import LocalLoss

DOUBLE = torch.float64
KINDS = ("prediction", "similarity", "both")


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def cosines(rows: Tensor) -> Tensor:
    result = torch.empty(len(rows), len(rows), dtype=rows.dtype)
    for i, a in enumerate(rows):
        for k, b in enumerate(rows):
            a_, b_ = a - a.mean(), b - b.mean()
            result[i, k] = (a_ @ b_) / ((a_.norm() + 1e-8) * (b_.norm() + 1e-8))
    return result


def by_hand(model: nn.Sequential, heads: dict[str, Tensor], x: Tensor, y: Tensor, rule: LocalLoss) -> dict[str, Tensor]:
    """Layer by layer, each with its own loss and autograd inside of the layer; heads by layer and name."""
    updates = {}
    z = x
    for layer in (0, 2, 4):
        z = z.detach()
        parameters = {"weight": model[layer].weight, "bias": model[layer].bias}
        z = F.linear(z, *parameters.values())
        if layer == 4:
            loss = F.cross_entropy(z, y) if y.dim() == 1 else F.mse_loss(z, y)
        else:
            z = torch.tanh(z)
            parts = {}
            own = {name.split(".")[1]: head for name, head in heads.items() if name.startswith(str(layer))}
            parameters |= {f"head {name}": head for name, head in own.items()}
            if rule.head != "similarity":
                scores = z @ own["weight"].T + own["bias"]
                parts["prediction"] = F.cross_entropy(scores, y) if y.dim() == 1 else (scores - y).square().mean()
            if rule.head != "prediction":
                goal = cosines(F.one_hot(y, 3).double() if y.dim() == 1 else y)
                parts["similarity"] = (cosines(z @ own["similarity"].T) - goal).square().mean()
            share = rule.similarity_share
            weights = {"prediction": 1 - share, "similarity": share} if rule.head == "both" else {rule.head: 1.0}
            loss = sum(weights[name] * part for name, part in parts.items())
        found = torch.autograd.grad(loss, list(parameters.values()))
        updates |= {f"{layer}.{name}": gradient for name, gradient in zip(parameters, found, strict=True)}
    return updates


def heads_of(local: graphlocal.LocalModule) -> dict[str, nn.Parameter]:
    """The heads' parameters as `layer.name`."""
    owner = {c.value: c.target for c in local.graph.connections if c.kind == "head"}
    found = {}
    for name, parameter in local.error_weights.named_parameters():
        own, value = name.split("_of_head_")
        found[f"{owner[value]}.{own}"] = parameter
    return found


LABELS = {"classes": torch.tensor([0, 2, 1, 0, 1, 2]), "float": torch.randn(6, 3, dtype=DOUBLE)}


@pytest.mark.parametrize("labels", list(LABELS))
@pytest.mark.parametrize("kind", KINDS)
def test_updates_equal_the_transcription(kind, labels):
    model, x, y = perceptron(), torch.randn(6, 5, dtype=DOUBLE), LABELS[labels]
    rule = LocalLoss(head=kind, similarity_share=0.7)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
    local.labels = y
    output = local(x)
    (F.cross_entropy(output, y) if labels == "classes" else F.mse_loss(output, y)).backward()
    heads = heads_of(local)
    expected = by_hand(model, heads, x, y, rule)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.pop(name), rtol=1e-6, atol=1e-9, msg=name)
    for name, head in heads.items():
        layer, own = name.split(".")
        torch.testing.assert_close(head.grad, expected.pop(f"{layer}.head {own}"), rtol=1e-6, atol=1e-9, msg=name)
    assert not expected
    assert {id(p) for p in heads.values()} <= {id(p) for p in local.parameters()}


def test_train_step_hands_the_labels_over_and_equals_the_drop_in_path():
    x, y = torch.randn(6, 5, dtype=DOUBLE), LABELS["classes"]
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        local = graphlocal.compile(perceptron(), example_inputs=(x,), rule="local-loss", partition="leaf")
        optimizer = torch.optim.Adam(local.parameters(), 0.05)
        fused_step = graphlocal.train_step(local, F.cross_entropy, optimizer)
        first = F.cross_entropy(local.original(x), y).item()
        for _ in range(60):
            if fused:
                fused_step(x, y)
            else:
                local.labels = y
                F.cross_entropy(local(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert F.cross_entropy(local.original(x), y).item() < 0.2 * first
        results.append(dict(local.named_parameters()))
    for name, parameter in results[0].items():
        torch.testing.assert_close(results[1][name], parameter, rtol=1e-7, atol=1e-9, msg=name)


def test_labels_are_used_once_and_missed_with_a_clear_error():
    x, y = torch.randn(6, 5, dtype=DOUBLE), LABELS["classes"]
    local = graphlocal.compile(perceptron(), example_inputs=(x,), rule="local-loss", partition="leaf")
    local.labels = y
    F.cross_entropy(local(x), y).backward()
    with pytest.raises(InputError, match=r"learns from the labels(.|\n)*train_step(.|\n)*local\.labels = y"):
        F.cross_entropy(local(x), y).backward()
    local.labels = {"y": y}
    with pytest.raises(InputError, match="the labels are a dict"):
        F.cross_entropy(local(x), y).backward()
    local.labels = y[:5]
    with pytest.raises(InputError, match=r"labels, of shape \[5\], fit no axis"):
        F.cross_entropy(local(x), y).backward()
    local.labels = y + 1
    with pytest.raises(InputError, match=r"a class that(.|\n)*outputs="):
        F.cross_entropy(local(x), y).backward()


def test_the_error_graph_starts_from_the_labels_prints_and_parses_back():
    x = torch.randn(6, 5, dtype=DOUBLE)
    local = graphlocal.compile(perceptron(), example_inputs=(x,), rule="local-loss", partition="leaf")
    assert "labels +> 2 : tanh_1    (head, exact)" in str(local.graph)
    assert not any(c.kind == "vjp" for c in local.graph.connections)
    assert graphlocal.text.parse(graphlocal.text.to_text(local.graph)) == local.graph


def labels_for(model: zoo.ZooModel) -> Tensor:
    """Class indices where the model's loss has them, else numbers in the shape of the first output."""
    output = next(zoo.leaves(zoo.call(model.make(DOUBLE), model.example(DOUBLE))))
    if model.loss is zoo.classify:
        return (torch.arange(output[:, 0].numel()) % output.shape[1]).view_as(output[:, 0])
    return torch.linspace(-1, 1, output.numel(), dtype=DOUBLE).view_as(output)


def learned(model: zoo.ZooModel, rule: LocalLoss) -> tuple[Step, Step]:
    example, y = model.example(DOUBLE), labels_for(model)
    local = graphlocal.compile(model.make(DOUBLE), example_inputs=example, rule=rule)
    true = step(model.make(DOUBLE), example, model.loss)
    local.labels = y
    return true, step(local, example, model.loss)


def test_labels_of_nodes_do_not_fit_the_edges_between_them():
    with pytest.raises(InputError, match=r"shape \[7\], fit no axis of the representation relu, of shape \[9, 5\]"):
        learned(zoo.MODELS["message_passing"], LocalLoss())


@pytest.mark.parametrize("model", any_model("unused", "own-loss", "message_passing"))
def test_every_parameter_of_any_model_gets_a_finite_update(model):
    true, found = learned(model, LocalLoss())
    assert_same_forward(found, true)
    assert_updates(true, found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "linear"}, "head='linear'"),
        ({"similarity_share": 2}, "share=2"),
        ({"outputs": 0}, "outputs=0"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        LocalLoss(**options)
