"""From the traced training graph to the graph of the model in evaluation mode.

The partition belongs to the training trace, so that trace is rewritten instead of tracing the model anew: every
operation keeps its name, and with it its subgraph. The cases:

1. a `train`, `training` or `use_input_stats` flag goes down where the module would put it down: dropout, RNNs,
   and normalizations that have running statistics;
2. the dropout probability of a fused attention becomes 0;
3. a random draw becomes its mean, so that added noise, stochastic depth and Bernoulli units do what they do when
   the model evaluates;
4. a write to a state that no later operation reads goes;
5. the body of a `no_grad` block is written in its place.

A forward that asks `self.training` may do more than that, so the result is compared with the model in evaluation
mode. The comparison also finds those of the trace's outputs that the model returns when it evaluates.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphlocal.arguments import Arguments
from graphlocal.errors import InputError
from graphlocal.guards import has_guards
from graphlocal.ir import LocalGraph
from graphlocal.normalize import written_states
from graphlocal.opaque import OpaqueLeaf
from graphlocal.preserve import preserved
from graphlocal.trace import TracedModel

TOLERANCE = 1e-4
"""Largest difference of an output of the rewritten graph from the model's, relative to its largest entry."""

OWNER = "graphlocal_operation"
"""Key in a node's meta: the operation of the LocalGraph that the node is, or is a part of."""

_FLAGS = ("train", "training", "use_input_stats")
_MEANS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "bernoulli": lambda given: given.get("p", given["self"]),
    "bernoulli_": lambda given: given.get("p", 0.5),
    "rand": lambda given: 0.5,
    "rand_like": lambda given: 0.5,
    "randn": lambda given: 0.0,
    "randn_like": lambda given: 0.0,
    "normal_": lambda given: given.get("mean", 0.0),
    "uniform_": lambda given: (given.get("from", 0.0) + given.get("to", 1.0)) / 2,
}


@dataclass(frozen=True)
class Call:
    """What the model itself returns in evaluation mode: tensors in, tensors out, both flat.

    returned: all leaves of what it returns, spec: their structure.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    returned: tuple[Any, ...]
    spec: pytree.TreeSpec

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """Other tensors in the place of `outputs`, in the structure that the model returns."""
        tensors = iter(outputs)
        leaves = [next(tensors) if isinstance(x, Tensor) else x for x in self.returned]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Evaluation:
    """A model in evaluation mode as a graph with the operations of its training trace.

    module: tensors in, flat tuple of tensors out; its parameters and buffers are the model's own. inputs: names of
    the tensors that it takes. outputs: the values (as in the LocalGraph) that it returns. calls: of the model, the
    first with the example inputs, the second with one more row where the batch size is open.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    calls: tuple[Call, ...]

    @property
    def example(self) -> tuple[Tensor, ...]:
        """The example inputs."""
        return self.calls[0].inputs


def evaluation(traced: TracedModel, graph: LocalGraph, model: nn.Module) -> Evaluation:
    """The evaluation form of a traced model.

    Raises InputError, naming the subgraph where there is one, if the model evaluates in another way, or if it holds
    what only Python can run (an opaque leaf, control flow that depends on the data).
    """
    _require_plain(traced, graph)
    module, inputs = rewritten(traced)
    (node,) = module.graph.find_nodes(op="output")
    calls = tuple(_call(model, arguments) for arguments in (traced.arguments, _further(traced, graph, model)))
    places = _returned(module, model, calls)
    returned = tuple(node.args[0][i] for i in places)
    node.args = (returned,)
    module.graph.eliminate_dead_code()
    module.recompile()
    return Evaluation(module, inputs, tuple(value.name for value in returned), calls)


def rewritten(traced: TracedModel) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A copy of the traced graph in evaluation form, and the names of the tensors that it takes.

    Arguments that are not tensors are written into it. Nodes keep their names.
    """
    source = traced.module
    graph, copied = fx.Graph(), dict[fx.Node, Any]()
    leaves = iter(traced.arguments.leaves)
    inputs = []
    for node in source.graph.nodes:
        leaf = next(leaves) if node.op == "placeholder" else None
        if node.op == "placeholder" and not isinstance(leaf, Tensor):
            copied[node] = leaf
            continue
        if node.op == "placeholder":
            inputs.append(node.name)
        if isinstance(node.target, torch._ops.HigherOrderOperator) and "set_grad_enabled" in str(node.target):
            copied[node] = _inlined(source, graph, node, copied)
        elif not _writes_in_vain(node):
            copied[node] = _copy(graph, node, copied)
    module = fx.GraphModule(source, graph, class_name="Evaluation")
    return module, tuple(inputs)


def _copy(graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, Any], owner: str = "") -> Any:
    """A node in evaluation form, in the graph that is being made; `owner` as in `_made`."""
    args: Any = fx.node.map_arg(node.args, copied.__getitem__)
    kwargs: Any = fx.node.map_arg(dict(node.kwargs), copied.__getitem__)
    if node.target is operator.getitem and isinstance(args[0], (tuple, list)):  # of what an inlined body returned
        target: Any = torch.ops.aten.alias.default
        return _made(graph, node, target, (args[0][args[1]],), {})
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        given = {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
        packet = str(node.target).removeprefix("aten.").partition(".")[0]
        if packet in _MEANS and torch.Tag.nondeterministic_seeded in node.target.tags:
            return _mean(graph, node, given, _MEANS[packet](given), owner)
        names = [a.name for a in schema]
        for name, value in _settings(given).items():
            if names.index(name) < len(args):
                args = (*args[: names.index(name)], value, *args[names.index(name) + 1 :])
            else:
                kwargs[name] = value
    return _made(graph, node, node.target, args, kwargs, owner)


def _made(graph: fx.Graph, node: fx.Node, target: Any, args: Any, kwargs: Any, owner: str = "") -> fx.Node:
    """A node that stands for `node`. owner: the operation of the LocalGraph that it is a part of."""
    made = graph.create_node(node.op, target, args, kwargs, node.name, node.type)
    made.meta = {**node.meta, OWNER: owner or node.name}
    return made


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operator that differ when the model evaluates."""
    lowered: dict[str, Any] = {name: False for name in _FLAGS if given.get(name) is True}
    if "running_mean" in given and given["running_mean"] is None:  # statistics of the batch in either mode
        lowered.clear()
    if given.get("dropout_p", 0.0):
        lowered["dropout_p"] = 0.0
    return lowered


def _mean(graph: fx.Graph, node: fx.Node, given: Mapping[str, Any], value: Any, owner: str) -> fx.Node:
    """The mean of a random draw, as a tensor of the draw's shape and type."""
    if isinstance(value, fx.Node):  # a tensor of means: the probabilities of a Bernoulli draw
        return _made(graph, node, torch.ops.aten.clone.default, (value,), {}, owner)
    if "self" in given:
        return _made(graph, node, torch.ops.aten.full_like.default, (given["self"], value), {}, owner)
    options = {name: option for name, option in given.items() if name in ("dtype", "layout", "device", "pin_memory")}
    return _made(graph, node, torch.ops.aten.full.default, (given["size"], value), options, owner)


def _inlined(source: fx.GraphModule, graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, Any]) -> Any:
    """What the body of a `no_grad` block returns, its operations written into the graph."""
    _, body, *values = node.args
    assert isinstance(body, fx.Node)
    inner: fx.GraphModule = source.get_submodule(str(body.target))  # type: ignore[assignment]
    given = iter(values)
    known: dict[fx.Node, Any] = {}
    for operation in inner.graph.nodes:
        if operation.op == "placeholder":
            known[operation] = fx.node.map_arg(next(given), copied.__getitem__)
        elif operation.op == "output":
            return fx.node.map_arg(operation.args[0], known.__getitem__)
        else:
            known[operation] = _copy(graph, operation, known, node.name)
    raise AssertionError("a graph without an output")


def _writes_in_vain(node: fx.Node) -> bool:
    """True for a node that only writes states which no later node reads, such as BatchNorm's counter."""
    states = written_states(node)
    if not states or node.users:
        return False
    written = {str(state.target) for state in states}
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    readers = [user for n in node.graph.find_nodes(op="get_attr") if str(n.target) in written for user in n.users]
    return all(order[reader] <= order[node] for reader in readers)


# The comparison with the model.


def _call(model: nn.Module, arguments: Arguments) -> Call:
    """Call the model in evaluation mode; it is left as it was."""
    modes = [(module, module.training) for module in model.modules()]
    inputs = arguments.map(torch.clone)
    try:
        with preserved(model), torch.no_grad():
            model.eval()
            returned, spec = pytree.tree_flatten(model(*inputs.args, **inputs.kwargs))
    finally:
        for module, mode in modes:
            module.training = mode
    returned = [x.clone() if isinstance(x, Tensor) else x for x in returned]
    return Call(tuple(arguments.tensors), tuple(x for x in returned if isinstance(x, Tensor)), tuple(returned), spec)


def _further(traced: TracedModel, graph: LocalGraph, model: nn.Module) -> Arguments:
    """Arguments of another call: one more row where the batch size is open, else the rows in another order."""
    arguments = traced.arguments
    turned = arguments.map(lambda x: x.roll(1, 0) if x.dim() > 0 else x)
    types = [item.type for item in graph.inputs if item.type is not None]
    if any(t.shape and not isinstance(t.shape[0], str) for t in types):
        return turned
    grown = turned.map(lambda x: torch.cat([x, x[:1]]) if x.dim() > 0 else x)
    try:
        _call(model, grown)
    except Exception:  # the rows of one input count those of another, as in a graph's edges
        return turned
    return grown


def _returned(module: fx.GraphModule, model: nn.Module, calls: tuple[Call, ...]) -> tuple[int, ...]:
    """The places among the trace's outputs of the tensors that the model returns when it evaluates."""
    candidates: list[set[int]] = []
    for call in calls:
        with preserved(model), torch.no_grad():
            found = module(*(x.clone() for x in call.inputs))
        alike = [{i for i, x in enumerate(found) if isinstance(x, Tensor) and difference(x, y) < TOLERANCE}
                 for y in call.outputs]  # fmt: skip
        candidates = [a & b for a, b in zip(candidates, alike, strict=True)] if candidates else alike
    places = [i for i, x in enumerate(found) if isinstance(x, Tensor)]
    if len(places) == len(candidates) and all(i in known for i, known in zip(places, candidates, strict=True)):
        return tuple(places)
    for number, known in enumerate(candidates):
        if not known:
            raise InputError(
                f"in evaluation mode {type(model).__name__} computes its output {number} in another way than in "
                "training mode",
                why="its forward asks self.training, or draws random numbers in evaluation mode too, so that the "
                "partition of the training graph does not fit",
                remedy="let forward do the same in both modes (dropout, normalizations and noise aside)",
            )
    return tuple(min(known) for known in candidates)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest entry of `expected`; inf if they can't match."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if found.numel() == 0 or torch.equal(found, expected):
        return 0.0
    a, b = found.detach().to(torch.float64), expected.detach().to(torch.float64)
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(7.7), b[~finite].nan_to_num(7.7)) or not a[finite].isfinite().all():
        return float("inf")
    scale = max(float(b[finite].abs().max()) if finite.any() else 0.0, 1e-30)
    return float((a[finite] - b[finite]).abs().max()) / scale if finite.any() else 0.0


def _require_plain(traced: TracedModel, graph: LocalGraph) -> None:
    """Raises InputError for what only Python can run."""
    for node in traced.module.graph.find_nodes(op="call_module"):
        leaf = traced.module.get_submodule(str(node.target))
        if isinstance(leaf, OpaqueLeaf):
            raise InputError(
                f"subgraph {graph.owner[node.name]!r} holds an opaque leaf, which no list of operators stands for",
                where=f"operation {node.name}, module {leaf.path}",
                why="no tracer sees through it: its control flow depends on the data",
                remedy="write it with tensor operations (torch.where instead of if), or export the rest of the model",
            )
    if has_guards(traced.module):
        raise InputError(
            f"{graph.name} was recorded, and its graph holds only for data that take the recorded path",
            why="its control flow depends on the data; on other data the recorded operators compute wrong values",
            remedy="write it with tensor operations (torch.where instead of if)",
        )


def marked(evaluation: Evaluation, graph: LocalGraph, mark: Callable[[Any, str], Any]) -> fx.GraphModule:
    """The graph with a call `mark(value, name)` at every tensor that leaves a subgraph.

    Values stay unmarked for the readers in their own subgraph.
    """
    result, copied, outside = fx.Graph(), dict[fx.Node, fx.Node](), dict[fx.Node, fx.Node]()
    makers = {output.value: subgraph.name for subgraph in graph.subgraphs for output in subgraph.outputs}
    for node in evaluation.module.graph.nodes:
        reader = graph.owner.get(node.meta.get(OWNER, node.name), "")

        def read(value: fx.Node, reader: str = reader) -> fx.Node:
            maker = makers.get(value.name, reader)
            if maker == reader or graph.type(value.name) is None:  # not one tensor
                return copied[value]
            if value not in outside:  # made for its first reader: by then no write to it is outstanding
                outside[value] = result.call_function(mark, (copied[value], value.name))
            return outside[value]

        copied[node] = result.node_copy(node, read)
    return fx.GraphModule(evaluation.module, result, class_name="Evaluation")
