"""With rule="backprop" the compiled model computes what the eager one does, and its updates are the gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from training import assert_same_forward, assert_same_gradients, step

import graphlocal
import zoo
from graphlocal.ir import LocalGraph

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (torch.float64, torch.float32)]
SEGMENTS = (2, 4)


def compiled(model: zoo.ZooModel, dtype: torch.dtype = torch.float64, **options) -> graphlocal.LocalModule:
    options = {"rule": "backprop"} | options
    return graphlocal.compile(model.make(dtype), example_inputs=model.example(dtype), **options)


def layers_with_parameters(graph: LocalGraph) -> int:
    parameters = {state.name for state in graph.states if state.kind == "parameter"}
    return sum(not parameters.isdisjoint(op.states) for op in graph.operations)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", zoo.models())
def test_updates_equal_the_gradients_of_autograd_for_every_partition(model, dtype):
    true = step(model.make(dtype), model.example(dtype), model.loss)
    local = compiled(model, dtype, partition="auto")
    segments = [k for k in SEGMENTS if k <= layers_with_parameters(local.graph)]
    for partition in ("auto", "leaf", *segments):
        if partition != "auto":
            local = compiled(model, dtype, partition=partition)
        found = step(local, model.example(dtype), model.loss)
        assert_same_forward(found, true)
        assert_same_gradients(found.gradients, true.gradients)
        if partition in segments:
            assert list(local.graph.subgraph) == [f"segment{i}" for i in range(1, partition + 1)]


@pytest.mark.parametrize("model", [pytest.param(m, id=m.name) for m in zoo.HARD.values()])
def test_updates_of_hard_models_equal_the_gradients_of_autograd_where_they_compile(model):
    try:
        local = compiled(model)
    except graphlocal.GraphLocalError:
        assert model.expect in ("refused", "either")
        return
    assert model.expect in ("opaque", "either")
    assert model.expect == "either" or local.compiled.traced.opaque
    true = step(model.make(torch.float64), model.example(torch.float64), model.loss)
    found = step(local, model.example(torch.float64), model.loss)
    assert_same_forward(found, true)
    assert_same_gradients(found.gradients, true.gradients)


@pytest.mark.parametrize("model", zoo.models(include=("frozen",)))
def test_frozen_parameters_get_no_gradient(model):
    local = compiled(model)
    gradients = step(local, model.example(torch.float64), model.loss).gradients
    frozen = {name for name, p in local.original.named_parameters() if not p.requires_grad}
    assert frozen
    assert {name for name, gradient in gradients.items() if gradient is None} == frozen


def test_unused_parameters_get_no_gradient():
    model = zoo.MODELS["unused_parameter"]
    gradients = step(compiled(model), model.example(torch.float64), model.loss).gradients
    unused = {name for name, gradient in gradients.items() if gradient is None}
    assert unused == {"second.weight", "second.bias"}


@pytest.mark.parametrize("model", zoo.models(include=("random", "buffer"), exclude=("large",)))
def test_three_steps_of_sgd_stay_equal_to_those_of_autograd(model):
    """Buffers that the forward writes and random numbers follow the eager model from step to step."""
    eager, local = model.make(torch.float64), compiled(model)
    optimizers = [torch.optim.SGD(module.parameters(), 0.05) for module in (eager, local)]
    for seed in range(3):
        true, found = (step(module, model.example(torch.float64), model.loss, seed) for module in (eager, local))
        for name, buffer in true.buffers.items():
            torch.testing.assert_close(found.buffers[name], buffer, rtol=1e-9, atol=1e-9)
        assert_same_gradients(found.gradients, true.gradients)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize(
    "model", zoo.models(include=("mlp", "several-inputs", "attention"), exclude=("embedding", "graph"))
)
def test_gradients_of_the_inputs_equal_those_of_autograd(model):
    found = []
    for module in (model.make(torch.float64), compiled(model)):
        inputs = model.example(torch.float64)
        leaves = [leaf for leaf in zoo.leaves(inputs) if leaf.is_floating_point()]
        for leaf in leaves:
            leaf.requires_grad_()
        torch.manual_seed(0)
        model.loss(zoo.call(module, inputs)).backward()
        found.append({str(i): leaf.grad for i, leaf in enumerate(leaves)})
    assert found[1]
    assert_same_gradients(found[1], found[0])


# Other batch sizes and shapes


def batch_axis(model: zoo.ZooModel) -> int:
    return 1 if "time-first" in model.tags else 0


def larger(model: zoo.ZooModel, dtype: torch.dtype, rows: int = 2) -> tuple | dict:
    """The example inputs with further samples; the edges of a graph stay as they are."""

    def grown(x: Tensor, first: bool) -> Tensor:
        if "gather" in model.tags and not first:
            return x
        axis = batch_axis(model)
        more = x.narrow(axis, 0, rows)
        return torch.cat([x, more * 2 if x.is_floating_point() else more], axis)

    example = model.example(dtype)
    if isinstance(example, dict):
        return {key: grown(x, True) for key, x in example.items()}
    return tuple(grown(x, i == 0) for i, x in enumerate(example))


def loss_of_any_batch(model: zoo.ZooModel):
    return zoo.fit if model.name == "language_model" else model.loss


@pytest.mark.parametrize("model", zoo.models(exclude=("googlenet_aux", "mobilenet_v3")))
def test_another_batch_size_is_exact_and_compiles_anew_only_where_the_trace_fixed_it(model):
    local, loss = compiled(model), loss_of_any_batch(model)
    inputs = larger(model, torch.float64)
    true = step(model.make(torch.float64), inputs, loss)
    found = step(local, inputs, loss)
    assert_same_forward(found, true)
    assert_same_gradients(found.gradients, true.gradients)
    first = local._cache[-1][1]
    is_open = (0, batch_axis(model)) in first.symbolic
    assert is_open == ("time-first" not in model.tags)
    assert local._recompilations == (0 if is_open else 1)


@pytest.mark.parametrize("name", ["gru_unrolled", "lstm", "language_model", "transformer_encoder", "unet"])
def test_another_size_than_the_batch_compiles_anew_once_and_is_exact(name):
    model = zoo.MODELS[name]
    local, eager = compiled(model), model.make(torch.float64)
    (example,) = model.example(torch.float64)
    longer = torch.cat([example, example[:, :, :4] if name == "unet" else example[:, :4]], 2 if name == "unet" else 1)
    for inputs, recompilations in ((longer, 1), (example, 1), (longer, 1)):
        true, found = (step(module, (inputs,), zoo.fit) for module in (eager, local))
        assert_same_forward(found, true)
        assert_same_gradients(found.gradients, true.gradients)
        assert local._recompilations == recompilations


def test_freezing_or_evaluating_a_part_compiles_anew_and_is_exact():
    model = zoo.MODELS["small_resnet"]
    local, eager = compiled(model), model.make(torch.float64)
    for module in (local.original, eager):
        module[3].requires_grad_(False)
        module[1].eval()
    true, found = (step(module, model.example(torch.float64), model.loss) for module in (eager, local))
    assert_same_forward(found, true)
    assert_same_gradients(found.gradients, true.gradients)
    assert local._recompilations == 1


def test_a_parameter_of_two_subgraphs_gets_the_sum_of_their_updates():
    for name in ("called_twice", "tied_weight", "siamese", "gru_unrolled", "language_model"):
        graph = compiled(zoo.MODELS[name], partition="leaf").graph
        users = [sum(state in graph.trainable(subgraph) for subgraph in graph.subgraphs) for state in graph.state]
        assert max(users) > 1, name


def test_a_normalization_that_writes_its_buffers_without_gradients_is_exact():
    """Spectral normalization: the power iteration runs under no_grad and changes buffers."""
    torch.manual_seed(0)
    first = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(6, 5))
    eager = torch.nn.Sequential(first, torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
    inputs = (zoo.normal(3, 6).double(),)
    local = graphlocal.compile(copy.deepcopy(eager), example_inputs=inputs, rule="backprop")
    for seed in range(2):
        true, found = step(eager, inputs, zoo.classify, seed), step(local, inputs, zoo.classify, seed)
        assert_same_forward(found, true)
        assert_same_gradients(found.gradients, true.gradients)
        for name, buffer in true.buffers.items():
            torch.testing.assert_close(found.buffers[name.removeprefix("original.")], buffer, rtol=1e-12, atol=0)


class ReturnsItsStates(torch.nn.Module):
    """`fc.weight` and `fc_weight` have one identifier; a parameter and a buffer are returned as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fc_weight = torch.nn.Linear(4, 3), torch.nn.Parameter(torch.randn(3))
        self.register_buffer("offset", torch.randn(3))

    def forward(self, x):
        return self.fc(x) * self.fc_weight, self.fc_weight, self.offset


@pytest.mark.parametrize("target", ["eager", "lowered"])
def test_states_that_the_model_returns_get_their_gradient(target):
    torch.manual_seed(0)
    model, true = ReturnsItsStates(), ReturnsItsStates()
    true.load_state_dict(model.state_dict())
    x = torch.randn(5, 4)
    local = graphlocal.compile(model, example_inputs=x, rule="backprop", target=target)
    for module in (local, true):
        y, weight, offset = module(x)
        assert torch.equal(offset, true.offset)
        (y.square().sum() + (weight * offset).sum()).backward()
    for mine, other in zip(model.parameters(), true.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


class CallsItsInputsLikeTheStep(torch.nn.Module):
    """Its inputs have the names of the training graph's own arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)

    def forward(self, loss, apply, retain=None, errors=None):
        return self.second(torch.tanh(self.first(loss + apply * retain)) - errors)


@pytest.mark.parametrize("target", ["eager", "lowered", "streams"])
def test_inputs_may_be_called_like_the_arguments_of_the_training_graph(target):
    torch.manual_seed(0)
    model, true = CallsItsInputsLikeTheStep(), CallsItsInputsLikeTheStep()
    true.load_state_dict(model.state_dict())
    inputs = {name: torch.randn(6, width) for name, width in (("loss", 4), ("apply", 4), ("retain", 4), ("errors", 5))}
    local = graphlocal.compile(model, example_inputs=inputs, rule="backprop", target=target)
    for module in (local, true):
        module(**inputs).square().sum().backward()
    for mine, other in zip(model.parameters(), true.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    step = graphlocal.train_step(
        local, lambda out, y: (out - y).square().mean(), torch.optim.SGD(model.parameters(), 0.1)
    )
    losses = [float(step(inputs, torch.zeros(6, 3))) for _ in range(3)]
    assert losses[2] < losses[0]
