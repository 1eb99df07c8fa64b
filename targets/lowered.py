"""The lowered target: a training graph whose nodes are ATen operators, without autograd.

The eager training graph calls subgraphs, and autograd works inside them. Here it runs once on tensors without data
under `make_fx`, which records every operator below autograd: the forward of each subgraph, its error neuron, and the
vector-Jacobian product that is its update. The result is again a training graph, called in the same way and cut at
the loss in the same way. `meta["action"]` of each node says which action of the schedule it belongs to (`"U3"`).

It holds for inputs of the same shapes, strides and dtypes (with `any_batch`, for every batch size), and for losses that
send an error to the same outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from graphlocal.errors import GraphLocalError
from graphlocal.guards import is_guard
from graphlocal.targets.eager import output_errors
from graphlocal.targets.simplify import simplify
from graphlocal.targets.training_graph import TrainingGraph, assemble, roots_of


class NotLowered(GraphLocalError):
    """A training graph has no lowered form; the eager one works all the same."""


def lower(
    training: TrainingGraph, inputs: Sequence[Any], taken: Sequence[bool], any_batch: bool = False,
    labels: Tensor | None = None,
) -> TrainingGraph:  # fmt: skip
    """The training graph as ATen operators, for inputs like these.

    inputs: the flattened arguments of the model. taken: for each output, whether the loss sends it an error.
    any_batch: leave the size of the first axis of the inputs open. labels: labels like those of local heads; the error
    pass then takes such labels as its last argument.

    Raises NotLowered where the graph runs Python code of the user's, or looks at the values of its data.
    """
    for node in training.module.graph.find_nodes(op="call_module"):
        if _runs_python(training.module.get_submodule(str(node.target))):
            raise NotLowered(
                f"{node.target} holds Python code that runs at every step",
                why="an opaque leaf, a guard or a higher-order operator is no fixed list of operators",
            )
    recording = _Recording(training, inputs, taken, labels)
    states, tensors = recording.arguments
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            if any_batch:
                states, tensors = without_data(states, tensors)
            traced = record(recording.step, states, tensors)
    except Exception as error:  # whatever operators, rules and autograd functions raise on tensors without data
        message = (str(error).splitlines() or [""])[0]
        raise NotLowered(
            f"the training step of {type(training.module).__name__} can't be recorded as operators",
            why=f"{type(error).__name__}: {message}",
        ) from error
    return _assembled(recording, traced)


def without_data(fixed: list[Tensor], open_: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors without data: of the same shapes, and of the same shapes but for a first axis of any size."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())

    def fake(x: Tensor, batch: DimDynamic) -> Tensor:
        sizes = [batch if axis == 0 else DimDynamic.STATIC for axis in range(x.dim())]
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes))

    return [fake(x, DimDynamic.STATIC) for x in fixed], [fake(x, DimDynamic.DYNAMIC) for x in open_]


def record(function: Callable[..., Any], *arguments: Any, **options: Any) -> fx.GraphModule:
    """`make_fx` on tensors without data; operators that take tensors with data, such as constants, stay as they are."""
    with enable_python_dispatcher():  # some operators' shapes need it where sizes are open
        tracer = make_fx(lambda *given: function(*given), tracing_mode="fake", _allow_non_fake_inputs=True, **options)
        return tracer(*arguments)


def _runs_python(module: nn.Module) -> bool:
    """Whether a piece of the training graph calls anything that is not an operator or this package's own."""
    if not isinstance(module, fx.GraphModule):
        return False
    return any(node.op == "call_module" or is_guard(node) or _branches(node) for node in module.graph.nodes)


def _branches(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() not in _BLOCKS


_BLOCKS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
"""Higher-order operators that run their body as it is."""


class _Recording:
    """One run of a training graph, with the states that it reads, its tensor inputs and labels as arguments."""

    def __init__(
        self, training: TrainingGraph, inputs: Sequence[Any], taken: Sequence[bool], labels: Tensor | None
    ) -> None:
        self.training, self.taken, self.labelled = training, taken, labels is not None
        module = training.module
        self.states = list(dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="get_attr")))
        self.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        self.inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        values = [attribute(module, name) for name in self.states]
        for value in (*values, *self.inputs):
            if isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter):
                raise NotLowered(f"a tensor of class {type(value).__name__} is among the inputs or parameters")
        self.requires_grad = [value.requires_grad for value in values]
        tensors = [self.inputs[i] for i in self.tensors]
        self.arguments = ([value.detach() for value in values], tensors if labels is None else [*tensors, labels])

    def step(self, states: list[Tensor], tensors: list[Tensor]) -> list[Any]:
        """What the training graph returns, flattened."""
        given = list(self.inputs)
        after_loss = (False, tensors[-1]) if self.labelled else ()  # retain, labels
        for i, tensor in zip(self.tensors, tensors[: len(self.tensors)], strict=True):
            given[i] = tensor
        named = {
            name: value.detach().requires_grad_() if wish else value
            for name, value, wish in zip(self.states, states, self.requires_grad, strict=True)
        }
        returned = Tagging(self.training.module, named).run(*given, self._loss, *after_loss)
        leaves, self.spec = pytree.tree_flatten(returned)
        return leaves

    def _loss(self, outputs: tuple[Any, ...]) -> list[Tensor | None]:
        """An empty tensor for each error; what comes after is no longer the forward pass."""
        _last_node().meta["last_before_loss"] = True
        errors: list[Tensor | None] = []
        for i, (z, wanted) in enumerate(zip(outputs, self.taken, strict=True)):
            errors.append(torch.empty_like(z) if wanted else None)
            if wanted:
                _last_node().meta["error"] = i
        return errors


class WithStates(fx.Interpreter):
    """Runs a training graph with given states in place of its attributes."""

    def __init__(self, module: fx.GraphModule, states: dict[str, Tensor]) -> None:
        super().__init__(module)
        self.states = states

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.states[target] if target in self.states else super().get_attr(target, args, kwargs)


class Tagging(WithStates):
    """Writes on the recorded nodes which action they belong to."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for node in reversed(_graph().nodes):
            if "action" in node.meta:
                break
            node.meta["action"] = n.meta.get("action", "")
        return result


def _graph() -> fx.Graph:
    """The graph that is being recorded."""
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer.graph


def _last_node() -> fx.Node:
    node: fx.Node = next(iter(reversed(_graph().nodes)))
    return node


def attribute(module: nn.Module, name: str) -> Tensor:
    """The tensor that a `get_attr` node of the name gives."""
    owner, _, last = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), last)
    return value


def _strides(value: Tensor) -> tuple[int, ...] | None:
    """The strides of a value, or None where they depend on the batch size."""
    strides = tuple(value.stride())
    return strides if all(type(stride) is int for stride in strides) else None


def laid_out(error: Tensor, strides: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
    """An error with the strides (by default contiguous) and the dtype that the recorded operators expect."""
    if strides is None:
        return error.to(dtype).contiguous()
    if error.stride() == strides and error.dtype == dtype:
        return error
    return torch.empty_strided(error.shape, strides, dtype=dtype, device=error.device).copy_(error)


def _assembled(recording: _Recording, traced: fx.GraphModule) -> TrainingGraph:
    """The recorded operators as a training graph: states are looked up, the caller's loss gives the errors."""
    training, source = recording.training, recording.training.module
    graph, copied = fx.Graph(), dict[fx.Node, Any]()
    placeholders = iter(traced.graph.find_nodes(op="placeholder"))
    for name in recording.states:
        copied[next(placeholders)] = graph.get_attr(name)
    names = [node.name for node in source.graph.find_nodes(op="placeholder")]
    given = [graph.placeholder(name) for name in names[: len(recording.inputs)]]
    for i in recording.tensors:
        copied[next(placeholders)] = given[i]
    loss, _ = graph.placeholder("loss"), graph.placeholder("retain", default_value=False)
    if recording.labelled:
        copied[next(placeholders)] = graph.placeholder("labels_of_heads", default_value=None)
    for old, new in copied.items():
        new.meta["val"] = old.meta["val"]
    *operators, last = [node for node in traced.graph.nodes if node.op != "placeholder"]
    outputs, *gradients = pytree.tree_unflatten(list(last.args[0]), recording.spec)
    lifted = nn.Module()
    errors: fx.Node | None = None
    at_loss = not any("last_before_loss" in node.meta for node in operators)  # nothing runs before the loss
    for node in operators:
        if at_loss and errors is None:
            errors = _errors(graph, loss, outputs, copied)
        if "error" in node.meta:
            value = node.meta["val"]
            error = graph.call_function(operator.getitem, (errors, node.meta["error"]))
            copied[node] = graph.call_function(laid_out, (error, _strides(value), value.dtype))
            copied[node].meta["val"] = value
        elif node.op == "get_attr":
            lifted.register_buffer(str(node.target), attribute(traced, str(node.target)))
            copied[node] = graph.get_attr(f"lifted.{node.target}")
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        at_loss = at_loss or "last_before_loss" in node.meta
    if errors is None:
        errors = _errors(graph, loss, outputs, copied)
    graph.output(fx.map_arg((tuple(outputs), *map(tuple, gradients)), copied.__getitem__))
    simplify(graph)
    roots = roots_of(source) | {"lifted": lifted}
    module = assemble(graph, {}, roots, type(source).__name__.replace("Training", "Lowered"))
    return TrainingGraph(module, training.weights, training.feedback, errors.name)


def _errors(graph: fx.Graph, loss: fx.Node, outputs: Any, copied: dict[fx.Node, Any]) -> fx.Node:
    returned = fx.map_arg(tuple(outputs), copied.__getitem__)
    return graph.create_node("call_function", output_errors, (loss, returned), {}, "output_error")
