"""The alignment report: angles between local updates and autograd's gradients, and nothing left behind."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
import pytest
import torch
from test_runtime import Returns, pair
from torch import Tensor, nn

import graphlocal
import zoo
from graphlocal.rules import RecLRA


@dataclass(frozen=True)
class Reversed(RecLRA):
    """rec-LRA with the sign of every update flipped."""

    name: ClassVar[str] = "reversed"

    def project(self, update: Tensor) -> Tensor:
        return -update


def report(name: str, rule: Any, **options: Any) -> graphlocal.Alignment:
    local, _, inputs = pair(name, rule, **options)
    return graphlocal.alignment(local, inputs, zoo.MODELS[name].loss)


@pytest.mark.parametrize("name", ["mlp", "small_resnet", "transformer_dropout", "language_model_loss", "frozen_middle"])
def test_backprop_is_aligned_everywhere(name):
    found = report(name, "backprop", partition="leaf")
    angles = [found.overall, *found.by_parameter.values(), *found.by_subgraph.values()]
    assert len(angles) > 4
    assert all(angle < 1e-3 for angle in angles if not math.isnan(angle))


def test_the_report_has_every_trainable_parameter_and_every_subgraph_that_learns():
    local, _, inputs = pair("frozen_middle", "backprop", partition="leaf")
    found = graphlocal.alignment(local, inputs, zoo.classify)
    assert list(found.by_parameter) == [n for n, p in local.original.named_parameters() if p.requires_grad]
    assert list(found.by_subgraph) == [s.name for s in local.graph.subgraphs if local.graph.trainable(s)]


@pytest.mark.parametrize("partition", ["auto", "leaf"])
def test_the_head_of_rec_lra_is_aligned_and_the_rest_is_not(partition):
    found = report("deep_mlp", "rec-lra", partition=partition)
    *rest, head = found.by_subgraph.values()
    assert head < 1e-3
    assert all(1 < angle < 179 for angle in rest)
    assert 0 < found.overall < 180


def test_a_reversed_update_is_at_180_degrees():
    found = report("mlp", Reversed())
    assert list(found.by_subgraph.values())[-1] == pytest.approx(180, abs=1e-3)
    assert found.by_parameter["4.weight"] == pytest.approx(180, abs=1e-3)


def test_angles_are_those_of_the_gradients_as_vectors():
    local, eager, inputs = pair("mlp", "rec-lra")
    found = graphlocal.alignment(local, inputs, zoo.classify)
    for model in (local, eager):
        zoo.classify(model(*inputs)).backward()
    for name, p in eager.named_parameters():
        cosine = nn.functional.cosine_similarity(local.original.get_parameter(name).grad.flatten(), p.grad.flatten(), 0)
        assert found.by_parameter[name] == pytest.approx(math.degrees(math.acos(min(1, cosine))), abs=1e-5)


def test_an_angle_with_nothing_is_not_a_number():
    found = report("sign_mlp", "rec-lra")
    assert math.isnan(found.by_parameter["0.weight"])
    assert found.by_parameter["4.weight"] < 1e-3


def test_the_report_prints_a_row_for_each_subgraph():
    text = str(report("mlp", "backprop", partition="leaf"))
    assert text.splitlines()[0] == "alignment with the true gradient: 0.0° overall"
    assert len(text.splitlines()) == 4


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict"])
def test_inputs_may_be_a_tensor_a_tuple_a_list_or_a_dict(kind):
    model, x = Returns(lambda *outputs: outputs), zoo.normal(3, 6)
    local = graphlocal.compile(model.double(), example_inputs=(x.double(),), rule="backprop")
    x = x.double()
    inputs = {"tensor": x, "tuple": (x,), "list": [x], "dict": {"x": x}}[kind]
    assert graphlocal.alignment(local, inputs, zoo.fit).overall < 1e-3


def traces(model: nn.Module) -> Iterator[Any]:
    """All that could betray that something ran."""
    for _, module in model.named_modules():
        yield module.training
        yield sorted(module.__dict__)
    for name, value in model.state_dict().items():
        yield name, value.tolist()
    for parameter in model.parameters():
        yield parameter.requires_grad, None if parameter.grad is None else parameter.grad.tolist()
    yield torch.get_rng_state().tolist()
    yield random.getstate()
    yield str(numpy.random.get_state())


@pytest.mark.parametrize("mode", ["train", "eval", "frozen norm"])
@pytest.mark.parametrize("rule", ["backprop", RecLRA(error_weights="kp")], ids=["backprop", "rec-lra"])
def test_nothing_is_left_changed(mode, rule):
    local, _, inputs = pair("small_resnet", rule)
    zoo.classify(local(*inputs)).backward()
    local.train(mode != "eval")
    if mode == "frozen norm":
        local.original[1].eval()
    before = list(traces(local))
    graphlocal.alignment(local, inputs, zoo.classify)
    assert list(traces(local)) == before


def test_nothing_is_left_changed_by_a_loss_that_fails():
    local, _, inputs = pair("transformer_dropout")
    local.eval()
    before = list(traces(local))

    def loss(output: Tensor) -> Tensor:
        raise ValueError("no labels")

    with pytest.raises(ValueError, match="no labels"):
        graphlocal.alignment(local, inputs, loss)
    assert list(traces(local)) == before


def test_it_works_without_gradients_and_after_a_move():
    local, _, inputs = pair("mlp")
    local.float()
    with torch.no_grad():
        found = graphlocal.alignment(local, tuple(x.float() for x in inputs), zoo.classify)
    assert found.overall < 0.1
