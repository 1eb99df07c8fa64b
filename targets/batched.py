"""Batches in a lowered training graph: the displacements and updates of isomorphic subgraphs as one computation.

The operators of one member's `D` and `U` are a function of what they read. That function runs once under
`torch.func.vmap`, on the stacked inputs of all members, and is recorded as operators again: a product of matrices
becomes a `bmm`, and an elementwise operator one call for all. Inputs that all members share are not stacked.
Backpropagation can't do this: there the update of a layer waits for the one above.

Equal to the separate updates to rounding: kernels for stacks may add up in another order.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from graphlocal.ir import LocalGraph
from graphlocal.passes.batch import batches
from graphlocal.targets.accesses import Access, annotate
from graphlocal.targets.lowered import Tagging, record
from graphlocal.targets.members import Member, member, piece, value_of
from graphlocal.targets.simplify import VIEWS, simplify
from graphlocal.targets.stacking import Stacking
from graphlocal.targets.training_graph import TrainingGraph, assemble, roots_of

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Stacked:
    """Members that run as one.

    inputs: those of the first member; `shared` says which of them all members have in common. outputs: the places of
    the nodes that are read outside. module(*inputs): the first member's value of each input, or one for each member
    where it is not shared -> a list of each output's values.
    """

    members: tuple[Member, ...]
    shared: tuple[bool, ...]
    outputs: tuple[int, ...]
    module: fx.GraphModule

    def given(self) -> list[fx.Node]:
        """The nodes that `module` takes."""
        found: list[fx.Node] = []
        for i, shared in enumerate(self.shared):
            found += [m.inputs[i] for m in (self.members[:1] if shared else self.members)]
        return found

    def taken(self) -> list[fx.Node]:
        """The nodes that the results of `module` stand for."""
        return [m.nodes[i] for i in self.outputs for m in self.members]


def batched(training: TrainingGraph, graph: LocalGraph, stacking: Stacking) -> tuple[TrainingGraph, int]:
    """A lowered training graph with its batches, where stacking pays, and how many there are.

    graph: the scheduled graph that it was emitted from. Without a batch the training graph is returned as it is.
    """
    after = _after_the_loss(training)
    if _writes(training, after):  # nothing may change its place
        return training, 0
    chosen = list(candidates(training, graph, after, stacking))
    order = _in_order(after, chosen)
    while order is None:  # batches that wait for each other by way of operators of no action
        chosen.pop()
        order = _in_order(after, chosen)
    return (_rebuilt(training, after, order), len(chosen)) if chosen else (training, 0)


def _after_the_loss(training: TrainingGraph) -> list[fx.Node]:
    nodes = list(training.module.graph.nodes)
    at = next(i for i, node in enumerate(nodes) if node.name == training.loss)
    return [node for node in nodes[at + 1 :] if node.op == "call_function"]


def _writes(training: TrainingGraph, nodes: Sequence[fx.Node]) -> bool:
    annotate(training)
    accesses: list[Access] = [node.meta["access"] for node in nodes]
    return any(access.writes for access in accesses)


def candidates(
    training: TrainingGraph, graph: LocalGraph, after: Sequence[fx.Node], stacking: Stacking
) -> Iterator[Stacked]:
    """What runs as one: members of a batch of the graph that have the same operators with the same options."""
    own: defaultdict[int, list[fx.Node]] = defaultdict(list)
    for node in after:
        action = node.meta.get("action", "")
        if action[:1] in ("D", "U") and action[1:].isdigit():
            own[int(action[1:])].append(node)
    for batch in batches(graph):
        alike: defaultdict[Any, list[Member]] = defaultdict(list)
        for name in batch.members:
            number = graph.number[name]
            found = member(training, number, own[number]) if own[number] else None
            if found is not None:
                alike[found.form].append(found)
        for members in alike.values():
            if len(members) >= stacking.least:
                yield from _in_stacks(training, members, stacking)


def _in_stacks(training: TrainingGraph, members: Sequence[Member], stacking: Stacking) -> Iterator[Stacked]:
    """Members of one form, divided into stacks that pay."""
    nodes = members[0].nodes
    values = [value_of(training, node) for node in members[0].inputs]
    outputs = tuple(sorted({place for m in members for place in m.read_outside()}))
    known: dict[Any, fx.GraphModule | None] = {}
    for group in _divided(members, stacking.at_a_time(nodes, len(members))):
        shared = tuple(len(set(column)) == 1 for column in zip(*(m.inputs for m in group), strict=True))
        separate = stacking.seconds(nodes) * len(group) * stacking.margin
        copied = [value for value, s in zip(values, shared, strict=True) if not s]
        if not copied or not all(isinstance(value, Tensor) for value in copied):
            continue
        if stacking.seconds(nodes, len(group)) + stacking.stacks(copied, len(group)) >= separate:
            continue
        key = shared, len(group)
        if key not in known:
            known[key] = _stacked(training, group, values, shared, outputs)
        module = known[key]
        if module is not None and stacking.seconds(module.graph.nodes) < separate:
            yield Stacked(group, shared, outputs, module)


def _divided(members: Sequence[Member], most: int) -> Iterator[tuple[Member, ...]]:
    """The members in groups of about equal size, in their order."""
    count = -(-len(members) // most)
    for i in range(count):
        yield tuple(members[len(members) * i // count : len(members) * (i + 1) // count])


def _stacked(
    training: TrainingGraph, members: tuple[Member, ...], values: Sequence[Any], shared: tuple[bool, ...],
    outputs: tuple[int, ...],
) -> fx.GraphModule | None:  # fmt: skip
    """`Stacked.module`, or None where vmap does not know how."""
    module = piece(training, members[0], outputs)
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    for node, source in zip(calls, members[0].nodes, strict=True):
        kind = source.meta.get("action", "")[:1]
        node.meta["action"] = kind if kind in ("D", "U") else "D"
    try:
        return _recorded(module, values, shared, len(members))
    except (RuntimeError, ValueError, TypeError):  # whatever operators raise that have no form for stacks
        return None


def label(kind: str, numbers: Sequence[int]) -> str:
    """The action of several subgraphs: `D2-D5`, or `D2+D4` where they are no neighbours."""
    ends = sorted(numbers)
    if ends[-1] - ends[0] == len(ends) - 1:
        return f"{kind}{ends[0]}-{kind}{ends[-1]}"
    return "+".join(f"{kind}{n}" for n in ends)


def _recorded(module: fx.GraphModule, values: Sequence[Any], shared: Sequence[bool], count: int) -> fx.GraphModule:
    """The operators of `Stacked.module`."""
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()
    given = [_fake(mode, value) for value, s in zip(values, shared, strict=True) for _ in range(1 if s else count)]

    def run(*inputs: Any) -> list[Any]:
        rest = iter(inputs)
        stacks = [next(rest) if s else torch.stack([next(rest) for _ in range(count)]) for s in shared]
        axes = tuple(None if s else 0 for s in shared)
        results = torch.func.vmap(Tagging(module, {}).run, in_dims=axes)(*stacks)
        return [value for result in results for value in result.unbind(0)]

    with _quiet(), torch.no_grad():
        traced = record(run, *given)
    _simplify(traced.graph)
    traced.recompile()
    return traced


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    """A new tensor without data, like a given one."""
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warning where vmap runs an operator once for each member: whether that pays is decided later."""
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)  # torch's default; there is no way to ask


def _simplify(graph: fx.Graph) -> None:
    """Take out what vmap leaves behind: views that change nothing, and numbers made into tensors."""
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        source = node.args[0] if node.args else None
        number = node.target is aten._to_copy.default and isinstance(source, (int, float))
        view = node.target in VIEWS and isinstance(source, fx.Node) and _alike(node, source)
        if number or view:
            node.replace_all_uses_with(source)
    simplify(graph)


def _alike(node: fx.Node, other: fx.Node) -> bool:
    mine, theirs = node.meta.get("val"), other.meta.get("val")
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return False
    return mine.shape == theirs.shape and mine.stride() == theirs.stride()


def _in_order(after: Sequence[fx.Node], chosen: Sequence[Stacked]) -> list[fx.Node | Stacked] | None:
    """The nodes and batches in an order in which each comes after what it reads; None if there is none.

    It is the order of the program, with a batch in the place of its members' last node.
    """
    place = {node: i for i, node in enumerate(after)}
    unit: dict[fx.Node, Any] = {node: s for s in chosen for m in s.members for node in m.own}
    last: dict[Any, int] = {}
    reads: dict[Any, list[fx.Node]] = {}
    for node in after:
        at = unit.get(node, node)
        last[at] = place[node]
        reads[at] = at.given() if isinstance(at, Stacked) else node.all_input_nodes
    dag = nx.DiGraph()
    dag.add_nodes_from(last)
    for at, sources in reads.items():
        dag.add_edges_from((unit.get(source, source), at) for source in sources if source in place)
    try:
        return list(nx.lexicographical_topological_sort(dag, key=last.__getitem__))
    except nx.NetworkXUnfeasible:
        return None


def _rebuilt(training: TrainingGraph, after: Sequence[fx.Node], order: Sequence[fx.Node | Stacked]) -> TrainingGraph:
    source, graph = training.module, fx.Graph()
    copied: dict[fx.Node, Any] = {}
    moved = set(after)
    for node in source.graph.nodes:
        if node not in moved and node.op != "output":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    for item in order:
        if isinstance(item, Stacked):
            _insert(graph, item, copied)
        else:
            copied[item] = graph.node_copy(item, copied.__getitem__)
    (output,) = source.graph.find_nodes(op="output")
    graph.output(fx.map_arg(output.args[0], copied.__getitem__))
    _reuse_stacks(graph)
    graph.eliminate_dead_code()
    roots = roots_of(source)
    name = type(source).__name__.replace("Lowered", "Batched")
    return TrainingGraph(assemble(graph, {}, roots, name), training.weights, training.feedback, training.loss)


def _insert(graph: fx.Graph, stacked: Stacked, copied: dict[fx.Node, Any]) -> None:
    values: dict[fx.Node, Any] = {}
    given, numbers = iter(stacked.given()), [m.number for m in stacked.members]
    for node in stacked.module.graph.nodes:
        if node.op == "placeholder":
            values[node] = copied[next(given)]
        elif node.op == "output":
            results = fx.map_arg(node.args[0], values.__getitem__)
            copied.update(zip(stacked.taken(), results, strict=True))
        else:
            values[node] = copy = graph.node_copy(node, values.__getitem__)
            copy.meta["action"] = label(node.meta.get("action") or "D", numbers)


def _reuse_stacks(graph: fx.Graph) -> None:
    """Let a batch read the stack that another batch has just taken apart."""
    for node in list(graph.find_nodes(op="call_function", target=aten.stack.default)):
        parts: Any = node.args[0]
        if len(node.args) == 1 and all(p.target is operator.getitem for p in parts):
            whole = {p.args[0] for p in parts}
            (unbound,) = whole if len(whole) == 1 else (None,)
            if unbound is None or unbound.target is not aten.unbind.int or unbound.args[1:] not in ((), (0,)):
                continue
            if [p.args[1] for p in parts] == list(range(unbound.args[0].meta["val"].shape[0])):
                node.replace_all_uses_with(unbound.args[0])
