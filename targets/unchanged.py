"""What must stay as it was between a lowered forward pass and its error pass, and which outputs share no memory.

Autograd notices when a tensor that a backward pass needs was changed in place. Lowered passes run without autograd, so
they look themselves, at the versions of what the error pass reads and the caller has in hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

from graphlocal.errors import LocalTrainingError
from graphlocal.targets.accesses import shares_memory
from graphlocal.targets.lowered import attribute
from graphlocal.targets.training_graph import TrainingGraph, split

_VERSION = attrgetter("_version")


@dataclass(frozen=True)
class Unchanged:
    """inputs, outputs: places of those that the error pass reads; weights: the parameters. names: of all of them.

    fresh: no output lies in memory that is also an input's, a parameter's, or saved for the error pass.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: list[Tensor]
    names: tuple[str, ...]
    fresh: bool

    def tensors(self, leaves: Sequence[Any], outputs: Sequence[Any]) -> list[Tensor]:
        """Those of one call."""
        held = [leaves[i] for i in self.inputs]
        if self.outputs:
            held += [outputs[i] for i in self.outputs]
        return held + self.weights if self.weights else held

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
    """How often each tensor was changed in place; of none if one is an inference tensor, which does not count."""
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:
        return []


def unchanged(lowered: TrainingGraph) -> Unchanged:
    """What the error pass of a lowered training graph needs as it was."""
    forward, error = split(lowered)
    memory: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in forward.graph.nodes:
        new = node.op != "call_function" or not shares_memory(node)
        memory[node] = frozenset({node}) if new else frozenset().union(*map(memory.__getitem__, node.all_input_nodes))
    returned: Any = forward.graph.output_node().args[0]
    outputs, saved = returned
    kept: frozenset[fx.Node] = frozenset().union(*map(memory.__getitem__, saved))
    given = [node for node in forward.graph.nodes if node.op == "placeholder"]
    returns = [memory[z] if isinstance(z, fx.Node) else frozenset[fx.Node]() for z in outputs]
    inputs = [i for i, node in enumerate(given) if node in kept and isinstance(node.meta.get("val"), Tensor)]
    again = [i for i, roots in enumerate(returns) if roots & kept and roots.isdisjoint(given)]
    read = {str(node.target) for node in error.graph.find_nodes(op="get_attr")}
    read |= {str(node.target) for node in kept if node.op == "get_attr"}
    states = {name: attribute(lowered.module, name) for name in sorted(read)}
    weights = {name: state for name, state in states.items() if isinstance(state, nn.Parameter)}
    names = [f"the input {given[i].name!r}" for i in inputs]
    names += ["the output" if len(outputs) == 1 else f"output {i}" for i in again]
    names += [f"the parameter {name.removeprefix('original.')!r}" for name in weights]
    fresh = not any(root in kept or root.op != "call_function" for roots in returns for root in roots)
    return Unchanged(tuple(inputs), tuple(again), list(weights.values()), tuple(names), fresh and _apart(returns))


def _apart(memory: Sequence[frozenset[fx.Node]]) -> bool:
    """Whether no two outputs share memory."""
    return sum(map(len, memory)) == len(frozenset().union(*memory))
