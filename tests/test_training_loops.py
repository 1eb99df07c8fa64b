"""`loss.backward()` on a compiled model in every kind of training loop, and what it leaves behind."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
from typing import Any

import pytest
import torch
from test_runtime import LEARNED, RULES, assert_oracle, gradients, pair, state
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import graphlocal
import zoo
from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.rules import RecLRA

SCALE = 65536.0
every_rule = pytest.mark.parametrize("rule", [*RULES, LEARNED], ids=["backprop", "fixed E", "learned E"])


def collected(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def assert_same(found: dict, expected: dict, factor: float = 1.0, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], None if gradient is None else gradient * factor, **tolerance)


# Mixed precision and loss scaling


@pytest.mark.parametrize("name", ["small_resnet", "transformer_encoder"])
def test_autocast_keeps_the_oracle(name):
    local, eager, inputs = pair(name, dtype=torch.float32)

    def loss(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = module(*inputs)
            assert output.dtype == torch.bfloat16
            value = zoo.classify(output)
        assert value.dtype == torch.float32
        return value

    for module in (local, eager):
        loss(module).backward()
    for p, q in zip(local.parameters(), eager.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=0.02, atol=0.02 * float(q.grad.abs().max()))


@pytest.mark.parametrize("rule", ["rec-lra", LEARNED, RecLRA(derivative=True, depth=2)], ids=str)
def test_autocast_gives_finite_local_updates_near_those_without(rule):
    local, _, inputs = pair("small_resnet", rule, torch.float32)
    exact = gradients(local, inputs, zoo.classify)
    exact = {name: gradient.clone() for name, gradient in exact.items()}
    with torch.autocast("cpu", torch.bfloat16):
        near = gradients(local, inputs, zoo.classify)
    largest = max(float(gradient.norm()) for gradient in exact.values())
    for name, gradient in exact.items():
        assert near[name].dtype == gradient.dtype
        if gradient.norm() < 1e-6 * largest:  # a bias before BatchNorm, whose update is rounding alone
            assert near[name].norm() < 0.02 * largest
        else:
            assert nn.functional.cosine_similarity(near[name].flatten(), gradient.flatten(), dim=0) > 0.9, name


@every_rule
def test_a_scaled_loss_scales_the_gradients(rule):
    local, _, inputs = pair("small_resnet", rule)
    gradients(local, inputs, zoo.classify)
    expected = collected(local)
    gradients(local, inputs, lambda output: SCALE * zoo.classify(output))
    found = collected(local)
    for name in [n for n in expected if n.startswith("error_weights.") and rule is LEARNED]:
        torch.testing.assert_close(found.pop(name), expected.pop(name) * SCALE)
    assert_same(found, expected, SCALE)


def test_a_grad_scaler_takes_the_same_step_and_skips_an_overflow():
    local, eager, inputs = pair("mlp", dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for module in (local, eager):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        scaler.scale(zoo.classify(module(*inputs))).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(state(local.original), state(eager))
    before = state(local)
    optimizer = torch.optim.SGD(local.parameters(), 0.1)
    scaler.scale(zoo.classify(local(*inputs)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert_same(state(local), before)


@every_rule
def test_an_infinite_output_error_passes_and_one_that_is_not_a_number_raises(rule):
    local, _, inputs = pair("mlp", rule)
    gradients(local, inputs, lambda output: output.sum() * float("inf"))
    assert any(not p.grad.isfinite().all() for p in local.original.parameters())
    with pytest.raises(LocalTrainingError, match="error of the output is not a number") as caught:
        local(*inputs).sum().mul(float("nan")).backward()
    assert "local.check_finite = False" in str(caught.value)
    local.check_finite = False
    local(*inputs).sum().mul(float("nan")).backward()


# Gradients


@every_rule
def test_gradients_accumulate_over_batches(rule):
    local, _, _ = pair("mlp", rule)
    batches = [(zoo.normal(3, 6, seed=seed).double(),) for seed in (1, 2)]
    each = []
    for inputs in batches:
        gradients(local, inputs, zoo.classify)
        each.append(collected(local))
    local.zero_grad()
    for inputs in batches:
        zoo.classify(local(*inputs)).backward()
    assert_same(collected(local), {name: each[0][name] + each[1][name] for name in each[0]})
    local.zero_grad()
    outputs = [local(*inputs) for inputs in batches]  # both batches under way at one time
    sum(zoo.classify(output) for output in outputs).backward()
    assert_same(collected(local), {name: each[0][name] + each[1][name] for name in each[0]})


@pytest.mark.parametrize("rule", RULES)
def test_zero_grad_and_clipping_work_as_ever(rule):
    local, _, inputs = pair("mlp", rule)
    gradients(local, inputs, zoo.classify)
    norm = torch.nn.utils.clip_grad_norm_(local.parameters(), 1e-3)
    assert norm > 1e-3
    total = torch.stack([p.grad.square().sum() for p in local.parameters()]).sum().sqrt()
    assert total.item() == pytest.approx(1e-3, rel=1e-3)
    local.zero_grad()
    assert all(p.grad is None for p in local.original.parameters())


@every_rule
def test_a_retained_graph_gives_the_same_gradients_again(rule):
    local, _, inputs = pair("small_resnet", rule)
    loss = zoo.classify(local(*inputs))
    loss.backward(retain_graph=True)
    once = collected(local)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(collected(local), once, 3.0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_second_backward_through_one_output_says_what_to_do():
    local, _, inputs = pair("mlp")
    output = local(*inputs)
    output.sum().backward()
    with pytest.raises(LocalTrainingError, match="backward was called a second time") as caught:
        output.square().sum().backward()
    assert "retain_graph=True" in str(caught.value)


def test_hooks_on_parameters_run_and_may_change_the_gradient():
    local, _, inputs = pair("mlp")
    weight, bias = local.original[0].weight, local.original[0].bias
    expected = gradients(local, inputs, zoo.classify)["0.weight"].clone()
    seen: list[Tensor] = []
    weight.register_hook(lambda gradient: 2 * gradient)
    bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    gradients(local, inputs, zoo.classify)
    assert torch.equal(weight.grad, 2 * expected)
    assert len(seen) == 1
    assert torch.equal(seen[0], bias.grad)


def test_autograd_grad_gives_the_local_updates_and_leaves_grad_alone():
    local, eager, inputs = pair("mlp")
    found = torch.autograd.grad(zoo.classify(local(*inputs)), list(local.parameters()))
    expected = torch.autograd.grad(zoo.classify(eager(*inputs)), list(eager.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    assert all(p.grad is None for p in local.parameters())


@pytest.mark.parametrize("name", ["dropout_mlp", "transformer_dropout"])
def test_dropout_under_a_fixed_seed_equals_eager(name):
    local, eager, inputs = pair(name)
    assert_oracle(local, eager, inputs, zoo.classify)
    torch.manual_seed(3)
    ours = local(*inputs)
    torch.manual_seed(3)
    assert torch.equal(ours, eager(*inputs))
    assert not torch.equal(ours, local(*inputs))


# The model changes after it was compiled


def test_freezing_and_unfreezing_after_compile_is_followed():
    local, eager, inputs = pair("small_resnet")
    for frozen in (["0", "1"], ["3"], [], ["5"]):
        for model in (local.original, eager):
            model.requires_grad_(True)
            for name in frozen:
                model.get_submodule(name).requires_grad_(False)
        assert_oracle(local, eager, inputs, zoo.classify)


def test_a_model_that_is_frozen_altogether_runs_as_it_is():
    local, eager, inputs = pair("small_resnet")
    local.original.requires_grad_(False)
    output = local(*inputs)
    assert torch.equal(output, eager(*inputs))
    assert not output.requires_grad


def test_a_normalization_put_into_evaluation_mode_after_compile_is_followed():
    local, eager, inputs = pair("small_resnet")
    assert_oracle(local, eager, inputs, zoo.classify)
    for model in (local.original, eager):
        model[1].eval()
        model[3].bn1.eval()
    assert_oracle(local, eager, inputs, zoo.classify)


@pytest.mark.parametrize("rule", RULES)
def test_a_replaced_layer_is_followed(rule):
    local, eager, inputs = pair("small_resnet", rule)
    head = nn.Sequential(nn.Linear(8, 3), nn.Tanh()).double()
    local.original[-1], eager[-1] = head, copy.deepcopy(head)
    assert torch.equal(local(*inputs), eager(*inputs))
    if rule == "backprop":
        assert_oracle(local, eager, inputs, zoo.classify)
    else:
        assert all(g is not None for g in gradients(local, inputs, zoo.classify).values())
    assert "tanh" in str(local.graph)


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_compiling_under_a_context_leaves_no_trace_of_it(context):
    model = zoo.MODELS["small_resnet"]
    with context():
        local = graphlocal.compile(model.make(), example_inputs=model.example(), rule="backprop")
    assert_oracle(local, model.make(), model.example(), zoo.classify)


def test_a_model_compiled_in_evaluation_mode_stays_there_until_it_trains():
    model = zoo.MODELS["small_resnet"]
    local = graphlocal.compile(model.make().eval(), example_inputs=model.example(), rule="backprop")
    assert not any(module.training for module in local.modules())
    assert torch.equal(local(*model.example()), model.make().eval()(*model.example()))
    assert_oracle(local.train(), model.make(), model.example(), zoo.classify)


def test_two_compiled_forms_of_one_model_share_its_parameters():
    model = zoo.MODELS["mlp"].make(torch.float64)
    inputs = zoo.MODELS["mlp"].example(torch.float64)
    exact, local = (graphlocal.compile(model, example_inputs=inputs, rule=rule) for rule in RULES)
    first, second = (gradients(module, inputs, zoo.classify) for module in (exact, local))
    assert_same({n: g for n, g in first.items() if n.startswith("5.")}, {})
    assert torch.equal(model[-1].weight.grad, second["4.weight"])
    with torch.no_grad():
        model[-1].weight.mul_(2)
    assert torch.equal(exact(*inputs), local(*inputs))


def test_an_exception_between_forward_and_backward_leaves_the_model_usable():
    local, eager, inputs = pair("small_resnet")

    def loss(output: Tensor) -> Tensor:
        raise KeyboardInterrupt

    for model in (local, eager):
        with pytest.raises(KeyboardInterrupt):
            loss(model(*inputs))
    assert_oracle(local, eager, inputs, zoo.classify)


# Inside a bigger model


class Bigger(nn.Module):
    """A layer before and a layer after the model in the middle."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.before, self.middle, self.after = nn.Linear(5, 6), middle, nn.Linear(zoo.CLASSES, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.relu(self.middle(torch.tanh(self.before(x)))))


@pytest.mark.parametrize("frozen", ["", "before", "after", "middle.0", "middle"])
def test_inside_a_bigger_model_every_gradient_is_autograds(frozen):
    local, eager, _ = pair("mlp", partition="leaf")
    ours, theirs = (Bigger(middle).double() for middle in (local, eager))
    theirs.load_state_dict({name.replace("original.", ""): value for name, value in ours.state_dict().items()})
    if frozen:
        theirs.get_submodule(frozen).requires_grad_(False)
        ours.get_submodule(frozen.replace("middle.", "middle.original.")).requires_grad_(False)
    x = zoo.normal(3, 5).double()
    if frozen == "middle.0":
        with pytest.raises(InputError, match="but none would reach it"):
            ours(x)
        return
    for model in (ours, theirs):
        zoo.classify(model(x)).backward()
    assert_same({n.replace("original.", ""): g for n, g in collected(ours).items()}, collected(theirs))


# Data parallel, over gloo on this machine


def distributed_step(rank: int, ranks: int, folder: str, rule: Any) -> None:
    """Train on this rank's share of a batch in DistributedDataParallel, and save the gradients of rank 0."""
    torch.manual_seed(rank)  # the error weights of rank 0 are everyone's
    store = torch.distributed.FileStore(f"{folder}/store", ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        local, _, _ = pair("mlp", rule)
        parallel = nn.parallel.DistributedDataParallel(local)
        for seed in (1, 2):
            x = zoo.normal(4, 6, seed=seed).double().chunk(ranks)[rank]
            parallel.zero_grad()
            parallel(x).square().mean().backward()
        if rank == 0:
            torch.save([p.grad for p in local.parameters()], f"{folder}/gradients")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built in")
@pytest.mark.parametrize(
    ("ranks", "rule"), [(1, "backprop"), (1, "rec-lra"), pytest.param(2, LEARNED, marks=pytest.mark.slow)], ids=str
)
def test_data_parallel_training_averages_the_gradients_of_its_ranks(ranks, rule, tmp_path):
    if ranks > 1:
        torch.multiprocessing.spawn(distributed_step, (ranks, str(tmp_path), rule), nprocs=ranks)
    else:
        distributed_step(0, 1, str(tmp_path), rule)
    torch.manual_seed(0)
    local, _, _ = pair("mlp", rule)
    parts = []
    for x in zoo.normal(4, 6, seed=2).double().chunk(ranks):
        gradients(local, (x,), lambda output: output.square().mean())
        parts.append(collected(local))
    found = dict(zip(parts[0], torch.load(tmp_path / "gradients"), strict=True))
    assert_same(found, {name: sum(part[name] for part in parts) / ranks for name in found})


# Memory


class Saved:
    """The storages that autograd saves while it is open, but for those of the given tensors."""

    def __init__(self, *known: Tensor) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.storages: list[StorageWeakRef] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self.known and tensor.numel():
            self.storages.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor.detach()

    @property
    def alive(self) -> int:
        return sum(not storage.expired() for storage in self.storages)


@every_rule
@pytest.mark.parametrize("target", ["eager", "lowered"])
@pytest.mark.parametrize("end", ["backward", "drop"])
def test_saved_activations_are_released(rule, end, target):
    local, _, inputs = pair("small_resnet", rule, target=target)
    gradients(local, inputs, zoo.classify)
    saved = Saved(*inputs, *local.parameters(), *local.buffers())
    with saved.hooks:
        output = local(*inputs)
    if target == "lowered":
        list(map(saved.pack, output.grad_fn.step.run.saved))
    assert saved.alive > 10
    gc.disable()  # released at once, not by the garbage collector
    try:
        if end == "backward":
            loss = zoo.classify(output)
            loss.backward(retain_graph=True)
            assert saved.alive > 10
            loss.backward()
        else:
            del output
        assert saved.alive == 0
    finally:
        gc.enable()


# What training loops look at


class Counting(graphlocal.LocalModule):
    """A class of the user's on top."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().forward(*args, **kwargs)


def test_a_class_on_top_stays_what_it_is():
    local = Counting.of(graphlocal.compile(zoo.MODELS["mlp"].make(), example_inputs=torch.randn(4, 6)).compiled)
    for copied in (local, copy.deepcopy(local), pickle.loads(pickle.dumps(local))):
        calls = copied.calls
        copied(torch.randn(4, 6)).sum().backward()
        assert isinstance(copied, Counting)
        assert copied.calls == calls + 1


@pytest.mark.parametrize("how", ["made", "copied", "pickled"])
def test_a_compiled_model_shows_the_signature_of_the_model(how):
    """transformers' Trainer hands on the columns that `forward` names, and finds labels by the class's `forward`."""
    module = Bigger(zoo.MODELS["mlp"].make())
    local = graphlocal.compile(module, example_inputs=torch.randn(4, 5))
    if how != "made":
        local = copy.deepcopy(local) if how == "copied" else pickle.loads(pickle.dumps(local))
    assert inspect.signature(local.forward) == inspect.signature(module.forward)
    assert list(inspect.signature(type(local).forward).parameters) == ["self", "x"]
    assert isinstance(local, graphlocal.LocalModule)
    assert type(local).__name__ == "LocalModule"
    assert type(local) is not graphlocal.LocalModule
    local(torch.randn(4, 5)).sum().backward()
    assert all(p.grad is not None for p in local.parameters())
