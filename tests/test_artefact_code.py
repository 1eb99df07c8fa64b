"""`graphlocal.load(path, model=...)`: changed code is refused and says where; rules and partitions come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from artefacts import Net, Odd, assert_same_state, compiled_net, forbid_pickle, net_steps, pictures
from torch import Tensor, nn

import graphlocal
from graphlocal.errors import InputError
from graphlocal.rules import Backprop, RecLRA


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch):
    forbid_pickle(monkeypatch)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.local"


class Doubled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OtherSlope(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.leaky_relu(self.norm(self.conv(x)), 0.2).mean((2, 3))
        return self.head(self.drop(x))


class OtherTable(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.tensor([1.0, 2.0, 4.0])


class Table(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.tensor([1.0, 2.0, 3.0])


class Slope(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.leaky_relu(self.norm(self.conv(x)), 0.1).mean((2, 3))
        return self.head(self.drop(x))


def untrained(model):
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize(
    ("saved", "given", "message", "where"),
    [
        (Net, Doubled, "computes something else than when it was saved", "mul"),
        (Slope, OtherSlope, r"leaky_relu.*0.1\) when it was saved, .*0.2\) now", "test_artefact_code.py"),
        (Table, OtherTable, "the tensor .* spells out has another value now", None),
    ],
)  # fmt: skip
def test_changed_code_is_refused_and_says_where(saved, given, message, where, path):
    graphlocal.compile(saved(), example_inputs=pictures()).save(path)
    model = given().eval()
    before = untrained(model)
    with pytest.raises(InputError, match=message) as caught:
        graphlocal.load(path, model=model)
    assert where is None or where in caught.value.where
    assert_same_state(before, untrained(model))
    assert not model.training


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: Net(5), r"conv.weight is a parameter of \[5, 1, 3, 3\] in the model, .*\[4, 1, 3, 3\] in the file"),
        (lambda: Net().double(), "conv.weight is float64 in the model, float32 in the file"),
        (lambda: nn.Linear(3, 3), "it has no 'conv.weight'"),
        (lambda: nn.Sequential(Net()), "it has no 'conv.weight'"),
    ],
)
def test_another_model_is_refused(given, message, path):
    compiled_net().save(path)
    with pytest.raises(InputError, match=message):
        graphlocal.load(path, model=given())


def test_another_tie_or_module_is_refused(path):
    graphlocal.compile(Odd(), example_inputs=torch.randn(4, 5)).save(path)
    untied, extra = Odd(), Odd()
    untied.second.weight = nn.Parameter(torch.zeros(5, 5))
    extra.dropout = nn.Dropout()
    with pytest.raises(InputError, match=r"second.weight is a parameter .*tied to 'first.weight' in the file"):
        graphlocal.load(path, model=untied)
    with pytest.raises(InputError, match="the file has no module 'dropout'"):
        graphlocal.load(path, model=extra)


def test_bad_arguments_are_refused(path):
    local = compiled_net()
    local.save(path)
    with pytest.raises(InputError, match="model is a LocalModule"):
        graphlocal.load(path, model=local)
    with pytest.raises(InputError, match="device is given with a model"):
        graphlocal.load(path, model=Net(), device="cpu")
    for device in ("abacus", "cuda:9"):
        with pytest.raises(InputError, match="can't be used"):
            graphlocal.load(path, device=device)
    with pytest.raises(InputError, match="path is a int"):
        graphlocal.load(3)
    with pytest.raises(InputError, match="can't be read"):
        graphlocal.load(path.with_name("nowhere.local"))
    with pytest.raises(InputError, match="can't be read"):
        graphlocal.load(path.parent)


# Rules and partitions.


@dataclass(frozen=True)
class HalfBackprop(Backprop):
    name: ClassVar[str] = "half"
    share: float = 0.5

    def project(self, update: Tensor) -> Tensor:
        return update * self.share


@pytest.mark.parametrize("with_code", [True, False], ids=["with code", "without code"])
def test_a_rule_of_ones_own_has_to_be_passed_again(with_code, path):
    local = compiled_net(HalfBackprop(share=0.25))
    local.save(path)
    model = Net() if with_code else None
    with pytest.raises(InputError, match="'HalfBackprop', which is not graphlocal's own") as caught:
        graphlocal.load(path, model=model)
    assert "rule=MyRule()" in caught.value.remedy
    with pytest.raises(InputError, match="saved with 'HalfBackprop'"):
        graphlocal.load(path, model=model, rule=RecLRA())
    with pytest.raises(InputError, match="the passes make another graph"):
        graphlocal.load(path, model=model, rule=HalfBackprop(share=0.75))
    loaded = graphlocal.load(path, model=model, rule=HalfBackprop(share=0.25))
    assert all(map(torch.equal, net_steps(local), net_steps(loaded)))


@pytest.mark.parametrize(
    "partition", ["leaf", 2, ["conv", "head"], lambda op: "low" if "head" not in op.module else None]
)
def test_options_come_back(partition, path):
    rule = RecLRA(beta=0.2, reprojection=1.0, gamma=1e-7)
    local = compiled_net(rule, partition=partition)
    local.save(path)
    for loaded in (graphlocal.load(path, model=Net()), graphlocal.load(path)):
        assert loaded.options.rule == rule
        assert loaded.graph == local.graph
        if not callable(partition):
            assert loaded.options.partition == partition


def test_skip_errors_come_back(path):
    local = compiled_net(RecLRA(), partition="leaf", skip_errors=[("output", "conv")])
    local.save(path)
    assert graphlocal.load(path).options.skip_errors == (("output", "conv"),)


def test_a_partition_function_is_kept_as_its_answers_for_the_saved_graph(path):
    low = lambda op: "low" if "head" not in op.module else None  # noqa: E731
    compiled_net(partition=low).save(path)
    loaded = graphlocal.load(path, model=Net(), partition=low)
    assert loaded.options.partition is low
    answers = graphlocal.load(path, model=Net()).options.partition
    with pytest.raises(InputError, match="has no box for the operation 'other'"):
        answers(graphlocal.ir.Operation("other", "aten.relu.default", ()))
