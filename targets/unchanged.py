"""What must stay as it was between a lowered forward pass and its error pass, and which outputs share no memory.

Autograd notices when a tensor that a backward pass needs was changed in place. Lowered passes run without autograd, so
they look themselves, at the versions of what the error pass reads and the caller has in hand.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphlocal.errors import LocalTrainingError
from graphlocal.targets.accesses import shares_memory
from graphlocal.targets.lowered import attribute
from graphlocal.targets.training_graph import take

aten = torch.ops.aten

_VERSION = attrgetter("_version")


@dataclass(frozen=True)
class Unchanged:
    """inputs, outputs: places of those that the error pass reads; states: parameters and buffers of the model that it
    reads. names: of all of them.

    fresh: there is one output, no view, and nothing else lies in its memory.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    states: list[Tensor]
    names: tuple[str, ...]
    fresh: bool

    def tensors(self, leaves: Sequence[Any], outputs: Sequence[Any]) -> list[Tensor]:
        """Those of one call."""
        held = [leaves[i] for i in self.inputs]
        if self.outputs:
            held += [outputs[i] for i in self.outputs]
        return held + self.states if self.states else held

    def error(self, tensors: list[Tensor], before: list[int]) -> LocalTrainingError:
        """What to raise where the versions of a call's tensors are no longer those of `before`."""
        versioned = zip(self.names, before, versions(tensors), strict=True)
        name = next(name for name, old, new in versioned if old != new)
        return LocalTrainingError(
            f"{name} was changed in place between the forward pass and the backward pass",
            why="the local updates are worked out from it",
            remedy="call backward() before optimizer.step() and before anything like x.add_(1), or change a clone",
        )


def versions(tensors: list[Tensor]) -> list[int]:
    """How often each tensor was changed in place; always 0 of inference tensors, which do not count."""
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:
        return [0 if x.is_inference() else x._version for x in tensors]


def unchanged(forward: fx.GraphModule, error: fx.GraphModule) -> Unchanged:
    """What the error pass of a lowered training graph needs as it was. forward, error: its two passes."""
    memory = _memory(forward)
    given = [node for node in forward.graph.nodes if node.op == "placeholder"]
    outputs, saved = _returned(forward)
    returns = [memory[z] if isinstance(z, fx.Node) else frozenset[fx.Node]() for z in outputs]
    kept = _union(memory[saved[i]] for i in _read(error))
    inputs = [i for i, node in enumerate(given) if node in kept and isinstance(node.meta.get("val"), Tensor)]
    again = [i for i, roots in enumerate(returns) if roots & kept and roots.isdisjoint(given)]
    states = _states(error, [*error.graph.nodes, *kept])
    names = [f"the input {given[i].name!r}" for i in inputs]
    names += ["the output" if len(outputs) == 1 else f"output {i}" for i in again]
    for name, state in states.items():
        kind = "parameter" if isinstance(state, nn.Parameter) else "buffer"
        names.append(f"the {kind} {name.removeprefix(_MODEL)!r}")
    fresh = len(outputs) == 1 and _is_made(outputs[0]) and outputs[0] not in _union(map(memory.__getitem__, saved))
    return Unchanged(tuple(inputs), tuple(again), list(states.values()), tuple(names), fresh)


def _is_made(output: Any) -> bool:
    """Whether an output is what an operator has just made, and no view."""
    return isinstance(output, fx.Node) and output.op == "call_function" and _has_its_own(output)


def _memory(forward: fx.GraphModule) -> dict[fx.Node, frozenset[fx.Node]]:
    """For each node the nodes in whose memory its value may lie."""
    memory: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in forward.graph.nodes:
        shared = () if _has_its_own(node) else node.all_input_nodes
        memory[node] = _union(map(memory.__getitem__, shared)) if shared else frozenset({node})
    return memory


def _has_its_own(node: fx.Node) -> bool:
    """Whether a node's value lies in memory that no other node's does, but for views of it."""
    source = node.args[0] if node.target is operator.getitem else node
    return not isinstance(source, fx.Node) or source.op != "call_function" or not shares_memory(source)


def _returned(forward: fx.GraphModule) -> tuple[Sequence[Any], Sequence[fx.Node]]:
    """The outputs, and the values saved for the error pass."""
    returned: Any = forward.graph.output_node().args[0]
    outputs, saved = returned
    return outputs, saved


_MODEL = "original."
"""What the names of the model's own states begin with."""


def _states(module: fx.GraphModule, nodes: Sequence[fx.Node]) -> dict[str, Tensor]:
    """The model's parameters and buffers that some of the nodes look up."""
    names = sorted({str(node.target) for node in nodes if node.op == "get_attr"})
    return {name: attribute(module, name) for name in names if name.startswith(_MODEL)}


def _union(sets: Iterable[frozenset[fx.Node]]) -> frozenset[fx.Node]:
    return frozenset[fx.Node]().union(*sets)


_SHAPES_ALONE = {
    aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.new_empty.default, aten.new_empty_strided.default, aten.new_zeros.default, aten.new_ones.default,
    aten.new_full.default,
}  # fmt: skip
"""Operators that read of their first argument no number."""


def _read(error: fx.GraphModule) -> list[int]:
    """The places in `saved` of the values whose numbers an error pass reads."""
    takes: list[Any] = error.graph.find_nodes(op="call_function", target=take)
    return [node.args[1] for node in takes if any(user.target not in _SHAPES_ALONE for user in node.users)]
