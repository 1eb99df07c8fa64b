"""A pass of the training graph as one plain Python function.

Calling a module from a graph costs microseconds, and so does looking up `model.layer.weight`; on small models
that is more than the arithmetic. Here the bodies of the subgraphs are written out in the function, the other
pieces are called without `nn.Module.__call__`, and parameters are bound once.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from graphlocal.targets.reuse import NEW, reuse
from graphlocal.targets.scratch import Scratch, lend
from graphlocal.targets.simplify import value_of
from graphlocal.targets.training_graph import release, take

_OPERATOR = re.compile(r"\btorch\.ops\.(\w+)\.(\w+)\.(\w+)(?=\()")


_DIRECT: dict[str, Callable[..., Any]] = {
    f"torch.ops.aten.{name}": function
    for name, function in {
        "t.default": torch.t, "mm.default": torch.mm, "bmm.default": torch.bmm, "addmm.default": torch.addmm,
        "tanh.default": torch.tanh, "relu.default": torch.relu, "sigmoid.default": torch.sigmoid,
        "add.Tensor": torch.add, "sub.Tensor": torch.sub, "mul.Tensor": torch.mul, "div.Tensor": torch.div,
        "addcdiv.default": torch.addcdiv, "clamp_min.default": torch.clamp_min, "sum.dim_IntList": torch.sum,
        "linalg_vector_norm.default": torch.linalg.vector_norm, "view.default": torch.Tensor.view,
        "reshape.default": torch.reshape,
        "transpose.int": torch.transpose, "permute.default": torch.permute, "unsqueeze.default": torch.unsqueeze,
        "expand.default": torch.Tensor.expand, "convolution.default": torch.convolution,
        "linear.default": torch._C._nn.linear,
    }.items()
}  # fmt: skip
"""torch's own functions in place of its operators: the same kernels, called with half the overhead."""


def flatten(module: fx.GraphModule, *, lowered: bool = False, scratch: Scratch | None = None) -> Callable[..., Any]:
    """The function that `module` computes, for as long as the user's model has the same parameter objects.

    Buffers and feedback maps are looked up when it runs. lowered: of operators without autograd, which may write over
    what nothing else reads. scratch: where the stacks of batches lie.
    """
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    bound = SimpleNamespace(**dict(module.named_children()))
    for node in module.graph.nodes:
        if node.op == "call_module":
            piece = module.get_submodule(str(node.target))
            arguments = fx.map_arg(node.args, copied.__getitem__)
            if isinstance(piece, fx.GraphModule):
                copied[node] = _inline(graph, piece, arguments, bound, str(node.target))
            else:
                copied[node] = graph.call_function(piece.forward, arguments)
        elif node.op == "get_attr" and (parameter := _parameter(module, str(node.target))) is not None:
            name = f"parameter{len(vars(bound))}"
            setattr(bound, name, parameter)
            copied[node] = graph.get_attr(name)
        elif node.op == "get_attr" and (table := _table(module, str(node.target))) is not None:
            name, key = str(node.target).split(".")
            setattr(bound, f"{name}_table", table)
            copied[node] = graph.call_function(operator.getitem, (graph.get_attr(f"{name}_table"), key))
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], copied.__getitem__))
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        if node.op == "get_attr":
            copied[node].meta = dict(node.meta)
    _take_apart(graph)
    _take_at_once(graph)
    _join_linear(graph, bound)
    _join_clamped(graph, bound)
    _add_for_sub(graph)
    _bind_numbers(graph, bound)
    if lowered:
        reuse(graph)
    if scratch is not None:
        lend(graph, bound, scratch)
    _cast_by_method(graph)
    return _compile(graph, bound)


def _inline(graph: fx.Graph, body: fx.GraphModule, arguments: Any, bound: SimpleNamespace, name: str) -> Any:
    """The operations of a subgraph in place of its call; returns the tuple of its results."""
    values = dict(zip(body.graph.find_nodes(op="placeholder"), arguments, strict=True))
    setattr(bound, name, body)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return graph.call_function(_results, fx.map_arg(node.args[0], values.__getitem__))
        copy = graph.node_copy(node, values.__getitem__)
        if node.op in ("get_attr", "call_module"):
            copy.target = f"{name}.{node.target}"
        values[node] = copy
    raise AssertionError("a graph has an output")


def _results(*values: Any) -> tuple[Any, ...]:
    return values


def _take_apart(graph: fx.Graph) -> None:
    """Let the readers of a subgraph's results read the values themselves."""
    for node in graph.find_nodes(op="call_function", target=_results):
        for taken in list(node.users):
            taken.replace_all_uses_with(node.args[taken.args[1]])
            graph.erase_node(taken)
        graph.erase_node(node)


def _take_at_once(graph: fx.Graph) -> None:
    """Take what an error pass reads of `saved` out at its start; the function's own names free each value after use."""
    takes = graph.find_nodes(op="call_function", target=take)
    if not takes:
        return
    saved, _, retain = takes[0].args
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        values = [graph.call_function(operator.getitem, (saved, node.args[1])) for node in takes]
        graph.call_function(release, (saved, retain))
    for node, value in zip(takes, values, strict=True):
        value.meta = node.meta
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def _parameter(module: nn.Module, target: str) -> nn.Parameter | None:
    """The parameter of the user's model that a node reads; the runtime watches for a new one."""
    owner, _, name = target.rpartition(".")
    return module.get_submodule(owner)._parameters.get(name) if owner.startswith("original") else None


def _table(module: nn.Module, target: str) -> dict[str, Any] | None:
    """The dictionary in which a feedback map is looked up at each step, past `nn.Module.__getattr__`."""
    owner, _, name = target.rpartition(".")
    maps = module.get_submodule(owner) if owner == "error_weights" else nn.Module()
    tables: tuple[dict[str, Any], ...] = (maps._buffers, maps._parameters)
    return next((table for table in tables if name in table), None)


def _join_linear(graph: fx.Graph, bound: SimpleNamespace) -> None:
    """`addmm(bias, x, t(weight))` of parameters as `linear`: the same kernels without a view made in Python.

    `mm(x, t(weight))` stays: in an error pass both are called anyway, and a kernel's first call takes longest.
    """
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)):
        bias, x, transposed = node.args
        if node.kwargs or not isinstance(transposed, fx.Node) or transposed.target is not torch.ops.aten.t.default:
            continue
        if isinstance(bias, fx.Node) and bias.op == "get_attr" and getattr(bound, str(bias.target)).dim() == 1:
            node.target, node.args = torch.ops.aten.linear.default, (x, transposed.args[0], bias)
            if not transposed.users:
                graph.erase_node(transposed)


def _join_clamped(graph: fx.Graph, bound: SimpleNamespace) -> None:
    """`clamp_min(norm * c, tiny)` as `tiny + c * norm`: the same number in one call, unless it is about as small."""
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten.clamp_min.default)):
        product, least = node.args
        if (
            not isinstance(product, fx.Node)
            or product.target is not torch.ops.aten.mul.Tensor
            or len(product.users) > 1
        ):
            continue
        norm, factor = product.args
        value = node.meta.get("val")
        if not isinstance(norm, fx.Node) or norm.target is not torch.ops.aten.linalg_vector_norm.default:
            continue
        if isinstance(factor, (int, float)) and factor > 0 and _on_cpu(value) and 0 < least <= _tiny(value):
            with graph.inserting_before(node):
                node.args = (_number(graph, bound, least, value.dtype), norm)
            node.target, node.kwargs = torch.ops.aten.add.Tensor, {"alpha": factor}
            graph.erase_node(product)


def _add_for_sub(graph: fx.Graph) -> None:
    """`a - b` as `a + (-1) b`, the same number: `add` is called anyway, and a kernel's first call in a step takes
    microseconds longer than the next ones, since other code has taken its place in the caches.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sub.Tensor):
        if not node.kwargs and isinstance(node.args[1], fx.Node) and _on_cpu(node.meta.get("val")):
            node.target, node.kwargs = torch.ops.aten.add.Tensor, {"alpha": -1}


_CASTS: dict[torch.dtype, Callable[..., Any]] = {
    torch.float32: torch.Tensor.float, torch.float64: torch.Tensor.double,
    torch.bfloat16: torch.Tensor.bfloat16, torch.float16: torch.Tensor.half,
}  # fmt: skip


def _cast_by_method(graph: fx.Graph) -> None:
    """Casts to another dtype and nothing else as methods of tensors, at half the overhead."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default):
        before, after = value_of(node.args[0]), value_of(node)
        if before is None or after is None or before.dtype is after.dtype or after.dtype not in _CASTS:
            continue
        kept = {"dtype": after.dtype, "layout": before.layout, "device": before.device, "pin_memory": False}
        if any(user.target in NEW and user.args[0] is node for user in node.users):
            continue  # a method returns its tensor where a state has the dtype already, and that is not to be written
        if all(key in kept and value == kept[key] for key, value in node.kwargs.items() if value is not None):
            node.target, node.args, node.kwargs = _CASTS[after.dtype], node.args[:1], {}


def _on_cpu(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64)
    )


def _tiny(value: torch.Tensor) -> float:
    return float(torch.finfo(value.dtype).tiny)


def _number(graph: fx.Graph, bound: SimpleNamespace, number: float, dtype: torch.dtype) -> fx.Node:
    """A number as a tensor that is made once."""
    name = f"number{len(vars(bound))}"
    setattr(bound, name, torch.tensor(number, dtype=dtype, device="cpu"))
    return graph.get_attr(name)


def _bind_numbers(graph: fx.Graph, bound: SimpleNamespace) -> None:
    """Numbers that tensors are added to or multiplied with, made into tensors once and not at every call."""
    for target in (torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor):
        for node in list(graph.find_nodes(op="call_function", target=target)):
            value, number = node.meta.get("val"), node.args[1]
            if not node.kwargs and isinstance(number, (int, float)) and _on_cpu(value):
                with graph.inserting_before(node):
                    node.args = (node.args[0], _number(graph, bound, number, value.dtype))


def _compile(graph: fx.Graph, bound: SimpleNamespace) -> Callable[..., Any]:
    code = graph.python_code(root_module="self")
    scope = dict(code.globals)

    def bind(match: re.Match[str]) -> str:
        """The operator behind `torch.ops.aten.mm.default`, under one name and without its Python wrapper."""
        name = "_".join(match.groups())
        namespace, operator, overload = match.groups()
        if match.group(0) in _DIRECT:
            scope[name] = _DIRECT[match.group(0)]
            return name
        scope[name] = getattr(getattr(getattr(torch.ops, namespace), operator), overload)._op
        return name

    exec(_OPERATOR.sub(bind, code.src), scope)  # what fx.GraphModule does with it
    function = scope["forward"]
    return partial(function, bound)
