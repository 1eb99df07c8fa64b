"""A traced graph as JSON: every node with all its arguments, so that two traces can be compared or one run."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from graphlocal.artefact.document import Doc, shown
from graphlocal.artefact.operators import find, keywords, name_of
from graphlocal.artefact.values import decode, encode, needs_model
from graphlocal.opaque import OpaqueLeaf

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,300}")
_STATE = re.compile(r"[^\"'\\\x00-\x1f\x7f-\x9f{}]{1,1000}")
"""Names of nodes and tensors become part of the code that torch.fx writes, so they can't hold quotes or the like."""
_DEEPEST = 4


def graph_document(module: fx.GraphModule) -> list[dict[str, Any]]:
    """The nodes of a graph, in order."""
    return [_node_document(module, node) for node in module.graph.nodes]


def _node_document(module: fx.GraphModule, node: fx.Node) -> dict[str, Any]:
    if node.op == "get_attr":
        value = _attribute(module, str(node.target))
        body = graph_document(value) if isinstance(value, fx.GraphModule) else None
        return {"name": node.name, "op": "state", "target": node.target, "body": body}
    if node.op == "placeholder":
        return {"name": node.name, "op": "input", "target": node.target}
    if node.op == "output":
        return {"name": node.name, "op": "output", "args": encode(node.args[0])}
    if node.op == "call_module":
        leaf = _attribute(module, str(node.target))
        path = leaf.path if isinstance(leaf, OpaqueLeaf) else type(leaf).__qualname__
        return {"name": node.name, "op": "leaf", "target": path, "args": encode(tuple(node.args))}
    return {
        "name": node.name,
        "op": "call",
        "target": name_of(node.target),
        "args": encode(list(node.args)),
        "kwargs": {name: encode(value) for name, value in node.kwargs.items()},
    }


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


@dataclass(frozen=True)
class ReadGraph:
    """states: the tensors that the graph names. bodies: the graphs of its higher-order operators, by their names."""

    graph: fx.Graph
    states: frozenset[str]
    bodies: dict[str, fx.GraphModule]


def read_graph(doc: Doc, depth: int = 0) -> ReadGraph:
    """The graph that `graph_document` wrote.

    Raises FileFormatError, and NeedsModel, naming it, for a part that only the model's code has.
    """
    if depth > _DEEPEST:
        raise doc.error("graphs within graphs within graphs")
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    states: set[str] = set()
    bodies: dict[str, fx.GraphModule] = {}
    listed = doc.array()
    if not listed or _op(listed[-1]) != "output" or sum(_op(node) == "output" for node in listed) > 1:
        raise doc.error("expected one output, as the last node")
    for item in listed:
        op = _op(item)
        if op == "output":
            _, _, args = item.fields("name", "op", "args")
            graph.output(_output(args, nodes, inner=depth > 0))
            break
        node = _read_node(item, op, graph, nodes, states, bodies, depth)
        if node.op == "placeholder" and any(n.op == "call_function" for n in nodes.values()):
            raise item.error("inputs come first")
        nodes[node.name] = node
    return ReadGraph(graph, frozenset(states), bodies)


def _op(item: Doc) -> str:
    found = item.value.get("op") if isinstance(item.value, dict) else None
    return Doc(found, item.place).one_of(("input", "state", "call", "leaf", "output"))


def _output(args: Doc, nodes: Mapping[str, fx.Node], *, inner: bool) -> Any:
    value = decode(args, nodes)
    if not inner and not isinstance(value, tuple):
        raise args.error("expected a tuple")
    return value


def _read_node(item: Doc, op: str, graph: fx.Graph, nodes: dict[str, fx.Node], states: set[str],
               bodies: dict[str, fx.GraphModule], depth: int) -> fx.Node:  # fmt: skip
    if op == "leaf":
        _, _, target, _ = item.fields("name", "op", "target", "args")
        raise needs_model(f"the submodule {target.text()!r:.100} is an opaque leaf, which only its own code can run")
    if op == "call":
        name, _, target, args, kwargs = item.fields("name", "op", "target", "args", "kwargs")
        function = find(target.text())
        allowed = keywords(function)
        named = {Doc(key, kwargs.place).one_of(allowed): decode(value, nodes) for key, value in kwargs.items()}
        made = graph.create_node(
            "call_function", function, tuple(decode(x, nodes) for x in args.array()), named, _name(name, nodes)
        )
    elif op == "state":
        name, _, target, body = item.fields("name", "op", "target", "body")
        if body.value is None:
            if not _STATE.fullmatch(target.text()) or not all(target.text().split(".")):
                raise target.error(f"{shown(target.value)} can't be the name of a tensor")
            states.add(target.text())
        else:
            inner = read_graph(body, depth + 1)
            if inner.states:
                raise body.error("a graph within a graph has no tensors of its own")
            bodies[_name(target, bodies)] = fx.GraphModule(dict(inner.bodies), inner.graph, class_name="Body")
        made = graph.create_node("get_attr", target.text(), (), {}, _name(name, nodes))
    else:
        name, _, target = item.fields("name", "op", "target")
        made = graph.create_node("placeholder", _name(target, ()), (), {}, _name(name, nodes))
    if made.name != name.text():
        raise name.error(f"no node can be called {name.text()!r}")
    return made


def _name(doc: Doc, taken: Any) -> str:
    """A new name of ASCII letters, digits and underscores, which code can hold."""
    name = doc.text()
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or name == "self" or name in taken:
        raise doc.error(f"{shown(name)} is not a name, or the name of another node")
    return name


def first_difference(stored: list[dict[str, Any]], now: list[dict[str, Any]]) -> tuple[int, str] | None:
    """The number of the first node that differs, and what differs there; None for equal graphs."""
    for i, (a, b) in enumerate(zip(stored, now, strict=False)):
        if a != b:
            parts = [part for part in ("op", "target", "args", "kwargs", "name", "body") if a.get(part) != b.get(part)]
            return i, f"{_call(a, parts)} when it was saved, {_call(b, parts)} now"
    if len(stored) != len(now):
        at = min(len(stored), len(now))
        return at, f"{len(stored)} operations when it was saved, {len(now)} now"
    return None


def _call(node: dict[str, Any], parts: list[str]) -> str:
    target = str(node.get("target", node.get("op")))
    if "args" not in parts and "kwargs" not in parts:
        return target if node.get("op") in ("call", "leaf") else f"{node.get('op')} {target}"
    return f"{target}({', '.join([*map(_plain, node.get('args') or []), *(node.get('kwargs') or {})])})"[:200]


def _plain(value: Any) -> str:
    """An argument, short."""
    if isinstance(value, dict) and len(value) == 1:
        (inner,) = value.values()
        return _plain(inner)
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, list) else str(value)
