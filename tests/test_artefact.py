"""`local.save` and `graphlocal.load`: what comes back trains on bit for bit, with the model's code and without it."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import warnings
import zipfile
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from artefacts import (
    Net,
    all_state,
    assert_same_state,
    header,
    members_of,
    net_steps,
    pictures,
    steps,
    zoo_steps,
)
from torch import Tensor, nn

import graphlocal
import zoo
from graphlocal.errors import GraphLocalError, InputError
from graphlocal.rules import Backprop, RecLRA

RULES = {"backprop": "backprop", "rec-lra kp": RecLRA(error_weights="kp", depth=2), "kolen-pollack": "kolen-pollack"}
MODELS = (
    "sign_mlp", "mlp", "dropout_mlp", "nested_output", "tied_weight", "moving_average", "partly_detached",
    "slice_assignment", "small_resnet", "lstm", "language_model_loss", "frozen_middle",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was pickled or unpickled")

    for name in ("load", "loads", "dump", "dumps"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.local"


def compiled_net(rule="rec-lra", **options):
    torch.manual_seed(0)
    return graphlocal.compile(Net(), example_inputs=pictures(), rule=rule, **options)


def assert_trains_on_and_evaluates(name, rule, path):
    """Steps, states and evaluation of what is loaded, with code and without, against what was saved."""
    model = zoo.MODELS[name]
    local = graphlocal.compile(model.make(), example_inputs=model.example(), rule=RULES[rule])
    zoo_steps(local, model)
    local.save(path)
    saved = all_state(local)
    loaded = [graphlocal.load(path, model=model.make(seed=7)), graphlocal.load(path)]
    losses = zoo_steps(local, model)
    for each in loaded:
        assert_same_state(saved, all_state(each))
        assert each.graph == local.graph
        assert all(map(torch.equal, losses, zoo_steps(each, model)))
        assert_same_state(all_state(local), all_state(each))
    outputs = [list(zoo.leaves(zoo.call(x.eval(), model.example()))) for x in (local, *loaded)]
    for found in outputs[1:]:
        assert all(map(torch.equal, outputs[0], found))


@pytest.mark.parametrize(("name", "rule"), [(name, list(RULES)[i % 3]) for i, name in enumerate(MODELS)])
def test_the_next_training_steps_and_evaluation_are_bit_equal(name, rule, path):
    assert_trains_on_and_evaluates(name, rule, path)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [zoo.name for zoo in zoo.MODELS.values() if not {"large", "torchvision"} & zoo.tags])
def test_the_whole_zoo_is_bit_equal(name, rule, path):
    assert_trains_on_and_evaluates(name, rule, path)


@pytest.mark.parametrize("name", ["top_one_experts", "branch_at_root", "skip_torch"])
def test_a_model_with_parts_that_are_only_code_needs_its_code(name, path):
    model = zoo.HARD[name]
    local = graphlocal.compile(model.make(), example_inputs=model.example())
    local.save(path)
    with pytest.raises(InputError, match=r"opaque leaves, which only|depends on the data") as caught:
        graphlocal.load(path)
    assert "model=my_model" in caught.value.remedy
    loaded = graphlocal.load(path, model=model.make(seed=7))
    assert all(map(torch.equal, zoo_steps(local, model), zoo_steps(loaded, model)))
    assert_same_state(all_state(local), all_state(loaded))


def test_the_fused_step_trains_on_too(path):
    local = compiled_net(RecLRA(error_weights="kp"))
    local.save(path)
    found = []
    for each in (local, graphlocal.load(path, model=Net()), graphlocal.load(path)):
        step = graphlocal.train_step(
            each, lambda out, y: (out - y).square().mean(), torch.optim.Adam(each.parameters())
        )
        torch.manual_seed(3)
        found.append([step(pictures(), torch.ones(4, 3)) for _ in range(3)])
        found[-1] += [p.detach().clone() for p in each.parameters()]
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


def test_equal_modules_make_equal_files(path, tmp_path):
    local = compiled_net()
    local.save(path)
    local.save(tmp_path / "second.local")
    assert path.read_bytes() == (tmp_path / "second.local").read_bytes()


def test_a_loaded_module_can_be_saved_again(path, tmp_path):
    compiled_net().save(path)
    graphlocal.load(path).save(tmp_path / "again.local")
    first, again = members_of(path), members_of(tmp_path / "again.local")
    assert [name for name in first if first[name] != again[name]] == []


# State.


class Odd(nn.Module):
    """Tensors of many kinds, tied weights, a module held twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.again = self.first
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("nothing", torch.empty(0, 7))
        self.register_buffer("halved", torch.tensor([1.5, -0.0], dtype=torch.bfloat16))
        self.register_buffer("phase", torch.tensor([1 + 2j, -1j]))
        self.register_buffer("double_phase", torch.tensor([1 + 2j], dtype=torch.complex128))
        self.register_buffer("wide", torch.arange(6.0).view(2, 3).t())
        self.register_buffer("spread", torch.tensor([2.0]).expand(4))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("hidden", torch.tensor([4.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        x = torch.tanh(self.first(x)) * self.wide[0, 0] + self.halved[0].float() * self.spread[0]
        return self.again(torch.tanh(self.second(x))) * self.phase.abs()[0] + self.hidden


@pytest.mark.parametrize("with_code", [True, False], ids=["with code", "without code"])
def test_tensors_of_every_kind_come_back(with_code, path):
    inputs = (torch.randn(4, 5),)
    local = graphlocal.compile(Odd(), example_inputs=inputs, rule="fa")
    local.original.count.fill_(41)
    local.save(path)
    loaded = graphlocal.load(path, model=Odd() if with_code else None)
    assert_same_state(all_state(local), all_state(loaded))
    model = loaded.original
    assert model.second.weight is model.first.weight
    assert model.again is model.first
    assert model.wide.stride() == local.original.wide.stride() == (1, 3)
    assert list(loaded.state_dict()) == list(local.state_dict())
    assert all(map(torch.equal, *(steps(x, inputs, lambda y: y.square().sum()) for x in (local, loaded))))
    assert int(model.count) == int(local.original.count) == 43


def test_a_tied_weight_is_stored_once(path):
    graphlocal.compile(Odd(), example_inputs=torch.randn(4, 5)).save(path)
    stored, _ = header(members_of(path)["weights.safetensors"])
    assert "first.weight" in stored
    assert not {"second.weight", "again.weight"} & set(stored)


def test_memory_format_comes_back(path):
    local = graphlocal.compile(Net(5).to(memory_format=torch.channels_last), example_inputs=pictures())
    expected = local.original.conv.weight.stride()
    local.save(path)
    for loaded in (graphlocal.load(path, model=Net(5)), graphlocal.load(path)):
        assert loaded.original.conv.weight.stride() == expected
        assert all(map(torch.equal, net_steps(copy.deepcopy(local)), net_steps(loaded)))


@pytest.mark.parametrize("with_code", [True, False], ids=["with code", "without code"])
def test_modes_and_frozen_parameters_come_back(with_code, path):
    model = Net()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    local = graphlocal.compile(model, example_inputs=pictures())
    local.check_finite = False
    net_steps(local)
    local.save(path)
    loaded = graphlocal.load(path, model=Net() if with_code else None)
    modes = [{name: m.training for name, m in x.original.named_modules()} for x in (local, loaded)]
    assert modes[0] == modes[1]
    assert not modes[1]["norm"]
    assert not loaded.check_finite
    assert not loaded.original.conv.weight.requires_grad
    assert all(map(torch.equal, net_steps(local), net_steps(loaded)))
    assert_same_state(all_state(local), all_state(loaded))


@pytest.mark.parametrize("with_code", [True, False], ids=["with code", "without code"])
def test_a_module_saved_in_evaluation_mode_comes_back_in_it_and_trains_on(with_code, path):
    local = compiled_net()
    net_steps(local)
    local.eval()
    local.save(path)
    assert not any(m.training for m in local.modules())
    loaded = graphlocal.load(path, model=Net() if with_code else None)
    assert not loaded.training
    assert not loaded.original.training
    assert torch.equal(local(pictures()), loaded(pictures()))
    assert all(map(torch.equal, net_steps(local.train()), net_steps(loaded.train())))


def test_what_was_frozen_since_the_last_step_is_saved_so(path):
    local = compiled_net()
    local.original.head.weight.requires_grad_(False)
    local.save(path)
    loaded = graphlocal.load(path)
    assert not loaded.graph.state["head.weight"].trainable
    assert all(map(torch.equal, net_steps(local), net_steps(loaded)))


def test_a_tensor_that_no_file_can_hold_is_refused_by_name(path):
    model = Net()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    local = graphlocal.compile(Net(), example_inputs=pictures())
    local.original.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(InputError, match="'sparse' can't be saved"):
        local.save(path)
    assert not path.exists()


def test_extra_state_that_is_not_saved_is_warned_of(path):
    class Extra(Net):
        def get_extra_state(self):
            return {"epoch": 3}

        def set_extra_state(self, state):
            pass

    with pytest.warns(UserWarning, match="the extra state of the module Extra is not saved"):
        graphlocal.compile(Extra(), example_inputs=pictures()).save(path)


def test_a_file_is_written_whole_or_not_at_all(path, monkeypatch):
    compiled_net().save(path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    with pytest.raises(InputError, match="can't be written"):
        compiled_net().save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


# Without code.


def test_without_code_other_batches_fit_and_other_calls_are_refused(path):
    compiled_net().save(path)
    loaded = graphlocal.load(path)
    for mode in (True, False):
        loaded.train(mode)
        assert loaded(pictures(9)).shape == (9, 3)
        assert loaded(x=pictures(2)).shape == (2, 3)
        for wrong in (torch.randn(4, 1, 7, 6), pictures().double()):
            with pytest.raises(InputError, match="graph of Net is not for this call") as caught:
                loaded(wrong)
            assert "model=my_model" in caught.value.remedy
        with pytest.raises(InputError, match="the inputs do not fit"):
            loaded(pictures(), pictures())


def test_without_code_the_signature_is_the_models(path):
    model = zoo.MODELS["keyword_none"]
    graphlocal.compile(model.make(), example_inputs=model.example()).save(path)
    loaded = graphlocal.load(path)
    signature = inspect.signature(loaded.original.forward)
    assert list(signature.parameters) == list(inspect.signature(model.make().forward).parameters)
    assert signature.parameters["mask"].default is None
    with pytest.raises(InputError, match="do not fit"):
        loaded(**model.example(), further=1)


def test_without_code_parameters_can_be_frozen_and_thawed(path):
    local = compiled_net("backprop")
    local.save(path)
    loaded = graphlocal.load(path)
    for flag in (False, True):
        for each in (local, loaded):
            each.original.conv.weight.requires_grad_(flag)
        assert all(map(torch.equal, net_steps(local), net_steps(loaded)))
        assert_same_state(all_state(local), all_state(loaded))


def test_without_code_other_modes_are_refused(path):
    compiled_net().save(path)
    loaded = graphlocal.load(path)
    loaded.original.norm.eval()
    with pytest.raises(InputError, match="traced with other modes") as caught:
        loaded(pictures())
    assert "norm is in evaluation mode" in caught.value.why


def test_without_code_it_can_be_copied_and_inspected(path):
    local = compiled_net()
    local.save(path)
    loaded = copy.deepcopy(graphlocal.load(path))
    assert all(map(torch.equal, net_steps(local), net_steps(loaded)))
    assert "without its code" in repr(loaded)
    expected, found = (graphlocal.alignment(x, pictures(), lambda y: y.square().mean()) for x in (local, loaded))
    assert expected.by_parameter == found.by_parameter
    with pytest.raises(InputError, match="no BatchNorm layers to recalibrate"):
        graphlocal.recalibrate(loaded, [pictures()])


def test_without_code_another_dtype_is_refused(path):
    compiled_net().save(path)
    with pytest.raises(InputError, match=r"computes in float32|is not for this call"):
        graphlocal.load(path).double()(pictures().double())


def test_without_evaluation_graph_evaluation_is_refused(path, monkeypatch):
    def fail(*args):
        raise GraphLocalError("forward reads a clock")

    local = compiled_net()
    monkeypatch.setattr("graphlocal.artefact.write.trace_evaluation", fail)
    local.save(path)
    loaded = graphlocal.load(path)
    assert all(map(torch.equal, net_steps(local), net_steps(loaded)))
    with pytest.raises(InputError, match="Net can't be evaluated: forward reads a clock"):
        loaded.eval()(pictures())


# With code.


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
        (Slope, OtherSlope, r"leaky_relu.*0.1\) when it was saved, .*0.2\) now", "test_artefact.py"),
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
    local = compiled_net(HalfBackprop(0.25))
    local.save(path)
    model = Net() if with_code else None
    with pytest.raises(InputError, match="'HalfBackprop', which is not graphlocal's own") as caught:
        graphlocal.load(path, model=model)
    assert "rule=MyRule()" in caught.value.remedy
    with pytest.raises(InputError, match="saved with 'HalfBackprop'"):
        graphlocal.load(path, model=model, rule=RecLRA())
    with pytest.raises(InputError, match="the passes make another graph"):
        graphlocal.load(path, model=model, rule=HalfBackprop(0.75))
    loaded = graphlocal.load(path, model=model, rule=HalfBackprop(0.25))
    assert all(map(torch.equal, net_steps(local), net_steps(loaded)))


@pytest.mark.parametrize(
    "partition", ["leaf", 2, ["conv", "head"], lambda op: "low" if "head" not in op.module else None]
)
def test_options_come_back(partition, path):
    rule = RecLRA(beta=0.2, reprojection=1.0, gamma=float("inf"))
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


def test_loading_twice_does_not_move_the_random_state(path):
    compiled_net(RecLRA(error_weights="kp")).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Net()
        before = torch.get_rng_state()
        graphlocal.load(path, model=model)
        graphlocal.load(path)
    assert torch.equal(before, torch.get_rng_state())
