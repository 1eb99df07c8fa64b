"""Boxes along a model's modules: repeated blocks whole, plain containers layer by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from graphlocal.ir import LocalGraph, Operation
from graphlocal.passes.boxes import Labels, has_weights, is_parametric, module_prefixes, readers_of


@dataclass
class _Module:
    """A module (in one of its calls): its own operations, the modules inside, and its number of weights."""

    path: str
    operations: list[Operation]
    own: int = 0
    weights: int = 0
    children: dict[str, _Module] | None = None


def module_boxes(graph: LocalGraph, operations: Sequence[Operation], root: str = "") -> Labels:
    """Boxes along the modules below `root`: repeated blocks whole, plain containers layer by layer.

    A module is split into its parts if it is the root, holds a stack (two or more parts in a row, numbered or of
    the same structure, with two or more weights each, such as `layer1.0, layer1.1`), is a plain container that is
    not itself part of a stack, or holds more than half of all weights. What is not split is one box.
    """
    tree = _module_tree(graph, operations, root)
    boxes: dict[str, list[Operation]] = {}
    _split(tree, tree.weights, False, graph, boxes, force=True)
    found = {op.name: path for path, members in boxes.items() for op in members}
    return _merge_normalizations(graph, operations, found)


def _module_tree(graph: LocalGraph, operations: Sequence[Operation], root: str) -> _Module:
    top = _Module(root, [], children={})
    depth = root.count(".") + 1 if root else 0
    for op in operations:
        node = top
        prefixes = module_prefixes(op)
        inside = prefixes[depth:] if not root or root in prefixes else []
        for path in inside:
            assert node.children is not None
            node.operations.append(op)
            node.weights += has_weights(graph, op)
            node = node.children.setdefault(path, _Module(path, [], children={}))
        node.operations.append(op)
        node.weights += has_weights(graph, op)
        node.own += bool(node.children is not None)
    return top


def _split(module: _Module, total: int, in_stack: bool, graph: LocalGraph,
           boxes: dict[str, list[Operation]], force: bool = False) -> None:  # fmt: skip
    assert module.children is not None
    holds = _holds_stack(module, graph, by_structure=not in_stack)
    plain = module.own == 0 and not in_stack and module.weights > 1
    large = not in_stack and module.weights > 1 and 2 * module.weights > total
    if not module.children or not (force or holds or plain or large):
        boxes[module.path] = module.operations
        return
    stacked = {child.path for child in _stack(module, graph, by_structure=not in_stack)}
    for child in module.children.values():
        _split(child, total, in_stack or child.path in stacked, graph, boxes)


def _holds_stack(module: _Module, graph: LocalGraph, by_structure: bool) -> bool:
    assert module.children is not None
    inside = (_holds_stack(child, graph, by_structure) for child in module.children.values())
    return bool(_stack(module, graph, by_structure)) or any(inside)


def _stack(module: _Module, graph: LocalGraph, by_structure: bool) -> list[_Module]:
    """The parts with two or more weights each that run one after the other and are alike.

    Alike by number (`layer1`, `layer2`, or two calls of one module), or by structure: the same operations.
    """
    assert module.children is not None
    families: dict[object, list[_Module]] = {}
    for child in module.children.values():
        if child.weights < 2:
            continue
        name, _, call = child.path.rpartition(".")[2].partition("@")
        stem = re.fullmatch(r"(.*?)\d+", name)
        if stem or call:
            families.setdefault(stem[1] if stem else name, []).append(child)
        elif by_structure:
            families.setdefault(tuple(op.target for op in child.operations), []).append(child)
    for family in families.values():
        if len(family) > 1 and _runs_before(family[0], family[1], graph):
            return family
    return []


def _runs_before(first: _Module, second: _Module, graph: LocalGraph) -> bool:
    """True if the second module depends on the first: they are in sequence, not side by side."""
    after = nx.descendants(graph.operation_dag, next(op.name for op in first.operations if has_weights(graph, op)))
    return any(op.name in after for op in second.operations)


def _merge_normalizations(graph: LocalGraph, operations: Sequence[Operation], found: Labels) -> Labels:
    """A normalization without weights goes with the layer before it, or else with what reads it."""
    members: dict[str, list[Operation]] = {}
    for op in operations:
        if op.name in found:
            members.setdefault(found[op.name], []).append(op)
    readers = readers_of(operations)
    merged = dict(found)
    for box, inside in members.items():
        parametric = [op for op in inside if is_parametric(graph, op)]
        if any(has_weights(graph, op) for op in parametric):
            continue
        sources = {merged.get(s) for op in inside for s in op.inputs} - {box}
        source = sources.pop() if len(sources) == 1 else None
        single = source is not None and sum(has_weights(graph, op) for op in members.get(source, ())) == 1
        target = source if parametric and single else None
        if target is None and parametric:
            targets = _next_boxes(inside[-1].name, readers, merged, box)
            target = targets.pop() if len(targets) == 1 else None
        for op in inside:
            if target is not None:
                merged[op.name] = target
                members.setdefault(target, []).append(op)
            elif not parametric:
                del merged[op.name]  # an activation or pooling module: `complete` places it
    return merged


def _next_boxes(name: str, readers: dict[str, list[str]], found: Labels, box: str) -> set[str]:
    """The boxes that read a value, looking through operations that are in no box yet."""
    pending, boxes, seen = [name], set(), set()
    while pending:
        for reader in readers.get(pending.pop(), ()):
            if reader in seen:
                continue
            seen.add(reader)
            if reader in found and found[reader] != box:
                boxes.add(found[reader])
            else:
                pending.append(reader)
    return boxes


def has_stack(graph: LocalGraph) -> bool:
    """True if the model's modules hold repeated blocks anywhere."""
    return _holds_stack(_module_tree(graph, graph.operations, ""), graph, by_structure=True)
