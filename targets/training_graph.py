"""The training graph as an object: put together from its pieces, and cut at the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn


@dataclass(frozen=True)
class TrainingGraph:
    """What the eager target emits.

    module: the whole step. weights: names of the trainable parameters whose gradients it returns, in order;
    feedback: names of the learned feedback maps, likewise. loss: the node at which the loss is taken.
    """

    module: fx.GraphModule
    weights: tuple[str, ...]
    feedback: tuple[str, ...]
    loss: str


ROOTS = ("original", "error_weights", "constants", "lifted")
"""The modules below which a training graph looks up tensors: the user's model, the maps E, traced constants."""


def roots_of(module: fx.GraphModule) -> dict[str, nn.Module]:
    """The roots that a training graph has, by name."""
    return {key: child for key, child in module.named_children() if key in ROOTS}


def assemble(graph: fx.Graph, modules: dict[str, nn.Module], roots: dict[str, nn.Module], name: str) -> fx.GraphModule:
    """A GraphModule whose attributes below `roots` are looked up when it runs, not copied."""
    holder = nn.Module()
    for key, module in (*modules.items(), *roots.items()):
        holder.add_module(key, module)
    result = fx.GraphModule(holder, graph, class_name=name)
    for key, module in roots.items():
        result._modules[key] = module
    return result


def split(training: TrainingGraph) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The training graph cut at the loss, as (forward pass, error pass).

    forward_pass(*inputs) -> (outputs, saved list); error_pass(saved, errors, [apply,] retain[, labels]) -> what follows
    the outputs in the training graph's result. The error pass lets go of each saved value after its last reader, and
    leaves `saved` empty, unless it retains.
    """
    nodes = list(training.module.graph.nodes)
    at = next(i for i, node in enumerate(nodes) if node.name == training.loss)
    before = [node for node in nodes[:at] if node.name not in _GIVEN_AFTER]
    after = nodes[at + 1 :]
    reading = {node for node in after if node.op != "output"}
    saved = [n for n in before if n.op != "get_attr" and not reading.isdisjoint(n.users)]
    outputs = nodes[at].args[1]
    forward = _forward_pass(before, outputs, saved)
    error = _error_pass(nodes, at, saved)
    return _like(training.module, forward, "ForwardPass"), _like(training.module, error, "ErrorPass")


_GIVEN_AFTER = ("loss", "apply", "retain", "labels_of_heads", "losses_of_samples")
"""Arguments of the training graph that only what follows the loss reads."""


def _forward_pass(before: list[fx.Node], outputs: Any, saved: list[fx.Node]) -> fx.Graph:
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    returned: set[fx.Node] = set()
    fx.map_arg(outputs, returned.add)
    for node in before:
        if node.op != "get_attr" or node in returned or any(user in before for user in node.users):
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output((fx.map_arg(outputs, copied.__getitem__), [copied[node] for node in saved]))
    return graph


def _error_pass(nodes: list[fx.Node], at: int, saved: list[fx.Node]) -> fx.Graph:
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    store, copied[nodes[at]] = graph.placeholder("saved"), graph.placeholder("errors")
    for node in nodes[:at]:
        if node.op == "placeholder" and node.name in _GIVEN_AFTER[1:]:
            copied[node] = graph.node_copy(node)
            if node.name == "retain":
                retain = copied[node]
    position = {node: i for i, node in enumerate(saved)}
    for node in nodes[at + 1 : -1]:
        for source in node.all_input_nodes:
            if source not in copied and source.op == "get_attr":
                copied[source] = graph.node_copy(source)
            elif source not in copied:
                copied[source] = graph.call_function(take, (store, position[source], retain))
        if node.op != "get_attr":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    result: Any = nodes[-1].args[0]
    fused = any(node.name == "apply" for node in nodes[:at])
    graph.output(() if fused else fx.map_arg(result[1:], copied.__getitem__))
    return graph


def take(saved: list[Any], index: int, retain: bool) -> Any:
    """A saved value, which the list lets go of unless it is retained for another error pass."""
    value = saved[index]
    if not retain:
        saved[index] = None
    return value


def release(saved: list[Any], retain: bool) -> None:
    """Let go of all saved values, unless they are retained."""
    if not retain:
        saved.clear()


def _like(module: fx.GraphModule, graph: fx.Graph, name: str) -> fx.GraphModule:
    used = {str(n.target) for n in graph.find_nodes(op="call_module")}
    roots = roots_of(module)
    return assemble(graph, {key: module.get_submodule(key) for key in used}, roots, name)
