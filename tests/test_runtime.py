"""A compiled model in its user's hands: `LocalModule` as an `nn.Module`, in any training loop."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.rules import RecLRA

RULES = ["backprop", "rec-lra"]
LEARNED = RecLRA(error_weights="kp")


def pair(name: str, rule: Any = "backprop", dtype: torch.dtype = torch.float64, **options: Any) -> tuple:
    """A compiled zoo model, an equal eager one, and their inputs."""
    model = zoo.MODELS[name]
    local = graphlocal.compile(model.make(dtype), example_inputs=model.example(dtype), rule=rule, **options)
    return local, model.make(dtype), model.example(dtype)


def gradients(module: nn.Module, inputs: tuple | dict, loss: Callable[[Any], Tensor]) -> dict[str, Tensor | None]:
    """The gradients of one step from the same random state, by the model's own names."""
    torch.manual_seed(1)
    module.zero_grad()
    loss(zoo.call(module, inputs)).backward()
    return {name.removeprefix("original."): p.grad for name, p in module.named_parameters()}


def assert_oracle(local: nn.Module, eager: nn.Module, inputs: tuple | dict, loss: Callable, **tolerance: float) -> None:
    """One step of both: the same gradients and buffers."""
    expected, found = gradients(eager, inputs, loss), gradients(local, inputs, loss)
    assert any(gradient is not None for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    buffers = dict(eager.named_buffers())
    for name, buffer in local.original.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# As an nn.Module


@pytest.mark.parametrize("rule", RULES)
def test_eval_is_the_original_model(rule):
    local, eager, inputs = pair("small_resnet", rule)
    assert local.eval() is local
    assert not any(module.training for module in local.modules())
    output = local(*inputs)
    assert torch.equal(output, eager.eval()(*inputs))
    assert output.grad_fn is not None
    assert "LocalUpdates" not in type(output.grad_fn).__name__
    local.train()
    assert all(module.training for module in local.original.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_training_mode_is_the_original_model_with_its_buffers(context):
    local, eager, inputs = pair("small_resnet")
    with context():
        assert torch.equal(local(*inputs), eager(*inputs))
    assert all(torch.equal(value, state(eager)[name]) for name, value in state(local.original).items())
    assert local.original[1].num_batches_tracked == 1


@pytest.mark.parametrize("rule", RULES)
def test_training_gives_the_original_outputs_bit_by_bit(rule):
    local, eager, inputs = pair("small_resnet", rule)
    assert torch.equal(local(*inputs), eager(*inputs))


def test_the_users_model_object_is_trained_in_place():
    model = zoo.MODELS["mlp"].make()
    owned, before = list(model.parameters()), state(model)
    local = graphlocal.compile(model, example_inputs=zoo.vectors())
    optimizer = torch.optim.SGD(local.parameters(), 0.1)
    zoo.classify(local(*zoo.vectors())).backward()
    optimizer.step()
    assert local.original is model
    assert all(p is q for p, q in zip(owned, model.parameters(), strict=True))
    assert all(not torch.equal(value, before[name]) for name, value in state(model).items())


def test_parameters_are_the_models_and_then_the_learned_error_weights():
    model = zoo.MODELS["mlp"].make()
    local = graphlocal.compile(model, example_inputs=zoo.vectors(), rule=LEARNED)
    own = list(model.parameters())
    assert all(p is q for p, q in zip(own, local.parameters(), strict=False))
    assert [p.shape for p in list(local.parameters())[len(own) :]] == [(8, 4), (7, 4)]
    fixed, _, _ = pair("mlp", "rec-lra")
    assert len(list(fixed.parameters())) == len(own)
    assert len(list(fixed.error_weights.buffers())) == 2


@pytest.mark.parametrize("rule", ["backprop", "rec-lra", LEARNED], ids=["backprop", "fixed E", "learned E"])
def test_state_dict_round_trip_gives_the_same_updates(rule):
    local, eager, inputs = pair("small_resnet", rule)
    local(*inputs)
    expected = {f"original.{name}" for name in eager.state_dict()}
    expected |= {f"error_weights.{name}" for name in local.error_weights.state_dict()}
    assert set(local.state_dict()) == expected
    saved = io.BytesIO()
    torch.save(local.state_dict(), saved)
    saved.seek(0)
    torch.manual_seed(5)
    model = zoo.MODELS["small_resnet"].make(torch.float64, seed=3)
    other = graphlocal.compile(model, example_inputs=inputs, rule=rule)
    other.load_state_dict(torch.load(saved))
    assert gradients(local, inputs, zoo.classify).keys() == gradients(other, inputs, zoo.classify).keys()
    for p, q in zip(local.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    eager.load_state_dict(local.original.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("rule", ["backprop", LEARNED], ids=["backprop", "learned E"])
def test_a_copy_learns_the_same_and_on_its_own(clone, rule):
    local, _, inputs = pair("small_resnet", rule)
    other = clone(local)
    expected, found = (gradients(module, inputs, zoo.classify) for module in (local, other))
    assert all(torch.equal(gradient, found[name]) for name, gradient in expected.items())
    assert str(other.graph) == str(local.graph)
    assert not {id(p) for p in local.parameters()} & {id(p) for p in other.parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "small_resnet"])
def test_to_another_dtype_keeps_the_oracle(name, dtype):
    local, eager, inputs = pair(name, dtype=torch.float32)
    local, eager = (local.half(), eager.half()) if dtype == torch.float16 else (local.to(dtype), eager.to(dtype))
    inputs = tuple(zoo.cast(x, dtype) for x in inputs)
    assert_oracle(local, eager, inputs, zoo.classify, rtol=1e-9 if dtype == torch.float64 else 0.05, atol=2e-3)


def test_to_another_dtype_moves_the_error_weights():
    local, _, inputs = pair("mlp", LEARNED, torch.float32)
    before = [p.clone() for p in local.error_weights.parameters()]
    local.double()
    gradients(local, tuple(x.double() for x in inputs), zoo.classify)
    for old, new in zip(before, local.error_weights.parameters(), strict=True):
        assert torch.equal(old.double(), new)
        assert new.grad.dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["small_resnet", "lstm"])
def test_to_cuda_keeps_the_oracle(name):
    local, eager, inputs = pair(name)
    inputs = tuple(x.cuda() for x in inputs)
    assert_oracle(local.to("cuda"), eager.cuda(), inputs, zoo.classify, rtol=1e-7, atol=1e-9)


def test_it_prints_with_its_rule_and_the_model_inside():
    local, _, _ = pair("mlp")
    assert "Backprop" in repr(local)
    assert "Linear(in_features=6" in repr(local)


# Calls and outputs


@pytest.mark.parametrize(
    "name", ["keyword_none", "language_model_loss", "several_inputs_outputs", "nested_output", "attention_weights"]
)
def test_structured_calls_and_outputs_keep_the_oracle(name):
    local, eager, inputs = pair(name)
    loss = zoo.MODELS[name].loss
    assert_oracle(local, eager, inputs, loss)
    ours, theirs = zoo.call(local, inputs), zoo.call(eager, inputs)
    assert type(ours) is type(theirs)
    assert all(torch.equal(a, b) for a, b in zip(zoo.leaves(ours), zoo.leaves(theirs), strict=True))


@pytest.mark.parametrize("inputs", [{"x": 0}, {"x": 0, "mask": None}, {"x": 0, "scale": 1}], ids=str)
def test_optional_inputs_may_come_and_go(inputs):
    local, eager, (x, mask) = *pair("keyword_none")[:2], zoo.MODELS["keyword_none"].example(torch.float64).values()
    given = {"x": x, "mask": mask, "scale": torch.tensor(2.0, dtype=x.dtype)}
    inputs = {key: value if value is None else given[key] for key, value in inputs.items()}
    assert_oracle(local, eager, inputs, zoo.classify)


class Pair(NamedTuple):
    scores: Tensor
    hidden: Tensor


@dataclass
class Record:
    scores: Tensor
    hidden: Tensor


torch.utils._pytree.register_dataclass(Record)


class Returns(zoo.Layered):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        z = torch.tanh(self.first(x)) * scale
        return self.kind(self.head(z), self.second(z))


@pytest.mark.parametrize("kind", [Pair, Record])
def test_named_outputs_keep_their_type_and_a_loss_may_use_only_some(kind):
    model = Returns(kind).double()
    inputs = (zoo.normal(3, 6).double(),)
    local = graphlocal.compile(copy.deepcopy(model), example_inputs=inputs, rule="backprop")
    assert isinstance(local(*inputs), kind)
    assert_oracle(local, model, inputs, lambda output: zoo.classify(output.scores))
    assert local.original.second.weight.grad is None
    assert_oracle(local, model, inputs, lambda output: output.hidden.square().mean() + zoo.classify(output.scores))


def test_a_constant_input_may_change():
    model = Returns(Pair).double()
    x = zoo.normal(3, 6).double()
    local = graphlocal.compile(copy.deepcopy(model), example_inputs=(x, 2.0), rule="backprop")
    for inputs in ((x, 2.0), (x, 3.0), {"x": x, "scale": 3.0}, (x,)):
        assert torch.equal(zoo.call(local, inputs).scores, zoo.call(model, inputs).scores)
        assert_oracle(local, model, inputs, lambda output: output.hidden.square().mean())


@pytest.mark.parametrize("rule", RULES)
def test_the_batch_size_may_change_down_to_one_without_recompiling(rule):
    local, eager, _ = pair("transformer_encoder", rule)
    compiled = local.compiled
    for batch in (7, 2, 1):
        inputs = (zoo.normal(batch, 5, 8).double(),)
        assert torch.equal(local(*inputs), eager(*inputs))
        if rule == "backprop":
            assert_oracle(local, eager, inputs, zoo.classify)
        else:
            gradients(local, inputs, zoo.classify)
    assert local.compiled is compiled


def test_the_sequence_length_may_change():
    local, eager, _ = pair("language_model")
    compilations = set()
    for length in (5, 7, 3, 4, 8):
        assert_oracle(local, eager, (zoo.tokens(3, length),), lambda logits: logits.square().mean())
        compilations.add(id(local.compiled))
    assert len(compilations) == 2  # the second one leaves the length open


def test_a_new_compilation_keeps_the_error_weights():
    local, _, _ = pair("transformer_encoder", LEARNED)
    before = dict(local.error_weights.named_parameters())
    gradients(local, (zoo.normal(3, 9, 8).double(),), zoo.classify)
    assert before
    assert all(local.error_weights.get_parameter(name) is p for name, p in before.items())


def test_an_input_that_requires_a_gradient_gets_autograds():
    local, eager, (x,) = pair("small_resnet")
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    zoo.classify(local(ours)).backward()
    zoo.classify(eager(theirs)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_an_input_gradient_that_a_frozen_subgraph_would_lose_is_refused():
    local, _, (x,) = pair("frozen_stem")
    with pytest.raises(InputError, match=r"requires a gradient, but none would reach it") as caught:
        local(x.requires_grad_())
    assert "detach the input" in str(caught.value)


def test_inputs_that_do_not_fit_the_signature_are_refused():
    local, _, _ = pair("mlp")
    with pytest.raises(InputError, match=r"do not fit Sequential\.forward"):
        local(zoo.normal(3, 6), zoo.normal(3, 6))


# The training graph


@pytest.mark.parametrize("rule", [*RULES, LEARNED], ids=["backprop", "fixed E", "learned E"])
def test_the_training_graph_is_the_whole_step(rule):
    local, _, inputs = pair("small_resnet", rule)
    assert isinstance(local.training_graph, torch.fx.GraphModule)
    assert "output_error" in local.training_graph.code
    assert "F1" in str(local.training_graph.graph)
    outputs, weights, learned, _ = local.training_graph(*inputs, output_errors)
    assert torch.equal(outputs[0], local(*inputs))
    gradients(local, inputs, zoo.classify)
    expected = {id(p): p.grad for p in local.parameters()}
    compiled = local.compiled.training
    for name, gradient in (*zip(compiled.weights, weights, strict=True), *zip(compiled.feedback, learned, strict=True)):
        owner = local if name.startswith("error_weights.") else local.original
        assert torch.equal(gradient, expected.pop(id(owner.get_parameter(name)))), name
    assert not expected


def output_errors(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [output.detach().requires_grad_() for output in outputs]
        return torch.autograd.grad(zoo.classify(*leaves), leaves)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("rule", ["backprop", LEARNED])
def test_weights_and_feedback_maps_that_are_loaded_are_the_ones_that_run(rule, assign):
    mlp, x = zoo.MODELS["mlp"], zoo.vectors()[0]
    first, second = (graphlocal.compile(mlp.make(), example_inputs=x, rule=rule) for _ in range(2))
    for parameter in second.parameters():
        nn.init.normal_(parameter)
    zoo.classify(first(x)).backward()  # everything is bound once before
    first.load_state_dict(copy.deepcopy(second.state_dict()), assign=assign)
    for local in (first, second):
        local.zero_grad()
        zoo.classify(local(x)).backward()
    for (name, found), true in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(found.grad, true.grad), name


class FrozenByNoGrad(nn.Module):
    """Returns its features, which it computes without gradients, beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            features = torch.tanh(self.body(x))
        return {"logits": self.head(features), "features": features}


@pytest.mark.parametrize("rule", ["backprop", "rec-lra"])
def test_outputs_computed_without_gradients_require_none(rule):
    model, x = FrozenByNoGrad(), torch.randn(3, 6)
    model.body.requires_grad_(rule == "backprop")
    expected = {name: value.requires_grad for name, value in model(x).items()}
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule)
    assert {name: value.requires_grad for name, value in local(x).items()} == expected
    assert expected == {"logits": True, "features": False}
