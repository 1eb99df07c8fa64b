"""The inductor target: the two passes of a lowered training graph as functions that `torch.compile` has compiled.

A pass becomes a pure function of tensors first: the states that it looks up and the values saved for it are arguments.
The error pass of a fused step is compiled in a few pieces, so that gradients need not wait for each other in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphlocal.targets.eager import apply_updates
from graphlocal.targets.fused_updates import with_updates
from graphlocal.targets.lowered import NotLowered
from graphlocal.targets.training_graph import TrainingGraph, split, take

Values = dict[fx.Node, Any]

PIECES = 8
"""At most so many pieces of a fused error pass: inductor fuses within each, and each is called from Python."""

LEAST = 2**20
"""Gradients of fewer numbers are not worth a piece of their own, which takes dynamo and the optimizer a tenth of a
millisecond each."""


@dataclass(frozen=True)
class _Function:
    """function(*states, *inputs) -> results; states: where they are looked up. inputs, results: nodes of the pass."""

    function: Callable[..., Any]
    states: tuple[tuple[nn.Module, str], ...]
    inputs: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]

    def __call__(self, values: Values) -> None:
        """Work the results out of `values`, and add them there."""
        with torch.no_grad():
            found = self.function(
                *(getattr(owner, name) for owner, name in self.states), *map(values.__getitem__, self.inputs)
            )
        values.update(zip(self.results, found, strict=True))


@dataclass(frozen=True)
class _Piece:
    """A part of a fused error pass.

    names, gradients: of the parameters that are updated after it. freed: what nothing reads afterwards.
    """

    function: _Function
    names: tuple[str, ...]
    gradients: tuple[fx.Node, ...]
    freed: tuple[fx.Node, ...]


def compiled_passes(lowered: TrainingGraph) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """forward(*leaves), error(saved, errors, retain), and the fused error(saved, errors, apply, retain).

    The first calls take from seconds to minutes. Random numbers are those that the same operators draw elsewhere.

    Raises NotLowered for sparse gradients, which inductor does not take.
    """
    forward_graph, error_graph = split(lowered)
    _require_dense(lowered, _returned(error_graph))
    forward, error = _whole(forward_graph), _whole(error_graph)
    fused_graph = split(with_updates(lowered))[1]
    given, given_fused, pieces = _given(error_graph), _given(fused_graph), _pieces(fused_graph)
    leaves_of = forward_graph.graph.find_nodes(op="placeholder")
    (outputs, saved_values), gradients = _returned(forward_graph), _returned(error_graph)

    def run_forward(*leaves: Any) -> tuple[list[Any], list[Any]]:
        values = dict(zip(leaves_of, leaves, strict=True))
        forward(values)
        return _read(values, outputs), _read(values, saved_values)

    def run_error(saved: list[Any], errors: Sequence[Tensor | None], retain: bool) -> Any:
        values = _taken(given, saved, errors, retain)
        error(values)
        return tuple(_read(values, group) for group in gradients)

    def run_fused(saved: list[Any], errors: Sequence[Tensor | None], apply: Callable[..., Any], retain: bool) -> None:
        values = _taken(given_fused, saved, errors, retain)
        for piece in pieces:
            piece.function(values)
            if piece.names:
                apply(piece.names, tuple(map(values.__getitem__, piece.gradients)))
            for node in piece.freed:
                values.pop(node, None)

    return run_forward, run_error, run_fused


def _require_dense(lowered: TrainingGraph, gradients: Any) -> None:
    named = zip((*lowered.weights, *lowered.feedback), (*gradients[0], *gradients[1]), strict=True)
    for name, gradient in named:
        value = None if gradient is None else gradient.meta.get("val")
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            raise NotLowered(
                f"the gradient of {name.removeprefix('original.')} is sparse, and inductor takes dense ones only",
                remedy="make it dense (nn.Embedding(sparse=False)), or choose another target",
            )


def _whole(module: fx.GraphModule) -> _Function:
    """A pass, compiled as one function."""
    results = module.graph.output_node().all_input_nodes
    return _compiled(module, [node for node in _calls(module) if not _is_given(node)], results)


def _pieces(module: fx.GraphModule) -> list[_Piece]:
    """A fused error pass, cut behind updates where enough gradients have come together."""
    calls = [node for node in _calls(module) if not _is_given(node)]
    enough = max(LEAST, sum(map(_numel, calls)) // PIECES)
    parts: list[list[fx.Node]] = [[]]
    numbers = 0
    for node in calls:
        parts[-1].append(node)
        numbers += _numel(node)
        if numbers >= enough:
            parts.append([])
            numbers = 0
    parts = [part for part in parts if part]
    last = {source: i for i, part in enumerate(parts) for node in part for source in node.all_input_nodes}
    return [_piece(module, part, i, last) for i, part in enumerate(parts)]


def _piece(module: fx.GraphModule, part: list[fx.Node], place: int, last: dict[fx.Node, int]) -> _Piece:
    updates: list[Any] = [node for node in part if node.target is apply_updates]
    names = tuple(name for update in updates for name in update.args[1])
    gradients = tuple(gradient for update in updates for gradient in update.args[2:])
    operators = [node for node in part if node.target is not apply_updates]
    later = {node for node, i in last.items() if i > place} | set(gradients)
    results = [node for node in operators if node in later]
    freed = tuple(node for node, i in last.items() if i == place)
    return _Piece(_compiled(module, operators, results), names, gradients, freed)


def _numel(node: fx.Node) -> int:
    """The numbers of the gradients that a node hands on."""
    gradients: Any = node.args[2:] if node.target is apply_updates else ()
    return sum(gradient.meta["val"].numel() for gradient in gradients)


def _compiled(module: fx.GraphModule, nodes: Sequence[fx.Node], results: Iterable[fx.Node]) -> _Function:
    """Operators of a pass as a pure function of what they read from outside."""
    graph = fx.Graph()
    inside, results = set(nodes), tuple(results)
    read = dict.fromkeys([*(source for node in nodes for source in node.all_input_nodes), *results])
    states = [node for node in read if node not in inside and node.op == "get_attr"]
    inputs = [node for node in read if node not in inside and node.op != "get_attr"]
    copied = {node: graph.placeholder(node.name) for node in (*states, *inputs)}
    for node in nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in results))
    pure = fx.GraphModule({}, graph, class_name=type(module).__name__)
    places = tuple(_place(module, str(node.target)) for node in states)
    # Dropout is that of the eager target with `fallback_random`. On a CPU inductor turns images channels-last in a
    # graph with convolutions, and not in one with their derivatives only: a pass then reads what the other one saved
    # across the grain, and forward convolutions gain nothing by it.
    values = pytree.tree_leaves([node.meta.get("val") for node in nodes])
    on_cpu = all(value.device.type == "cpu" for value in values if isinstance(value, Tensor))
    options: dict[str, Any] = {"fallback_random": True} | ({"layout_optimization": False} if on_cpu else {})
    function = torch.compile(pure, fullgraph=True, dynamic=False, options=options)
    return _Function(function, places, tuple(inputs), results)


Given = list[tuple[fx.Node, bool, int]]
"""Nodes of an error pass that take one of its arguments: whether an output's error, and the place in the list."""


def _given(module: fx.GraphModule) -> Given:
    calls: list[Any] = [node for node in _calls(module) if _is_given(node)]
    return [(node, _is_error(node), node.args[1]) for node in calls]


def _taken(given: Given, saved: list[Any], errors: Sequence[Tensor | None], retain: bool) -> Values:
    """What an error pass reads of its arguments."""
    values = {node: errors[place] if is_error else saved[place] for node, is_error, place in given}
    if not retain:
        saved.clear()
    return values


def _read(values: Values, items: Sequence[Any]) -> list[Any]:
    return [values[item] if isinstance(item, fx.Node) else item for item in items]


def _calls(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function"]


def _returned(module: fx.GraphModule) -> Any:
    return module.graph.output_node().args[0]


def _is_given(node: fx.Node) -> bool:
    return node.target is take or _is_error(node)


def _is_error(node: fx.Node) -> bool:
    """Whether a node takes one of the outputs' errors."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    return isinstance(source, fx.Node) and source.op == "placeholder" and source.name == "errors"


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, last = name.rpartition(".")
    return module.get_submodule(owner), last
