"""Boxes along a model's modules: repeated blocks whole, plain containers layer by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from graphlocal.ir import LocalGraph, Operation
from graphlocal.passes.boxes import Labels, has_weights, is_parametric, module_prefixes, readers_of


@dataclass(eq=False)
class _Module:
    """A module (in one of its calls): its operations, the modules inside, and how many of each kind.

    own: operations of the module itself, in none of its children. computing: those of them that calculate.
    weights: operations with weights.
    """

    path: str
    operations: list[Operation] = field(default_factory=list)
    own: int = 0
    computing: int = 0
    weights: int = 0
    children: dict[str, _Module] = field(default_factory=dict)
    stack: list[_Module] | None = None


def module_boxes(
    graph: LocalGraph, operations: Sequence[Operation], root: str = "", reasons: dict[str, str] | None = None
) -> Labels:
    """Boxes along the modules below `root`: repeated blocks whole, plain containers layer by layer.

    A module is split into its parts if it is the root, holds a stack (two or more parts in a row, numbered or of
    the same structure, with two or more weights each, such as `layer1.0, layer1.1`), is a plain container that is
    not itself part of a stack, or holds more than half of all weights. What is not split is one box. Of the modules
    of a stack, only those that calculate nothing themselves and hold a stack of about equal parts are split: a
    stage of blocks, not a block with two attentions. Modules that are alike and run side by side, such as experts,
    are boxes as the modules of a stack are.
    reasons: is given, for each box, why it is one.
    """
    tree = _module_tree(graph, operations, root)
    boxes: dict[str, list[Operation]] = {}
    why = {} if reasons is None else reasons
    position = {op.name: i for i, op in enumerate(graph.operations)}
    _Splitter(graph, position, tree.weights, boxes, why).split(tree, "the whole model", force=True)
    found = {op.name: path for path, members in boxes.items() for op in members}
    return _merge_normalizations(graph, operations, found)


def has_stack(graph: LocalGraph) -> bool:
    """True if the model's modules hold repeated blocks anywhere."""
    position = {op.name: i for i, op in enumerate(graph.operations)}
    tree = _module_tree(graph, graph.operations, "")
    return _Splitter(graph, position, tree.weights, {}, {}).holds_stack(tree)


def _module_tree(graph: LocalGraph, operations: Sequence[Operation], root: str) -> _Module:
    top = _Module(root)
    depth = root.count(".") + 1 if root else 0
    for op in operations:
        node = top
        prefixes = module_prefixes(op)
        weight = has_weights(graph, op)
        for path in prefixes[depth:] if not root or root in prefixes else []:
            node.operations.append(op)
            node.weights += weight
            node = node.children.setdefault(path, _Module(path))
        node.operations.append(op)
        node.weights += weight
        node.own += 1
        node.computing += op.flops > 0
    return top


@dataclass
class _Splitter:
    """Walks the module tree and fills `boxes` and `reasons`. total: the weights of the whole tree."""

    graph: LocalGraph
    position: dict[str, int]
    total: int
    boxes: dict[str, list[Operation]]
    reasons: dict[str, str]

    def split(self, module: _Module, reason: str, in_stack: bool = False, force: bool = False) -> None:
        holds = self.holds_stages(module) if in_stack else self.holds_stack(module)
        plain = module.own == 0 and not in_stack and module.weights > 1
        large = not in_stack and module.weights > 1 and 2 * module.weights > self.total
        if not module.children or not (force or holds or plain or large):
            self.boxes[module.path] = module.operations
            self.reasons[module.path] = reason
            return
        stack = self.stack(module)
        side_by_side = next((f for f in _families(module) if len(f) > 1 and f != stack), [])
        where = module.path or "the model"
        reasons = {child: f"one of {len(side_by_side)} modules side by side in {where}" for child in side_by_side}
        reasons |= {child: f"one of {len(stack)} blocks in a row in {where}" for child in stack}
        for child in module.children.values():
            self.split(child, reasons.get(child, f"a part of {where}"), in_stack or child in reasons)

    def holds_stages(self, module: _Module) -> bool:
        """True for a module of a stack that is itself a sequence of blocks."""
        if module.computing:
            return False
        stack = self.stack(module)
        sizes = [child.weights for child in stack]
        even = bool(stack) and max(sizes) < 2 * min(sizes)
        return even or any(self.holds_stages(child) for child in module.children.values())

    def holds_stack(self, module: _Module) -> bool:
        return bool(self.stack(module)) or any(self.holds_stack(child) for child in module.children.values())

    def stack(self, module: _Module) -> list[_Module]:
        """The parts with two or more weights each that run one after the other and are alike.

        Alike by number (`layer1`, `layer2`, or two calls of one module), or by the kinds of their operations: the
        first of several residual blocks may have one projection more.
        """
        if module.stack is None:
            found = (f for f in _families(module) if len(f) > 1 and self._runs_before(f[0], f[1]))
            module.stack = next(found, [])
        return module.stack

    def _runs_before(self, first: _Module, second: _Module) -> bool:
        """True if the second module depends on the first: they are in sequence, not side by side."""
        start = next(op.name for op in first.operations if has_weights(self.graph, op))
        reached, goal = {start}, {op.name for op in second.operations}
        last = max(self.position[name] for name in goal)
        for op in self.graph.operations[self.position[start] + 1 : last + 1]:
            if not reached.isdisjoint(op.inputs):
                if op.name in goal:
                    return True
                reached.add(op.name)
        return False


def _families(module: _Module) -> list[list[_Module]]:
    families: dict[object, list[_Module]] = {}
    for child in module.children.values():
        if child.weights < 2:
            continue
        name, _, call = child.path.rpartition(".")[2].partition("@")
        stem = re.fullmatch(r"(.*?)\d+", name)
        if stem or call:
            families.setdefault(stem[1] if stem else name, []).append(child)
        else:
            families.setdefault(frozenset(op.target for op in child.operations), []).append(child)
    return list(families.values())


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
