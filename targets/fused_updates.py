"""Hand each gradient of a lowered training graph to the optimizer as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from graphlocal.targets.eager import apply_updates
from graphlocal.targets.simplify import VIEWS
from graphlocal.targets.training_graph import TrainingGraph, assemble, roots_of


def with_updates(training: TrainingGraph, label: Callable[[str], str] = str) -> TrainingGraph:
    """A lowered training graph that takes `apply` after `loss`, and calls it instead of returning gradients.

    `apply(names, gradients)` is called for the parameters of a subgraph together, after the last operator that
    reads any of them. label: what to write for each action; parameters whose actions get one label go together.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    returned: Any = graph.graph_copy(training.module.graph, copied)
    for node in graph.nodes:
        node.meta["action"] = label(node.meta.get("action") or "")
    (retain,) = (node for node in graph.find_nodes(op="placeholder") if node.name == "retain")
    with graph.inserting_before(retain):
        apply = graph.placeholder("apply")
    names = (*training.weights, *training.feedback)
    gradients = {n: g for n, g in zip(names, (*returned[1], *returned[2]), strict=True) if g is not None}
    for at, group in _groups(graph, gradients).items():
        with graph.inserting_after(at):
            done = graph.call_function(apply_updates, (apply, group, *(gradients[name] for name in group)))
            done.meta["action"] = at.meta.get("action", "")
    graph.output(fx.map_arg(_outputs(training), copied.__getitem__))
    roots = roots_of(training.module)
    module = assemble(graph, {}, roots, type(training.module).__name__)
    return TrainingGraph(module, training.weights, training.feedback, training.loss)


def _outputs(training: TrainingGraph) -> Any:
    (last,) = training.module.graph.find_nodes(op="output")
    returned: Any = last.args[0]
    return returned[0]


def _groups(graph: fx.Graph, gradients: dict[str, fx.Node]) -> dict[fx.Node, tuple[str, ...]]:
    """The nodes after which parameters are updated, each with the names of its parameters."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    states = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
    last: dict[str, tuple[fx.Node, list[str]]] = {}
    for name, gradient in gradients.items():
        state = states.get(name) or states.get(f"original.{name}")
        at = max([gradient, *(_readers(state) if state else [])], key=position.__getitem__)
        action = at.meta.get("action", "")
        known, members = last.get(action, (at, []))
        last[action] = max(known, at, key=position.__getitem__), [*members, name]
    return {at: tuple(members) for at, members in last.values()}


def _readers(node: fx.Node) -> list[fx.Node]:
    """All nodes that read the memory of a node."""
    found: list[fx.Node] = []
    for user in node.users:
        if user.op != "output":
            found.append(user)
            if user.target in VIEWS:
                found += _readers(user)
    return found
