"""Tracing: which rung takes which model, what the self-check catches, and what the cache of traces may reuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import pytest
import torch
from test_bad_input import Counter, Memory, everything
from torch import Tensor, fx, nn

import graphlocal
import zoo
from graphlocal import cache
from graphlocal.arguments import Arguments, Binder
from graphlocal.errors import GuardFailure, TraceError
from graphlocal.lift import lift
from graphlocal.selfcheck import BufferMismatch, self_check
from graphlocal.trace import TracedModel, trace

X = zoo.vectors()[0]


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    cache.clear()
    yield
    cache.clear()


def arguments(model: nn.Module, inputs: Any = X) -> Arguments:
    return Binder(model).example(inputs)


def traced(model: nn.Module, inputs: Any = X) -> TracedModel:
    return trace(model, arguments(model, inputs))


def assert_same(found: TracedModel, model: nn.Module, *inputs: Tensor) -> None:
    """The graph and the model give the same outputs from the same random state."""
    torch.manual_seed(5)
    expected = list(zoo.leaves(model(*inputs)))
    torch.manual_seed(5)
    assert all(map(torch.equal, zoo.leaves(found.module(*inputs)), expected))


# The rungs


class FixedSizes(zoo.Layered):
    """Takes a size for an int, which a symbolic one is not."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x.shape[0], int):
            raise TypeError("sizes must be integers")
        return self.head(torch.tanh(self.first(x)))


class HiddenBranch(zoo.Layered):
    """A branch on data that reach Python as a list."""

    def forward(self, x: Tensor) -> Tensor:
        first, *_ = x[0].tolist()
        return self.head(torch.tanh(self.first(x)) if first > 0 else self.second(x))


@pytest.mark.parametrize("model", zoo.models(exclude=("torchvision",)))
def test_the_first_rung_takes_the_ordinary_models_with_an_open_batch(model):
    found = trace(model.make(), arguments(model.make(), model.example()))
    assert (found.rung, found.opaque) == ("export", ())
    sizes = [node.meta["val"].shape for node in found.module.graph.find_nodes(op="placeholder")]
    assert any(not isinstance(size, int) for shape in sizes for size in shape)


def test_sizes_can_be_fixed():
    model = FixedSizes()
    found = trace(model, arguments(model), dynamic=frozenset())
    assert (found.rung, found.dynamic) == ("export with fixed sizes", frozenset())
    assert [n.meta["val"].shape for n in found.module.graph.find_nodes(op="placeholder")] == [X.shape]
    assert_same(found, model, X + 1)


def test_the_second_rung_takes_a_model_that_wants_fixed_sizes():
    assert traced(FixedSizes()).rung == "export with fixed sizes"


@pytest.mark.parametrize("name", ["branch_in_block", "top_one_experts"])
def test_control_flow_in_a_submodule_becomes_an_opaque_leaf_and_the_rest_stays_open(name):
    model = zoo.HARD[name].make()
    found = traced(model)
    assert (found.rung, found.opaque) == ("export", ("1",))
    assert sum(node.op == "call_module" for node in found.module.graph.nodes) == 1
    for inputs in (X, -X, zoo.normal(7, 6, seed=3)):
        assert_same(found, model, inputs)


@pytest.mark.parametrize("build", [zoo.BranchAtRoot, zoo.SkipTorch, HiddenBranch])
def test_control_flow_at_the_root_is_recorded_with_guards(build):
    found = traced(build())
    assert found.rung == "recording"
    assert any("guard" in op.effects for op in lift(found, build()).operations)


def test_a_branch_hidden_in_a_list_is_never_taken_the_wrong_way():
    model = HiddenBranch()
    found = traced(model)
    assert_same(found, model, X)
    with pytest.raises(GuardFailure):
        found.module(-X)
    local = graphlocal.compile(model, example_inputs=X)
    for inputs in (X, -X, X + 9):
        assert torch.equal(local(inputs), model(inputs))


CALLS: list[int] = []


class GlobalCounter(zoo.Layered):
    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(1)
        return self.head(self.first(x) * len(CALLS))


class ThroughNumpy(zoo.Layered):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)) * float(x.detach().numpy().max()))


@pytest.mark.parametrize("build", [GlobalCounter, Counter, Memory, ThroughNumpy, zoo.SkipPython])
def test_what_no_rung_can_take_is_refused(build):
    with pytest.raises(TraceError, match=f"{build.__name__} could not be traced") as caught:
        traced(build())
    assert caught.value.where
    assert caught.value.why
    assert caught.value.remedy
    assert not cache._cache


# The self-check


def the(graph: fx.Graph, target: str) -> fx.Node:
    return next(node for node in graph.nodes if target in str(node.target) and node.op == "call_function")


def another_function(graph: fx.Graph) -> None:
    the(graph, "tanh").target = torch.ops.aten.sigmoid.default


def without(target: str) -> Callable[[fx.Graph], None]:
    """Hand on the operation's first input in its place."""

    def change(graph: fx.Graph) -> None:
        node = the(graph, target)
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)

    return change


def lost_gradient(graph: fx.Graph) -> None:
    node = the(graph, "tanh")
    with graph.inserting_after(node):
        cut = graph.call_function(torch.ops.aten.detach.default, (node,))
    node.replace_all_uses_with(cut, lambda user: user is not cut)


@pytest.mark.parametrize(
    ("name", "change", "kind", "said"),
    [
        ("mlp", another_function, TraceError, r"output 0 of the traced graph differs"),
        (
            "small_resnet",
            without("add_"),
            BufferMismatch,
            r"leaves the buffer 1\.num_batches_tracked with another value",
        ),
        ("mlp", lost_gradient, TraceError, r"gives the parameter 0\.weight another gradient"),
        ("dropout_mlp", without("dropout"), TraceError, r"output 0 of the traced graph differs"),
    ],
    ids=["function", "write", "gradient", "dropout"],
)
def test_the_self_check_catches_a_graph_that_computes_something_else(name, change, kind, said):
    model = zoo.MODELS[name].make()
    found = traced(model, zoo.MODELS[name].example())
    self_check(model, found.module, found.arguments, found.out_spec)
    change(found.module.graph)
    found.module.recompile()
    with pytest.raises(kind, match=said):
        self_check(model, found.module, found.arguments, found.out_spec)


# The graph


@pytest.mark.parametrize("name", ["mlp", "small_resnet", "transformer_encoder", "lstm", "gru_unrolled", "siamese"])
def test_a_graph_takes_other_batch_sizes_than_the_examples(name):
    model, inputs = zoo.MODELS[name].make(), zoo.MODELS[name].example()
    found = traced(model, inputs)
    for size in (2, 7):
        assert_same(found, model, *(x[:1].repeat(size, *[1] * (x.dim() - 1)) + torch.randn(size, *x.shape[1:])
                                    for x in inputs))  # fmt: skip


@pytest.mark.parametrize("name", ["mlp", "small_resnet", "tied_weight", "language_model", "moving_average"])
def test_a_graph_holds_the_models_own_tensors(name):
    model = zoo.MODELS[name].make()
    found = traced(model, zoo.MODELS[name].example())
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    held = states(found)
    assert held
    assert all(id(tensor) in own for tensor in held)


def states(found: TracedModel) -> list[Tensor]:
    """The tensors that a graph reads besides its inputs."""
    return [attrgetter(str(node.target))(found.module) for node in found.module.graph.find_nodes(op="get_attr")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["mlp", "dropout_mlp", "small_resnet", "step_counter", "transformer_dropout"])
def test_tracing_leaves_the_model_as_it_was(name, training):
    model, inputs = zoo.MODELS[name].make(), zoo.MODELS[name].example()
    zoo.MODELS[name].loss(zoo.call(model, inputs)).backward()
    model.train(training)
    before = list(everything(model))
    for _ in range(2):  # the second trace comes from the cache
        traced(model, inputs)
        for (what, old), (_, new) in zip(before, everything(model), strict=True):
            assert old is new or (not isinstance(old, Tensor) and old == new), what


def test_what_forward_assigns_while_it_is_traced_does_not_stay_on_the_model():
    model = zoo.ReassignedBuffer()
    mean = model.mean
    traced(model)
    assert model.mean is mean
    assert not mean.any()
    counter = Counter()
    with pytest.raises(TraceError):
        traced(counter)
    assert counter.calls == 0


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_active_in_the_graph_whatever_mode_the_model_was_in(training):
    model = zoo.MODELS["dropout_mlp"].make().train(training)
    found = traced(model)
    assert [op.name for op in lift(found, model).operations if "random" in op.effects] == ["dropout"]
    first, second = found.module(X)[0], found.module(X)[0]
    assert not torch.equal(first, second)
    assert_same(found, model.train(), X)


class Commented(zoo.Layered):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x))  # line A
        z = z * 2  # line B
        return self.head(z)  # line C


def test_source_lines_point_to_the_users_code():
    model = Commented()
    operations = lift(traced(model), model).operations
    lines, first = inspect.getsourcelines(Commented.forward)
    line = {text[-2]: f"test_trace.py:{first + i}" for i, text in enumerate(lines) if "# line" in text}
    own = {op.name: op.source for op in operations if not op.module}
    assert own == {"tanh": line["A"], "mul": line["B"]}
    assert [op.module for op in operations if op.module] == ["first", "head"]


# The cache


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were given to the tracer rather than found in the cache."""
    seen: list[nn.Module] = []
    export = torch.export.export

    def counted(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(model)
        return export(model, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return seen


@pytest.mark.parametrize("name", ["mlp", "small_resnet", "tied_weight", "transformer_dropout", "nested_output"])
def test_a_model_of_equal_structure_reuses_the_trace_with_its_own_weights(name, tracer):
    zoo_model = zoo.MODELS[name]
    first, second = zoo_model.make(seed=0), zoo_model.make(seed=1)
    one = traced(first, zoo_model.example())
    (key,) = cache._cache
    two = traced(second, zoo_model.example())
    assert list(cache._cache) == [key]
    assert tracer == [first]
    assert (two.rung, two.out_spec, two.dynamic) == (one.rung, one.out_spec, one.dynamic)
    assert [n.target for n in two.module.graph.nodes] == [n.target for n in one.module.graph.nodes]
    own = {id(t) for t in (*second.parameters(), *second.buffers())}
    assert all(id(tensor) in own for tensor in states(two))
    assert_same(two, second, *zoo_model.example())


class Scaled(zoo.Layered):
    def __init__(self, scale: float = 2.0, width: int = 6) -> None:
        super().__init__()
        self.scale, self.second = scale, nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(self.first(x) * self.scale))


def half_trained(model: nn.Module) -> nn.Module:
    model.first.eval()
    return model


def tied(model: nn.Module) -> nn.Module:
    model.second.weight = model.first.weight
    return model


CHANGES = {
    "attribute": (lambda: Scaled(3.0), X),
    "parameter's shape": (lambda: Scaled(width=5), X),
    "input's shape": (Scaled, zoo.normal(4, 6)),
    "dtype": (lambda: Scaled().double(), X.double()),
    "training flag": (lambda: half_trained(Scaled()), X),
    "frozen": (lambda: Scaled().requires_grad_(False), X),
    "tied": (lambda: tied(Scaled()), X),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_forward_can_see_is_traced_anew(change, tracer):
    build, inputs = CHANGES[change]
    traced(Scaled())
    model = build()
    found = traced(model, inputs)
    assert tracer[1:] == [model]
    assert len(cache._cache) == 2
    assert_same(found, model, inputs)


def test_a_model_with_a_hook_is_not_cached(tracer):
    traced(Scaled())
    model = Scaled()
    model.first.register_forward_hook(lambda module, args, output: output * 3)
    for _ in range(2):
        assert_same(traced(model), model, X)
    assert tracer[1:] == [model, model]
    assert len(cache._cache) == 1


FACTOR = [2.0]


class GlobalFactor(zoo.Layered):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x) * FACTOR[0])


def test_a_kept_trace_that_is_no_longer_true_fails_its_check_and_is_traced_anew(tracer, monkeypatch):
    traced(GlobalFactor())
    monkeypatch.setattr(f"{__name__}.FACTOR", [3.0])
    model = GlobalFactor()
    assert_same(traced(model), model, X)
    assert tracer[1:] == [model]
    assert len(cache._cache) == 1


def test_opaque_leaves_and_guards_are_not_cached():
    for model in (zoo.HARD["branch_in_block"].make(), zoo.BranchAtRoot()):
        traced(model)
        assert not cache._cache


def test_clear_forgets_every_trace(tracer):
    traced(Scaled())
    assert len(cache._cache) == 1
    cache.clear()
    assert not cache._cache
    traced(Scaled())
    assert len(tracer) == 2


def test_the_traces_not_used_longest_go_first(monkeypatch):
    monkeypatch.setattr(cache, "SIZE", 2)
    first, second, third = (Scaled(scale) for scale in (1.0, 2.0, 3.0))
    keys = {}
    for model in (first, second, first, third):
        traced(model)
        keys[model] = next(reversed(cache._cache))
    assert list(cache._cache) == [keys[first], keys[third]]


class HooksAtFirstCall(nn.Module):
    """Captures the hidden layer's output by a hook that its first call installs, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 4), nn.Linear(4, 2)
        self.captured: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not getattr(self, "installed", False):
            self.hidden.register_forward_hook(lambda *call: self.captured.append(call[-1]))
            self.installed = True
        y = self.head(torch.tanh(self.hidden(x)))
        (captured,) = self.captured
        self.captured.clear()
        return y, captured


def test_hooks_that_a_model_installs_itself_are_undone_with_its_attributes():
    model = HooksAtFirstCall()
    traced(model)
    assert not model.hidden._forward_hooks
    assert len(model(X)) == 2
