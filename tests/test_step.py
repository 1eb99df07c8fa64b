"""The fused step `train_step`: the drop-in path's parameters, one subgraph at a time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_runtime import LEARNED, Returns, state
from torch import Tensor, nn, optim
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.optim import lr_scheduler

import graphlocal
import zoo
from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.partial_optimizer import PartialOptimizer

STEPS = 5
every_rule = pytest.mark.parametrize("rule", ["backprop", "rec-lra", LEARNED], ids=["backprop", "fixed E", "learned E"])

Optimizers = Callable[[Any], optim.Optimizer]
OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": partial(optim.SGD, lr=0.1),
    "momentum": partial(optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "maximize": partial(optim.SGD, lr=0.05, maximize=True),
    "adam": partial(optim.Adam, lr=0.01),
    "amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True),
    "adamw": partial(optim.AdamW, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw_foreach": partial(optim.AdamW, lr=0.01, weight_decay=0.1, foreach=True),
    "adam_fused": partial(optim.Adam, lr=0.01, fused=True),
    "rmsprop": partial(optim.RMSprop, lr=0.01, momentum=0.5),
    "adagrad": partial(optim.Adagrad, lr=0.05),
    "adadelta": partial(optim.Adadelta, lr=1.0),
    "nadam": partial(optim.NAdam, lr=0.01),
    "rprop": partial(optim.Rprop, lr=0.01),
}


def loss_fn(output: Any, y: Tensor) -> Tensor:
    output = next(zoo.leaves(output))
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def batches(name: str) -> list[tuple[Any, Tensor]]:
    """Five batches of a zoo model's inputs, as a tuple, with labels."""
    shape, features = (3, 2, 8, 8), 4
    if name == "language_model":
        return [(zoo.tokens(3, 5, seed=i), zoo.tokens(3, 5, seed=9 + i)) for i in range(STEPS)]
    shape = {"mlp": (3, 6), "transformer_dropout": (3, 5, 8)}.get(name, shape)
    return [(zoo.normal(*shape, seed=i).double(), zoo.tokens(3, seed=9 + i, high=features)) for i in range(STEPS)]


def compiled(name: str, rule: Any, **options: Any) -> graphlocal.LocalModule:
    model = zoo.MODELS[name]
    return graphlocal.compile(
        model.make(torch.float64), example_inputs=model.example(torch.float64), rule=rule, **options
    )


def groups(local: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups whose learning rates differ, which cut across the subgraphs."""
    parameters = list(local.parameters())
    return [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.003}]


def train(
    local: graphlocal.LocalModule, optimizer: optim.Optimizer, data: list, fused: bool, each: Callable = lambda: None
) -> list[Tensor]:
    """Train on the batches by the fused step or by the drop-in path; the losses."""
    torch.manual_seed(4)
    step = graphlocal.train_step(local, loss_fn, optimizer) if fused else None
    losses = []
    for x, y in data:
        if step is not None:
            losses.append(step(x, y))
        else:
            loss = loss_fn(local(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        each()
    return losses


def assert_fused_equals_drop_in(name: str, rule: Any, make: Callable[[nn.Module], optim.Optimizer], **options: Any):
    ours, theirs = (compiled(name, rule, **options) for _ in range(2))
    before = state(ours)
    optimizers = make(ours), make(theirs)
    found, expected = (
        train(local, optimizer, batches(name), fused)
        for local, optimizer, fused in zip((ours, theirs), optimizers, (True, False), strict=True)
    )
    torch.testing.assert_close(found, expected)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=lambda text, key=key: f"{key}: {text}")
    for key, _ in ours.named_parameters():
        assert not torch.equal(before[key], ours.state_dict()[key]), key
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.testing.assert_close(states[0]["state"], states[1]["state"])
    assert states[0]["param_groups"] == states[1]["param_groups"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["backprop", LEARNED], ids=["backprop", "learned E"])
def test_the_fused_step_equals_the_drop_in_path_under_every_optimizer(rule, optimizer):
    make = OPTIMIZERS[optimizer]
    assert_fused_equals_drop_in("mlp", rule, lambda local: make(groups(local)), partition="leaf")


@every_rule
@pytest.mark.parametrize("name", ["small_resnet", "transformer_dropout", "language_model"])
def test_the_fused_step_equals_the_drop_in_path_on_every_kind_of_model(rule, name):
    assert_fused_equals_drop_in(name, rule, lambda local: optim.Adam(local.parameters(), 0.01))


@pytest.mark.parametrize("partition", ["leaf", 3])
def test_tied_parameters_are_updated_once_a_step(partition):
    """With momentum, a second update in the same step would count twice."""
    make = partial(optim.SGD, lr=0.05, momentum=0.9)
    assert_fused_equals_drop_in("language_model", "backprop", lambda m: make(m.parameters()), partition=partition)
    local = compiled("language_model", "backprop", partition=partition)
    optimizer = optim.Adam(local.parameters())
    graphlocal.train_step(local, loss_fn, optimizer)(*batches("language_model")[0])
    assert all(entry["step"] == 1 for entry in optimizer.state.values())


@pytest.mark.parametrize("first", ["scheduler", "step"])
@pytest.mark.parametrize(
    "schedule",
    [partial(lr_scheduler.StepLR, step_size=2, gamma=0.5), partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9)],
    ids=["StepLR", "OneCycleLR"],
)
def test_learning_rate_schedulers_work_without_warnings(schedule, first):
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fused in (True, False):
            local = compiled("mlp", "backprop")
            optimizer = optim.SGD(groups(local), 0.05, momentum=0.9)
            if first == "step":
                train(local, optimizer, batches("mlp")[:1], fused)
            scheduler = schedule(optimizer)
            train(local, optimizer, batches("mlp"), fused, each=scheduler.step)
            results.append((state(local), optimizer.param_groups[0]["lr"], scheduler.last_epoch))
    torch.testing.assert_close(*results)


def test_a_scheduler_that_wraps_the_optimizer_leaves_foreign_gradients_alone():
    local = compiled("mlp", "backprop")
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    optimizer = optim.SGD([*local.parameters(), other], 0.1)
    lr_scheduler.StepLR(optimizer, 1)
    train(local, optimizer, batches("mlp"), fused=True)
    assert torch.equal(other, torch.ones(3))


def test_the_optimizers_state_can_be_saved_and_loaded_between_steps():
    results = []
    for fused in (True, False):
        local = compiled("mlp", LEARNED)
        optimizer = optim.Adam(groups(local), 0.01)
        step = graphlocal.train_step(local, loss_fn, optimizer)
        for i, (x, y) in enumerate(batches("mlp")):
            if i == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                saved["param_groups"][0]["lr"] = 0.1
                optimizer.load_state_dict(saved)
            if fused:
                step(x, y)
            else:
                loss_fn(local(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append((state(local), optimizer.state_dict()["state"]))
    torch.testing.assert_close(*results)


def test_a_parameter_group_may_be_added_between_steps():
    local = compiled("mlp", "backprop")
    first, *rest = local.parameters()
    optimizer = optim.SGD([first], 0.1)
    step = graphlocal.train_step(local, loss_fn, optimizer)
    before = state(local)
    step(*batches("mlp")[0])
    changed = {name for name, value in state(local).items() if not torch.equal(value, before[name])}
    assert changed == {"original.0.weight"}
    optimizer.add_param_group({"params": rest})
    step(*batches("mlp")[1])
    assert all(not torch.equal(value, before[name]) for name, value in state(local).items())


def test_learned_error_weights_are_updated():
    local = compiled("mlp", LEARNED)
    before = state(local.error_weights)
    assert before
    train(local, optim.SGD(local.parameters(), 0.1), batches("mlp")[:1], fused=True)
    assert all(not torch.equal(value, before[name]) for name, value in state(local.error_weights).items())


@pytest.fixture
def one_by_one(monkeypatch):
    """No gradient waits for others, however small."""
    monkeypatch.setattr("graphlocal.partial_optimizer.TOGETHER", 0)


def test_small_gradients_are_applied_together():
    local = compiled("mlp", "backprop", partition="leaf")
    optimizer = optim.SGD(local.parameters(), 0.1)
    seen: list[int] = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.extend(len(g["params"]) for g in opt.param_groups))
    train(local, optimizer, batches("mlp")[:1], fused=True)
    assert seen == [6]


@pytest.mark.usefixtures("one_by_one")
def test_optimizer_hooks_run_and_see_each_subgraphs_gradients():
    local = compiled("mlp", "backprop", partition="leaf")
    optimizer = optim.SGD(local.parameters(), 0.1)
    seen: list[int] = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.extend(len(g["params"]) for g in opt.param_groups))
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(0))
    train(local, optimizer, batches("mlp")[:1], fused=True)
    assert seen == [2, 0] * 3


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_inputs_may_be_a_tensor_a_tuple_or_a_dict(kind):
    results = []
    for way in ("tensor", kind):
        model = Returns(lambda *outputs: outputs)
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        x = zoo.normal(3, 6)
        local = graphlocal.compile(model, example_inputs=(x,))
        step = graphlocal.train_step(local, loss_fn, optim.SGD(local.parameters(), 0.1))
        step({"tensor": x, "tuple": (x,), "dict": {"x": x}}[way], torch.tensor([0, 1, 2]))
        results.append(state(local))
    torch.testing.assert_close(*results)


@every_rule
def test_the_gradients_of_the_users_own_backward_pass_are_not_touched(rule):
    local = compiled("mlp", rule)
    marks = {p: torch.full_like(p, 7.0) for p in local.parameters()}
    for parameter, mark in marks.items():
        parameter.grad = mark
    before = state(local)
    train(local, optim.SGD(local.parameters(), 0.1), batches("mlp"), fused=True)
    assert all(p.grad is mark and bool((mark == 7).all()) for p, mark in marks.items())
    assert not torch.equal(before["original.0.weight"], local.original[0].weight)


@pytest.mark.usefixtures("one_by_one")
@every_rule
def test_the_gradients_of_a_subgraph_are_freed_before_the_next_ones_are_applied(rule):
    local = compiled("small_resnet", rule, partition="leaf")
    optimizer = optim.SGD(local.parameters(), 0.1)
    before: list[StorageWeakRef] = []
    most = 0

    def look(view: optim.Optimizer, *_: Any) -> None:
        nonlocal most
        assert all(storage.expired() for storage in before)
        found = [p.grad for group in view.param_groups for p in group["params"] if p.grad is not None]
        before[:] = [StorageWeakRef(gradient.untyped_storage()) for gradient in found]
        most = max(most, len(found))

    optimizer.register_step_pre_hook(look)
    train(local, optimizer, batches("small_resnet")[:2], fused=True)
    assert 1 <= most <= 3
    assert all(storage.expired() for storage in before)


def test_a_step_leaves_no_activation_behind():
    local = compiled("small_resnet", "backprop")
    x, y = batches("small_resnet")[0]
    step = graphlocal.train_step(local, loss_fn, optim.SGD(local.parameters(), 0.1))
    step(x, y)
    storages: list[StorageWeakRef] = []
    known = {t.untyped_storage().data_ptr() for t in (x, y, *local.parameters(), *local.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            storages.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step(x, y)
    assert len(storages) > 10
    assert not loss.requires_grad
    assert all(storage.expired() for storage in storages)


# What it refuses


def test_what_is_not_a_compiled_model_is_refused():
    model = zoo.MODELS["mlp"].make()
    with pytest.raises(InputError, match="train_step needs a compiled model"):
        graphlocal.train_step(model, loss_fn, optim.SGD(model.parameters(), 0.1))


def test_lbfgs_is_refused():
    local = compiled("mlp", "backprop")
    with pytest.raises(InputError, match="LBFGS evaluates the loss several times a step"):
        graphlocal.train_step(local, loss_fn, optim.LBFGS(local.parameters()))


def test_an_optimizer_of_another_model_is_refused():
    local = compiled("mlp", "backprop")
    other = zoo.MODELS["mlp"].make()
    with pytest.raises(InputError, match="holds none of the model's parameters") as caught:
        graphlocal.train_step(local, loss_fn, optim.SGD(other.parameters(), 0.1))
    assert "local.parameters()" in str(caught.value)


def test_evaluation_mode_is_refused_at_the_step():
    local = compiled("mlp", "backprop").eval()
    step = graphlocal.train_step(local, loss_fn, optim.SGD(local.parameters(), 0.1))
    with pytest.raises(InputError, match="in evaluation mode") as caught:
        step(*batches("mlp")[0])
    assert "local.train()" in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda output, y: F.cross_entropy(output, y, reduction="none"), r"Tensor of shape \[3\]"),
        (lambda output, y: output.sum().item(), "it returned float"),
        (lambda output, y: output.detach().sum(), "depends on the model's output"),
    ],
    ids=["vector", "number", "detached"],
)
def test_a_loss_that_is_no_scalar_of_the_output_is_refused_and_nothing_is_learned(loss, said):
    local = compiled("mlp", "backprop")
    step = graphlocal.train_step(local, loss, optim.SGD(local.parameters(), 0.1))
    before = state(local)
    with pytest.raises(InputError, match=said):
        step(*batches("mlp")[0])
    torch.testing.assert_close(state(local), before, rtol=0, atol=0)


def test_a_loss_that_is_not_a_number_is_refused_and_nothing_is_learned():
    local = compiled("mlp", "backprop")
    step = graphlocal.train_step(local, loss_fn, optim.SGD(local.parameters(), 0.1))
    before = state(local)
    x, y = batches("mlp")[0]
    with pytest.raises(LocalTrainingError, match="the loss is not a number"):
        step(x * float("nan"), y)
    torch.testing.assert_close(state(local), before, rtol=0, atol=0)


def test_a_subgraph_may_begin_with_group_norm_on_channels_last():
    """Without care torch's CPU kernel ends the process: it wants the gradient of the input to be asked for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 1, 1).to(memory_format=torch.channels_last)
    local = graphlocal.compile(model, example_inputs=(x,), partition=["0", "1", "2", "4"])
    assert list(local.graph.subgraph)[:2] == ["0", "1"]
    local(x).sum().backward()
    assert local.original[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [partial(optim.SGD, lr=0.1, momentum=0.9), partial(optim.Adam, lr=0.01)])
def test_a_gradient_laid_out_otherwise_than_its_parameter_is_applied_right(make):
    ours, theirs = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(3, 5))
    optimizer = make([theirs])
    part = PartialOptimizer(make([ours]), [ours])
    for _ in range(3):
        theirs.grad = torch.randn(3, 5)
        part.step((theirs.grad.t().contiguous().t(),))
        optimizer.step()
        torch.testing.assert_close(ours, theirs)
