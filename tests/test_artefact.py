"""`local.save` and `graphlocal.load`: what comes back trains on bit for bit, with the model's code and without it."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
import zipfile

import pytest
import torch
from artefacts import (
    Net,
    Odd,
    all_state,
    assert_same_state,
    compiled_net,
    forbid_pickle,
    header,
    members_of,
    net_steps,
    pictures,
    steps,
    zoo_steps,
)

import graphlocal
import zoo
from graphlocal.errors import GraphLocalError, InputError
from graphlocal.rules import RecLRA

RULES = {"backprop": "backprop", "rec-lra kp": RecLRA(error_weights="kp", depth=2), "kolen-pollack": "kolen-pollack"}
MODELS = (
    "sign_mlp", "mlp", "dropout_mlp", "nested_output", "tied_weight", "moving_average", "partly_detached",
    "slice_assignment", "small_resnet", "lstm", "language_model_loss", "frozen_middle",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch):
    forbid_pickle(monkeypatch)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.local"


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


@pytest.mark.exhaustive
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


def test_without_code_devices_that_are_written_into_the_graph_follow_the_model(path):
    model = zoo.MODELS["lstm"]
    graphlocal.compile(model.make(), example_inputs=model.example()).save(path)
    stored = graphlocal.load(path).original.training_graph
    moved = stored.on(torch.device("cpu"), torch.device("cuda", 1))
    found = [[n.kwargs["device"] for n in g.nodes if "device" in n.kwargs] for g in (stored.graph, moved)]
    assert len(found[0]) > 0
    assert set(found[0]) == {torch.device("cpu")}
    assert set(found[1]) == {torch.device("cuda", 1)}


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


def test_loading_twice_does_not_move_the_random_state(path):
    compiled_net(RecLRA(error_weights="kp")).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Net()
        before = torch.get_rng_state()
        graphlocal.load(path, model=model)
        graphlocal.load(path)
    assert torch.equal(before, torch.get_rng_state())
