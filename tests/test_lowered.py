"""The lowered training graph: ATen operators alone, and the numbers of the eager one."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils import _pytree as pytree
from training import step

import graphlocal
import zoo
from graphlocal.errors import LocalTrainingError
from graphlocal.execution import MANY_SHAPES
from graphlocal.rules import Backprop, KolenPollack, RecLRA
from graphlocal.targets import inductor
from graphlocal.targets.fused_updates import with_updates
from graphlocal.targets.lowered import NotLowered, lower
from graphlocal.targets.training_graph import split

RULES = [Backprop(), RecLRA(error_weights="kp")]
RECURRENT = {"lstm", "lstm_time_first", "lstm_bidirectional", "gru", "gru_time_first"}


def pair(name: str, rule: graphlocal.rules.Rule) -> tuple[graphlocal.LocalModule, graphlocal.LocalModule]:
    """The same model compiled for the lowered and for the eager target."""
    model = zoo.MODELS[name]
    lowered, eager = (
        graphlocal.compile(model.make(), example_inputs=model.example(), rule=rule, target=target)
        for target in ("lowered", "eager")
    )
    return lowered, eager


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", [name for name in zoo.MODELS if name not in RECURRENT])
def test_lowered_step_equals_the_eager_step_bit_for_bit(name, rule):
    lowered, eager = pair(name, rule)
    model = zoo.MODELS[name]
    for seed in (1, 2):
        mine, other = (step(local, model.example(), model.loss, seed) for local in (lowered, eager))
        assert all(map(torch.equal, mine.outputs, other.outputs))
        assert torch.equal(mine.random_state, other.random_state)
        assert all(torch.equal(mine.buffers[n], value) for n, value in other.buffers.items())
        for parameter, gradient in other.gradients.items():
            found = mine.gradients[parameter]
            assert (found is None) == (gradient is None), parameter
            assert gradient is None or same(found, gradient, lowered), parameter
    assert lowered.compiled.execution._passes


def same(found: Tensor, expected: Tensor, lowered: graphlocal.LocalModule) -> bool:
    """Bit for bit, or to rounding where sums are in another order."""
    if not lowered.compiled.execution.shared_errors:
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("rule", [*RULES, KolenPollack()], ids=str)
@pytest.mark.parametrize("name", ["mlp", "small_resnet", "vit", "tied_weight", "several_inputs_outputs", "dropout_mlp"])
def test_fused_steps_leave_the_parameters_of_the_eager_target(name, rule):
    model = zoo.MODELS[name]
    trained, compiled = [], pair(name, rule)
    # Adam would make steps of the rounding of gradients near zero, where sums are in another order.
    kind = torch.optim.SGD if name == "vit" else torch.optim.Adam
    for local in compiled:
        optimizer = kind(local.parameters(), 1e-2)
        run = graphlocal.train_step(local, lambda output, _, loss=model.loss: loss(output), optimizer)
        torch.manual_seed(3)
        for _ in range(20):
            run(model.example(), None)
        trained.append(local.state_dict())
    assert all(same(trained[0][key], value, compiled[0]) for key, value in trained[1].items())


def test_nodes_are_operators_tagged_with_their_action():
    local, _ = pair("small_resnet", RecLRA())
    low = lower(local.compiled.training, zoo.MODELS["small_resnet"].example(), (True,))
    nodes = low.module.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    assert {node.meta["action"] for node in nodes} <= {str(a) for a in local.graph.schedule if a.kind == "F"}
    backward = low.module.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution_backward.default)
    assert {node.meta["action"][0] for node in backward} == {"U"}
    assert not low.module.graph.find_nodes(op="call_module")


def test_updates_come_after_the_last_operator_that_reads_a_parameter():
    local, _ = pair("tied_weight", Backprop())
    low = with_updates(lower(local.compiled.training, zoo.MODELS["tied_weight"].example(), (True,)))
    names = [name for node in low.module.graph.nodes if node.name.startswith("apply_updates") for name in node.args[1]]
    assert sorted(names) == sorted(low.weights)
    forward, _ = split(low)
    assert not [node for node in forward.graph.nodes if node.name.startswith("apply_updates")]


def test_auto_lowers_from_the_second_call_with_the_same_shapes_on():
    local = graphlocal.compile(nn.Linear(4, 2), example_inputs=torch.randn(8, 4), rule="backprop")
    for batch, expected in ((8, 0), (6, 0), (8, 1), (6, 2), (8, 2)):
        local(torch.randn(batch, 4)).sum().backward()
        assert len(local.compiled.execution._passes) == expected
    for batch in range(10, 40):
        for _ in range(2):
            local(torch.randn(batch, 4)).sum().backward()
    assert len(local.compiled.execution._passes) == MANY_SHAPES


def test_empty_batches_and_inputs_that_want_gradients_take_no_place_among_the_shapes():
    local = graphlocal.compile(nn.Linear(4, 2), example_inputs=torch.randn(8, 4), rule="backprop")
    for size in range(1, MANY_SHAPES + 2):
        local(torch.randn(size, 0, 4)).sum().backward()
        local(torch.randn(size, 4, requires_grad=True)).sum().backward()
    for _ in range(2):
        local(torch.randn(8, 4)).sum().backward()
    assert len(local.compiled.execution._passes) == 1


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        h = self.drop(self.trunk(x).tanh())
        self.mean.mul_(0.9).add_(h.detach().mean(0))
        return self.left(h + self.mean), self.right(h)


LOSSES = [lambda out: out[0].square().sum(), lambda out: out[1].square().sum(), lambda out: out[0].sum() + out[1].sum()]


def test_a_loss_on_other_outputs_than_before_gets_its_own_gradients():
    torch.manual_seed(0)
    model, other = TwoHeads(), TwoHeads()
    other.load_state_dict(model.state_dict())
    local = graphlocal.compile(model, example_inputs=torch.randn(4, 6), rule="backprop")
    for i, which in enumerate([0, 0, 1, 1, 1, 2, 0, 2, 2]):
        x = torch.randn(4, 6)
        for module in (local, other):
            module.zero_grad(set_to_none=True)
            torch.manual_seed(i)
            LOSSES[which](module(x)).backward()
        for mine, true in zip(model.parameters(), other.parameters(), strict=True):
            assert (mine.grad is None) == (true.grad is None)
            torch.testing.assert_close(mine.grad, true.grad)
        assert torch.equal(model.mean, other.mean)


def test_an_error_of_other_strides_is_taken():
    torch.manual_seed(0)
    local = graphlocal.compile(nn.Linear(4, 3), example_inputs=torch.randn(5, 4), rule="backprop", target="lowered")
    x, weight = torch.randn(5, 4), local.original.weight
    local(x).backward(torch.randn(3, 5).t())
    assert torch.isfinite(weight.grad).all()
    local.zero_grad()
    local(x).sum().backward()  # an expanded scalar
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 4))


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(x).relu() if x.sum() > 0 else self.a(x)


def test_what_has_no_lowered_form_runs_eagerly_under_auto_and_is_refused_when_asked_for():
    model = nn.Sequential(nn.Linear(4, 4), Chooses(), nn.Linear(4, 2))
    x = torch.randn(6, 4)
    local = graphlocal.compile(model, example_inputs=x, rule="backprop")
    for _ in range(3):
        local(x).sum().backward()
    assert "Python code" in str(local.compiled.execution.not_lowered)
    local = graphlocal.compile(model, example_inputs=x, rule="backprop", target="lowered")
    with pytest.raises(NotLowered, match="opaque leaf"):
        local(x)


@pytest.mark.parametrize("name", sorted(RECURRENT))
def test_auto_leaves_whole_recurrent_layers_to_their_kernels(name):
    model = zoo.MODELS[name]
    local = graphlocal.compile(model.make(), example_inputs=model.example())
    for seed in (1, 2, 3):
        step(local, model.example(), model.loss, seed)
    assert not local.compiled.execution._passes


def test_inputs_that_ask_for_a_gradient_run_eagerly():
    torch.manual_seed(0)
    local = graphlocal.compile(nn.Linear(4, 3), example_inputs=torch.randn(5, 4), rule="backprop", target="lowered")
    x = torch.randn(5, 4, requires_grad=True)
    local(x).sum().backward()
    torch.testing.assert_close(x.grad, local.original.weight.sum(0).expand(5, 4))
    assert not local.compiled.execution._passes


@pytest.mark.parametrize("cast", [nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_a_lowered_graph_that_computes_something_else_is_not_used(cast, monkeypatch):
    def wrong(training, inputs, taken):
        low = lower(training, inputs, taken)
        for node in low.module.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            node.target = torch.ops.aten.tanh.default
        low.module.recompile()
        return low

    monkeypatch.setattr("graphlocal.execution.lower", wrong)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    local = graphlocal.compile(model, example_inputs=torch.randn(6, 4))
    for _ in range(3):
        with cast():
            cross_entropy(local(torch.randn(6, 4)), torch.zeros(6, dtype=torch.long)).backward()
    execution = local.compiled.execution
    assert not execution._passes
    assert bool(execution._refused) == (cast is not nullcontext)  # without autocast it may do, and is tried
    assert execution._refused or "gives another output 0 than the eager one" in str(execution.not_lowered)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_batch_that_holds_no_number_is_no_reason_against_lowering(number):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    local = graphlocal.compile(model, example_inputs=torch.randn(6, 4), target="lowered")
    x = torch.randn(6, 4)
    x[0, 0] = number
    local.check_finite = False
    local(x).sum().backward()
    assert local.compiled.execution._passes


def test_the_check_leaves_buffers_gradients_and_random_state_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    results = []
    for target in ("eager", "lowered"):
        torch.manual_seed(0)
        copy = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
        copy.load_state_dict(model.state_dict())
        local = graphlocal.compile(copy, example_inputs=torch.randn(6, 4), target=target)
        torch.manual_seed(1)
        x = torch.randn(6, 4)
        mse_loss(local(x), x[:, :3]).backward()
        results.append([*copy.buffers(), *(p.grad for p in copy.parameters()), torch.get_rng_state()])
    assert all(map(torch.equal, *results))


class Table(nn.Module):
    """A lookup table whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.table(tokens).mean(1))))


@pytest.mark.parametrize("rule", ["rec-lra", "backprop"])
@pytest.mark.parametrize("target", ["auto", "lowered", "batched", "streams"])
def test_sparse_gradients_are_lowered_too(target, rule):
    tokens, labels = torch.arange(24).view(6, 4) % 20, torch.arange(6) % 3
    trained = []
    for chosen in (target, "eager"):
        torch.manual_seed(0)
        local = graphlocal.compile(Table(), example_inputs=tokens, rule=rule, target=chosen, partition="leaf")
        run = graphlocal.train_step(local, cross_entropy, torch.optim.SGD(local.parameters(), 0.1))
        for _ in range(4):
            run(tokens, labels)
        cross_entropy(local(tokens), labels).backward()
        assert chosen == "eager" or local.compiled.execution._passes
        assert local.original.table.weight.grad.is_sparse
        trained.append([*local.state_dict().values(), local.original.table.weight.grad.to_dense()])
    assert all(map(torch.equal, *trained))
    with torch.no_grad():
        local.original.hidden.weight[0, 0] = torch.nan
    with pytest.raises(LocalTrainingError, match="not a number"):
        cross_entropy(local(tokens), labels).backward()


def test_inductor_refuses_sparse_gradients():
    tokens = torch.arange(24).view(6, 4) % 20
    local = graphlocal.compile(Table(), example_inputs=tokens, target="inductor")
    with pytest.raises(NotLowered, match=r"gradient of table.weight is sparse.*\n.*sparse=False"):
        local(tokens)


@pytest.mark.parametrize("target", ["eager", "lowered"])
def test_a_backward_pass_that_failed_half_way_is_not_begun_again(target):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    local = graphlocal.compile(model, example_inputs=torch.randn(6, 4), target=target)
    loss = local(torch.randn(6, 4)).sum()
    maps = local.error_weights._buffers
    right = dict(maps)
    maps.update({name: torch.zeros(2, 2) for name in maps})
    with pytest.raises(RuntimeError, match="shape"):
        loss.backward(retain_graph=False)
    maps.update(right)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    local(torch.randn(6, 4)).sum().backward()


COMPILED = {"mlp", "dropout_mlp", "tied_weight", "small_resnet"}
DEEP = {"resnet18", "densenet", "googlenet", "googlenet_aux", "mobilenet_v2", "mobilenet_v3"}
"""With BatchNorm over so few samples that rounding grows a thousandfold within a step: few steps, double precision."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [n if n in COMPILED else pytest.param(n, marks=pytest.mark.exhaustive) for n in zoo.MODELS if n not in RECURRENT],
)
def test_inductor_gives_the_parameters_of_the_eager_target(name, monkeypatch):
    """With the random numbers of the eager target, and with an error pass in as many pieces as there may be."""
    monkeypatch.setattr(inductor, "LEAST", 1)
    dtype, zoo_model = torch.float64 if name in DEEP else torch.float32, zoo.MODELS[name]
    x = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, zoo_model.example())
    trained = []
    for target in ("eager", "inductor"):
        local = graphlocal.compile(zoo_model.make().to(dtype), example_inputs=x, rule=RecLRA(), target=target)
        run = graphlocal.train_step(
            local, lambda output, _: zoo_model.loss(output), torch.optim.SGD(local.parameters(), 0.05)
        )
        torch.manual_seed(3)
        for _ in range(5 if name in DEEP else 20):
            run(x, None)
        last = step(local, x, zoo_model.loss)
        trained.append([*local.state_dict().values(), *last.gradients.values(), *last.outputs, last.random_state])
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-5)
