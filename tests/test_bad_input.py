"""Bad input gets a clear error that says what, where, why and what to do; and nothing is changed."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

import numpy
import pytest
import torch
from test_runtime import pair
from torch import Tensor, nn

import graphlocal
import zoo
from graphlocal.errors import (
    CycleError,
    GraphLocalError,
    InputError,
    LocalTrainingError,
    PartitionError,
    TraceError,
    VerifyError,
)
from graphlocal.ir import Connection, LocalGraph
from graphlocal.rules import RULES, Neuron, RecLRA, Rule, loss_connections

X = zoo.vectors()


def everything(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All of a model that a failed compilation could have changed, and the random state."""
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            yield f"{path}.{key}", dict(value) if isinstance(value, dict) else value
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        gradient = None if tensor.grad is None else tensor.grad.tolist()
        yield (
            name,
            (id(tensor), tensor.requires_grad, id(tensor.grad), gradient, str(tensor.device), str(tensor.tolist())),
        )
    yield "random", (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()))
    yield "modes", (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))


@contextmanager
def refused(kind: type[GraphLocalError], model: Any, *said: str) -> Iterator[None]:
    """The block raises `kind` with every one of the texts in its message, and leaves the model as it was."""
    before = list(everything(model)) if isinstance(model, nn.Module) else []
    with pytest.raises(kind) as caught:
        yield
    for text in said:
        assert text in str(caught.value), f"{text!r} is not in: {caught.value}"
    for (name, old), (_, new) in zip(before, everything(model) if before else (), strict=True):
        assert old is new or (not isinstance(old, Tensor) and old == new), name


def trained(name: str = "mlp") -> nn.Module:
    """A zoo model with gradients and used buffers, so that a failed compilation has something to spoil."""
    model = zoo.MODELS[name].make()
    zoo.MODELS[name].loss(zoo.call(model, zoo.MODELS[name].example())).backward()
    return model


# Inputs


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.zeros(3, 5), ("float32[3, 5] on cpu", "where: module 0", "mat1 and mat2", "3x5 and 6x8")),
        (torch.zeros(3, 6, dtype=torch.float64), ("float64[3, 6] on cpu", "where: module 0", "same dtype")),
        (torch.zeros(3, 6, device="meta"), ("float32[3, 6] on meta", "where: module 0", "device")),
        (torch.zeros(3, 6, dtype=torch.int64), ("int64[3, 6] on cpu", "where: module 0", "dtype")),
    ],
    ids=["shape", "dtype", "device", "integer"],
)
def test_inputs_that_the_model_does_not_take(inputs, said):
    model = trained()
    with refused(InputError, model, "Sequential does not run on the example inputs", *said, "remedy: pass example"):
        graphlocal.compile(model, example_inputs=inputs)


def test_inputs_that_fail_deep_inside_name_the_module():
    model = trained("residual_mlp")
    model.blocks[1].outer = nn.Linear(3, 7)
    with refused(InputError, model, "ResidualMLP does not run", "where: module blocks.1.outer"):
        graphlocal.compile(model, example_inputs=X)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (numpy.zeros((3, 6)), ("example_inputs is a ndarray", "a tuple of positional inputs", "a dict of keyword")),
        (None, ("example_inputs is a NoneType", "torch.randn")),
        ((3.0,), ("example_inputs hold no tensor", "pass the tensors of one batch")),
        ((), ("do not fit Sequential.forward(input)", "missing a required argument: 'input'")),
        ((X[0], X[0]), ("do not fit Sequential.forward(input)", "too many positional arguments")),
        ({"x": X[0]}, ("do not fit Sequential.forward(input)", "missing a required argument")),
        (X[0][:1], ("example_inputs hold a batch of 1", "can't be told from a constant", "a batch of 2 or more")),
    ],
    ids=["array", "none", "no tensor", "too few", "too many", "unknown keyword", "batch of 1"],
)
def test_example_inputs_that_are_no_call_of_the_model(inputs, said):
    model = trained()
    with refused(InputError, model, *said):
        graphlocal.compile(model, example_inputs=inputs)


# Models


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda x: x, "model is a function"),
        (nn.Linear, "model is a type"),
        (None, "model is a NoneType"),
    ],
    ids=["function", "class", "none"],
)
def test_what_is_no_module(model, said):
    with refused(InputError, model, said, "remedy: pass a torch.nn.Module"):
        graphlocal.compile(model, example_inputs=X)


def test_compiling_twice():
    local, _, _ = pair("mlp")
    with refused(InputError, local.original, "compiled already", "pass local.original"):
        graphlocal.compile(local, example_inputs=X)


def test_a_model_on_the_meta_device():
    model = zoo.MODELS["mlp"].make().to("meta")
    with pytest.raises(InputError, match="on the meta device") as caught:
        graphlocal.compile(model, example_inputs=torch.zeros(3, 6, device="meta"))
    assert "to_empty" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("class_output", ("ClassOutput returns no float tensor (it returns int64)", "gradient of a loss", "logits")),
        ("boolean_output", ("BooleanOutput returns no float tensor (it returns bool)", "logits")),
        ("integer_only", ("IntegerOnly has no trainable parameter", "requires_grad_(True)")),
    ],
)
def test_a_model_without_a_float_output_or_a_parameter(name, said):
    model = zoo.BAD[name].make()
    with refused(InputError, model, *said):
        graphlocal.compile(model, example_inputs=zoo.BAD[name].example())


def test_a_model_that_is_frozen():
    model = trained().requires_grad_(False)
    with refused(InputError, model, "Sequential has no trainable parameter", "requires_grad_(True)"):
        graphlocal.compile(model, example_inputs=X)


class Clock(zoo.Layered):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x) * time.perf_counter())


class NumpyNoise(zoo.Layered):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x) * float(numpy.random.rand()))


class Counter(zoo.Layered):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.first(x) / self.calls)


class Memory(zoo.Layered):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        self.state = torch.tanh(self.first(x) + self.state).detach().mean(0)
        return self.head(self.first(x) + self.state)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (zoo.SkipPython, ("output 0 of the traced graph differs", "Python's random module", "torch's random numbers")),
        (NumpyNoise, ("output 0 of the traced graph differs", "forward depends on something that the tracer fixed")),
        (Clock, ("output 0 of the traced graph differs", "forward depends on something that the tracer fixed")),
        (Counter, ("a second call of the model gives another output", "'calls'", "keep 'calls' in a buffer")),
        (Memory, ("a second call of the model gives another output", "'state'", "keep 'state' in a buffer")),
    ],
    ids=["random", "numpy", "clock", "counter", "memory"],
)
def test_a_model_whose_traced_forward_differs_from_its_eager_one(build, said):
    model = build()
    name = f"{build.__name__} could not be traced"
    with refused(TraceError, model, name, "where: the model's forward", *said):
        graphlocal.compile(model, example_inputs=X)


# Names and options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "rec-lar"}, ("unknown rule 'rec-lar': did you mean 'rec-lra'?", "an instance of a subclass")),
        ({"rule": RecLRA}, ("rule=RecLRA is a class", "pass an instance: RecLRA()")),
        ({"rule": 3}, ("unknown rule 3", "backprop, auto, rec-lra")),
        ({"target": "egaer"}, ("unknown target 'egaer': did you mean 'eager'?", "targets:")),
        ({"rule": None}, ("unknown rule None: known: backprop, auto", "an instance of a subclass")),
        ({"target": None}, ("unknown target None: known: auto, eager", "targets:")),
        ({"target": 3}, ("unknown target 3: known: auto, eager", "targets:")),
        ({"target": [["eager"]]}, ("unknown target [['eager']]: known: auto, eager", "targets:")),
        ({"recompute": None}, ("recompute is None", "pass True")),
        ({"skip_errors": None}, ("skip_errors hold None", "pairs of names")),
        ({"streams": "2"}, ("streams='2' with target 'auto'", 'pass target="streams"')),
        ({"partition": "laef"}, ("unknown partition 'laef': did you mean 'leaf'?", "globs of module paths")),
        ({"partition": 2.5}, ("partition is 2.5", "a number of segments")),
        ({"partition": None}, ("partition is None", '"auto"')),
        ({"partition": []}, ("partition is []", "globs")),
        ({"partition": lambda op: 3}, ("partition gives operation 'linear' the box 3, a int", "or None")),
        ({"skip_errors": [("output", "block.1")]}, ("name the target 'block.1'", "did you mean 'blocks.1'?")),
        ({"skip_errors": [("haed", "stem")]}, ("name the source 'haed'", "did you mean 'head'?", "print(local.graph)")),
        ({"skip_errors": ["stem"]}, ("skip_errors hold 'stem'", "pairs of names")),
        (
            {"skip_errors": [("output", "stem")], "rule": "backprop"},
            ("the rule 'backprop' has exact messages only", "rule='rec-lra'"),
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_unknown_names_and_options_of_compile(options, said):
    model = trained("residual_mlp")
    with refused(InputError, model, *said):
        graphlocal.compile(model, example_inputs=X, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 0}, "depth=0"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"beta": 0}, "beta=0"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"beta": "0.1"}, "beta='0.1'"),
        ({"gamma": -1}, "gamma=-1"),
        ({"reprojection": 0.0}, "reprojection=0.0"),
        ({"error_weights": "kpp"}, "use one of ('fixed', 'kp', 'literal')"),
        ({"rescale": "max"}, "use one of ('rms', None)"),
        ({"max_source_features": 0}, "max_source_features=0"),
    ],
    ids=str,
)
def test_options_of_rec_lra_that_are_out_of_range(options, said):
    with refused(InputError, None, "RecLRA(", said):
        RecLRA(**options)


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if is_dataclass(rule)], ids=lambda rule: rule.name)
@pytest.mark.parametrize("value", [None, "no", 0.3, [1], {}, object()], ids=lambda value: type(value).__name__)
def test_an_option_of_a_rule_is_taken_or_refused_by_name(rule, value):
    refusals = {}
    for option in fields(rule):
        try:
            rule(**{option.name: value})
        except InputError as error:  # nothing else may come out of it
            refusals[option.name] = str(error)
    assert [name for name, said in refusals.items() if name not in said] == []


def test_a_kind_of_export_that_is_no_text(tmp_path):
    local, _, _ = pair("mlp")
    with refused(InputError, local.original, "unknown kind of export None", "known: "):
        local.export(tmp_path / "model.onnx", kind=None)


# Partitions and error paths


def test_a_glob_that_matches_nothing():
    model = trained("residual_mlp")
    with refused(PartitionError, model, "glob 'block.*' matches no module of ResidualMLP", "mean 'blocks", "layer1.0"):
        graphlocal.compile(model, example_inputs=X, partition=["stem", "block.*"])


@pytest.mark.parametrize("count", [0, -1, 9])
def test_more_segments_than_operations_with_parameters(count):
    model = trained("residual_mlp")
    with refused(PartitionError, model, f"{count} segments are wanted", "has 8 operations with parameters", "1 to 8"):
        graphlocal.compile(model, example_inputs=X, partition=count)


def test_a_cut_that_is_not_convex():
    model = trained()
    said = "the cut is not convex: values leave ends and come back", "ends -> middle  (tanh needs linear, ", "into one"
    with refused(PartitionError, model, *said, "activation.py:"):
        graphlocal.compile(model, example_inputs=X, partition=lambda op: "ends" if op.module in "04" else "middle")


def test_skip_errors_that_close_a_cycle():
    model = trained()
    said = "[acyclic-error-graph] the error paths form a cycle", "0 ~> 4 : linear_2", "4 ~> 0 : tanh", "take out one"
    with refused(CycleError, model, *said):
        graphlocal.compile(model, example_inputs=X, partition="leaf", skip_errors=[("0", "4")])


@dataclass(frozen=True)
class HeadOnly(Rule):
    """A rule that wires nothing but the loss's own gradient."""

    name: ClassVar[str] = "head-only"

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        return loss_connections(graph)


def test_a_trainable_parameter_that_no_error_reaches():
    model = trained()
    said = "[error-reach] no error reaches subgraph '0'", "0.weight, read by linear in 0, ", "requires_grad_(False)"
    with refused(VerifyError, model, *said, "no path from 'output'", 'skip_errors=[("output", "0")]'):
        graphlocal.compile(model, example_inputs=X, partition="leaf", rule=HeadOnly())


# Running


@dataclass(frozen=True)
class Broken(RecLRA):
    """Makes the error of one representation something that is no number."""

    name: ClassVar[str] = "broken"
    at: str = "tanh_1"

    def local_error(self, neuron: Neuron, displacement: Tensor) -> Tensor:
        error = super().local_error(neuron, displacement)
        return error * float("nan") if neuron.name == self.at else error


@pytest.mark.parametrize(("at", "subgraph"), [("tanh", "0"), ("tanh_1", "2")])
@pytest.mark.parametrize("fused", [False, True], ids=["drop-in", "fused"])
def test_a_local_error_that_is_not_a_number_names_the_subgraph(fused, at, subgraph):
    local, _, (x,) = pair("mlp", Broken(at=at))
    step = graphlocal.train_step(local, lambda output, _: output.sum(), torch.optim.SGD(local.parameters(), 0.0))
    said = f"local error of subgraph '{subgraph}' is not a number", f"{subgraph}.weight holds NaN", "linear.py:"
    with refused(LocalTrainingError, None, *said, "lower the learning rate or beta", "local.check_finite = False"):
        step(x, None) if fused else local(x).sum().backward()
    local.check_finite = False
    step(x, None) if fused else local(x).sum().backward()


def test_a_batch_that_does_not_fit_is_refused_and_the_next_one_trains():
    local, eager, (x,) = pair("mlp")
    with refused(InputError, local.original, "Sequential does not run on", "float64[3, 5] on cpu", "where: module 0"):
        local(x[:, :5])
    torch.testing.assert_close(local(x), eager(x))


@pytest.mark.parametrize(
    ("rule", "target"),
    [*((r, t) for r in ("rec-lra", "lra-fdbk", "backprop") for t in ("auto", "lowered")), ("nlp", "auto")],
)
def test_a_fused_step_on_an_empty_batch_says_that_it_is_empty(rule, target):
    local, _, (x,) = pair("mlp", rule, target=target)
    step = graphlocal.train_step(local, lambda output, _: output.mean(), torch.optim.SGD(local.parameters(), 0.1))
    for batch in (x, x[:0], x, x[:0], x):
        if len(batch):
            step(batch, None)
            continue
        with refused(InputError, local.original, "the batch is empty", "a mean over no samples", "leave out batches"):
            step(batch, None)
    assert local.compiled.execution.not_lowered is None or rule == "nlp"


@pytest.mark.parametrize("target", ["auto", "eager", "lowered"])
def test_an_empty_batch_is_refused_by_the_drop_in_step_where_the_rule_takes_means(target):
    local, _, (x,) = pair("mlp", RecLRA(), target=target)
    for _ in range(2):
        with pytest.raises(InputError, match="the batch is empty"):
            local(x[:0]).sum().backward()
    local(x).sum().backward()
    local, eager, (x,) = pair("mlp", "backprop", target=target)
    local(x[:0]).sum().backward()  # takes none, and gives what autograd gives
    eager(x[:0]).sum().backward()
    for name, p in eager.named_parameters():
        torch.testing.assert_close(local.original.get_parameter(name).grad, p.grad)


class MeanInput(zoo.Layered):
    """A parameter meets a mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.head(z - self.first(x.mean(0)))


def test_an_update_that_an_empty_batch_makes_no_number_is_not_put_down_to_the_learning_rate():
    (x,) = X
    local = graphlocal.compile(MeanInput(), example_inputs=X, rule="backprop", partition=1)
    with pytest.raises(InputError, match="the batch is empty") as caught:
        local(x[:0]).sum().backward()
    assert "learning rate" not in str(caught.value)


class TimeFirst(nn.Module):
    """Takes [time, batch, features], and returns a mean over time, or over the batch too."""

    def __init__(self, over: int | tuple[int, ...]) -> None:
        super().__init__()
        self.over, self.first, self.head = over, nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)).mean(self.over))


@pytest.mark.parametrize("over", [0, (0, 1)], ids=["time", "all"])
@pytest.mark.parametrize("rule", ["rec-lra", "backprop", "nlp"])
def test_a_batch_may_be_empty_on_another_axis_than_the_first(rule, over):
    x = torch.randn(4, 8, 6)
    local = graphlocal.compile(TimeFirst(over), example_inputs=x, rule=rule)
    step = graphlocal.train_step(local, lambda output, _: output.mean(), torch.optim.SGD(local.parameters(), 0.1))
    for batch in (x, x, x[:, :0], x):
        if batch.numel():
            step(batch, None)
            continue
        with pytest.raises(InputError, match="the batch is empty") as caught:
            step(batch, None)
        assert "learning rate" not in str(caught.value)
    execution = local.compiled.execution
    assert rule == "nlp" or (execution.not_lowered is None and execution._passes)


@pytest.mark.parametrize("over", [0, (0, 1)], ids=["time", "all"])
def test_a_drop_in_step_on_a_batch_that_is_empty_on_another_axis_says_so(over):
    x = torch.randn(4, 8, 6)
    local = graphlocal.compile(TimeFirst(over), example_inputs=x, rule=RecLRA())
    with pytest.raises(InputError, match="the batch is empty") as caught:
        local(x[:, :0]).mean().backward()
    assert "learning rate" not in str(caught.value)


class BrokenOptimizer(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("the optimizer's own trouble")


@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty"])
def test_an_error_of_the_users_optimizer_is_shown_as_what_it_is(empty, monkeypatch):
    monkeypatch.setattr("graphlocal.partial_optimizer.TOGETHER", 0)  # each update is made within the error pass
    local, _, (x,) = pair("mlp", "backprop")
    local.check_finite = False
    step = graphlocal.train_step(local, lambda output, _: output.sum(), BrokenOptimizer(local.parameters(), 0.1))
    with pytest.raises(InputError if empty else RuntimeError, match="the optimizer's own trouble") as caught:
        step(x[:0] if empty else x, None)
    if empty:
        assert "the batch is empty" in str(caught.value)
        assert "means over samples" not in str(caught.value)
        assert type(caught.value.__cause__) is RuntimeError


class UnreturnedHead(nn.Module):
    """An auxiliary head with BatchNorm runs, but what it computes is not returned."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.auxiliary = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.body(x))
        self.auxiliary(z)
        return self.head(z)


@pytest.mark.parametrize("rule", ["rec-lra", "backprop"])
def test_parameters_that_influence_no_output_are_warned_of_and_get_no_update(rule):
    x = torch.randn(3, 6)
    with pytest.warns(UserWarning, match=r"get no update: auxiliary\.0\.weight, auxiliary\.0\.bias, .* and 1 more"):
        local = graphlocal.compile(UnreturnedHead(), example_inputs=(x,), rule=rule)
    local(x).sum().backward()
    assert all(p.grad is None for p in local.original.auxiliary.parameters())
    assert all(p.grad is not None for p in local.original.head.parameters())
    assert int(local.original.auxiliary[1].num_batches_tracked) == 1
