"""Which memory each node of a lowered training graph reads and writes; what must stay in program order follows.

Memory is named by **roots**: the storage of a parameter, buffer or feedback map, the model's arguments (one root,
they may overlap), what the loss hands over, the generator of random numbers, and every result that is not a view of
something older.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphlocal.targets.eager import apply_updates
from graphlocal.targets.simplify import VIEWS
from graphlocal.targets.training_graph import TrainingGraph

aten = torch.ops.aten

Roots = frozenset[str]

_UNDECLARED_WRITES = {
    aten.native_batch_norm.default: (3, 4),
    aten.cudnn_batch_norm.default: (3, 4),
    aten.miopen_batch_norm.default: (3, 4),
}
"""Operators that change arguments without saying so in their schema: the running statistics."""


@dataclass(frozen=True)
class Access:
    """What one node does to memory, as sets of roots. result: where its result lies."""

    reads: Roots = frozenset()
    writes: Roots = frozenset()
    result: Roots = frozenset()


ARGUMENTS, RANDOM = "the arguments", "random numbers"


def outlives(root: str) -> bool:
    """Whether a root is the same memory in every step: a parameter's, buffer's or map's, or the generator's."""
    return root == RANDOM or root.startswith("storage ") or "." in root


def root_of(state: Tensor) -> str:
    """The root of a strided parameter, buffer or feedback map: its storage. Not for messages, it is an address."""
    return f"storage {state.untyped_storage()._cdata}"


def annotate(training: TrainingGraph) -> None:
    """Write an Access as `meta["access"]` on every node of a training graph; copies of the graph keep it."""
    known: dict[fx.Node, Access] = {}
    for node in training.module.graph.nodes:
        known[node] = node.meta["access"] = _access(node, known, training)


def _access(node: fx.Node, known: dict[fx.Node, Access], training: TrainingGraph) -> Access:
    if node.op == "placeholder":
        return Access(result=frozenset({"the loss" if node.name in ("loss", "apply", "retain") else ARGUMENTS}))
    if node.op == "get_attr":
        return Access(result=frozenset({_storage(training.module, str(node.target))}))
    read = _union(known[argument].result for argument in node.all_input_nodes)
    own = frozenset({node.name})
    if node.target is apply_updates:
        names: Any = node.args[1]
        gradients = _union(known[g].result for g in node.args[2:] if isinstance(g, fx.Node))
        written = {_storage(training.module, _state(training, name)) for name in names}
        return Access(gradients, gradients | written, own)  # an optimizer may work on its gradients in place
    if not isinstance(node.target, torch._ops.OpOverload):
        return Access(read, frozenset(), read | own)  # may hand on what it was given
    written = _written(node, known)
    if _draws(node):
        written |= {RANDOM}
    return Access(read, frozenset(written), read if shares_memory(node) else own)


def shares_memory(node: fx.Node) -> bool:
    """Whether a call may return memory of its arguments."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return node.target in VIEWS or any(r.alias_info is not None for r in node.target._schema.returns)


def _draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers; attention does so for its dropout alone."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            return bool(given != 0)
    return True


def _written(node: fx.Node, known: dict[fx.Node, Access]) -> set[str]:
    """The roots of the arguments that an operator changes."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found: set[str] = set()
    for i, argument in enumerate(node.target._schema.arguments):
        declared = argument.alias_info is not None and argument.alias_info.is_write
        if declared or i in _UNDECLARED_WRITES.get(node.target, ()):
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            for source in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(source, fx.Node):
                    found |= known[source].result
    return found


def _state(training: TrainingGraph, name: str) -> str:
    """Where the training graph looks up a weight or feedback map of that name."""
    return name if name in training.feedback else f"original.{name}"


def _storage(module: fx.GraphModule, target: str) -> str:
    """The name of a state's memory, the same for states that share it."""
    owner, _, last = target.rpartition(".")
    value = getattr(module.get_submodule(owner), last)
    return target if not isinstance(value, Tensor) or value.layout is not torch.strided else root_of(value)


def _union(sets: Any) -> Roots:
    return frozenset().union(*sets)
