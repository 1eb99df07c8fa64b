"""Normalize a traced graph: in-place operations become functional, what computes nothing goes.

The cases, in the order in which an in-place operation m on a tensor t is looked at:

1. t is a buffer or parameter: m stays (an effect), its result is the buffer itself.
2. No other alias of t's memory is read after m, and m has a functional twin: m becomes the twin, and later
   readers of t read the twin's result.
3. Otherwise (a write through a view, `z[:, 0] = 1`): m stays, and every operation that touches that memory up
   to m is put into one group, which a partition never splits.

An input that is called like an argument of the training graph gets another name.
A comparison of a parameter or buffer with an input is turned round, so that the input comes first.
A parameter or buffer that the model returns becomes the result of an operation, so that it belongs to a subgraph.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from graphlocal.guards import is_guard

GROUP = "graphlocal_group"
"""Key in a node's meta: the nodes with an equal value must stay together."""

_CHECKS = ("_assert", "sym_constrain", "_guards_fn", "_check")


def normalize(module: fx.GraphModule) -> None:
    """Normalize in place; outputs, gradients and buffers stay the same (trace checks it)."""
    graph = module.graph
    for node in list(graph.nodes):
        if any(str(node.target).removeprefix("aten.").startswith(check) for check in _CHECKS) and not node.users:
            graph.erase_node(node)
    _drop_dead(graph)
    for node in list(graph.nodes):
        if _writes(node):
            _functionalize(graph, node)
    _group_tuples(graph)
    _compare_with_states(graph)
    _return_results(graph)
    _rename_inputs(graph)
    _drop_dead(graph)
    graph.lint()
    module.recompile()


_TURNED = {
    torch.ops.aten.gt.Tensor: torch.ops.aten.lt.Tensor, torch.ops.aten.lt.Tensor: torch.ops.aten.gt.Tensor,
    torch.ops.aten.ge.Tensor: torch.ops.aten.le.Tensor, torch.ops.aten.le.Tensor: torch.ops.aten.ge.Tensor,
}  # fmt: skip


def _compare_with_states(graph: fx.Graph) -> None:
    """`state > x` as `x < state`: an operation lists its inputs before its states, and the direction matters."""
    for target, turned in _TURNED.items():
        for node in graph.find_nodes(op="call_function", target=target):
            first, second = node.args
            if first.op == "get_attr" and second.op != "get_attr":
                node.target, node.args = turned, (second, first)


def _return_results(graph: fx.Graph) -> None:
    """Let the model return views of its states instead of the states themselves."""
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        for state in [node for node in output.all_input_nodes if node.op == "get_attr"]:
            view = graph.call_function(torch.ops.aten.alias.default, (state,))
            view.meta.update(state.meta)
            output.replace_input_with(state, view)


RESERVED = ("loss", "apply", "retain", "labels_of_heads", "saved", "errors")
"""Arguments of the training graph, so no names for the model's inputs."""


def _rename_inputs(graph: fx.Graph) -> None:
    """Give inputs that are called like an argument of the training graph another name: `loss` becomes `loss_input`."""
    for node in graph.find_nodes(op="placeholder"):
        if node.name in RESERVED:
            node._rename(f"{node.name}_input")
            node.target = node.name


def is_random(node: fx.Node) -> bool:
    """True if the node draws random numbers when it runs in training mode."""
    target = node.target
    if node.op == "call_module":
        return True
    if isinstance(target, torch._ops.HigherOrderOperator):
        return any(is_random(n) for n in _body_nodes(node))
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    settings = {a.name: v for a, v in zip(target._schema.arguments, node.args, strict=False)} | node.kwargs
    if settings.get("train") is False:
        return False
    return not any(settings.get(name, 1) == 0 for name in ("p", "dropout", "dropout_p")) and (
        "dropout_p" in settings or "scaled_dot_product" not in str(target)
    )


def written_states(node: fx.Node) -> list[fx.Node]:
    """The `get_attr` nodes whose tensors the node changes."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        inner = {n for n in _body_nodes(node) if _writes(n) or _norm_buffers(n)}
        owner: Any = node.graph.owning_module
        bodies = {name for name, _ in owner.named_modules()}
        return [a for a in node.all_input_nodes if a.op == "get_attr" and a.target not in bodies] if inner else []
    if _writes(node) and _root(node.args[0]).op == "get_attr":
        return [_root(node.args[0])]
    return _norm_buffers(node)


def _body_nodes(node: Any) -> list[fx.Node]:
    """The nodes of the graphs that a higher-order operator calls."""
    owner = node.graph.owning_module
    bodies = [owner.get_submodule(a.target) for a in node.all_input_nodes
              if a.op == "get_attr" and a.target in dict(owner.named_modules())]  # fmt: skip
    return [inner for body in bodies for inner in body.graph.nodes]


def _norm_buffers(node: fx.Node) -> list[fx.Node]:
    """The running statistics that a normalization updates though its schema does not say so."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return []
    settings = {a.name: v for a, v in zip(target._schema.arguments, node.args, strict=False)} | node.kwargs
    if "running_mean" not in settings or not (settings.get("training") or settings.get("use_input_stats")):
        return []
    return [b for b in (settings["running_mean"], settings["running_var"]) if isinstance(b, fx.Node)]


def _writes(node: fx.Node) -> bool:
    """True if the node is an operator that changes its first argument in place."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.arguments:
        return False
    alias = node.target._schema.arguments[0].alias_info
    return alias is not None and alias.is_write


def _is_view(node: fx.Node) -> bool:
    """True if the node's result may share memory with its first argument."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args:
        return False
    schema = node.target._schema
    if "dropout" in schema.name:
        return not is_random(node)  # dropout that drops nothing returns its input
    return schema.arguments[0].alias_info is not None or schema.name in _MAY_VIEW


_MAY_VIEW = {
    f"aten::{name}"
    for name in (
        "reshape",
        "reshape_as",
        "flatten",
        "contiguous",
        "to",
        "type_as",
        "unflatten",
        "pad",
        "conj",
    )
}


def _root(node: Any) -> fx.Node:
    """The node whose memory this one shares."""
    while (_is_view(node) or _writes(node)) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return cast(fx.Node, node)


def _aliases(root: fx.Node, write: fx.Node) -> list[fx.Node]:
    """The root and all nodes that share its memory but not by way of `write`, in program order."""
    found = {root}
    pending = [root]
    while pending:
        for user in pending.pop().users:
            if user not in found and user is not write and (_is_view(user) or _writes(user)) and user.args[0] in found:
                found.add(user)
                pending.append(user)
    return [node for node in root.graph.nodes if node in found]


def _functionalize(graph: fx.Graph, node: fx.Node) -> None:
    tensor = node.args[0]
    assert isinstance(tensor, fx.Node)
    root = _root(tensor)
    order = {n: i for i, n in enumerate(graph.nodes)}
    if root.op == "get_attr":
        node.replace_all_uses_with(tensor)  # case 1
        return
    aliases = _aliases(root, node)
    read_later = any(
        order[user] > order[node] for a in aliases if a is not tensor for user in a.users if user is not node
    )
    twin = _functional_twin(node)
    if twin is not None and not read_later and root.op != "placeholder":
        node.target = twin  # case 2
        for user in [u for u in tensor.users if order[u] > order[node]]:
            user.replace_input_with(tensor, node)
        return
    before = [a for a in aliases if order[a] < order[node]]  # case 3
    touched = {node, *before, *(u for a in before for u in a.users if order[u] < order[node])}
    for member in touched:
        join(member, root)


def join(node: fx.Node, root: fx.Node) -> None:
    """Put a node into the group of another one, with all that was grouped with either."""
    names = {root.meta.get(GROUP, root.name), node.meta.get(GROUP, node.name)}
    chosen = min(names)
    for other in node.graph.nodes:
        if other.meta.get(GROUP, other.name) in names and (GROUP in other.meta or other in (node, root)):
            other.meta[GROUP] = chosen


def _functional_twin(node: fx.Node) -> torch._ops.OpOverload | None:
    """`aten.add_.Tensor` -> `aten.add.Tensor`, if that gives the same values, type and random numbers."""
    target = node.target
    packet, _, overload = str(target).removeprefix("aten.").partition(".")
    if "uniform" in packet or "normal" in packet or "bernoulli" in packet or not packet.endswith("_"):
        return None
    twin = getattr(getattr(torch.ops.aten, packet[:-1], None), overload, None)
    if not isinstance(twin, torch._ops.OpOverload) or len(twin._schema.arguments) != len(
        target._schema.arguments  # type: ignore[union-attr]
    ):
        return None
    values = [a.meta.get("val") for a in node.all_input_nodes]
    dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.dim() > 0 and v.dtype != torch.bool}
    return twin if len(dtypes) <= 1 else None


def _group_tuples(graph: fx.Graph) -> None:
    """Keep a node that returns several tensors with the nodes that take it apart."""
    for node in graph.nodes:
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            join(node, node.args[0])


def _drop_dead(graph: fx.Graph) -> None:
    """Erase what nobody reads, but for random draws (they move the generator), writes and guards."""
    for node in reversed(list(graph.nodes)):
        kept = node.op in ("placeholder", "output") or _writes(node) or written_states(node)
        if not (node.users or kept or is_random(node) or is_guard(node)):
            graph.erase_node(node)
