"""How much memory a lowered training graph needs, from the sizes and the last readers of its values.

Nothing is run. The graph is walked in the order in which its two passes run it: a storage lives from the operator that
makes it to the last reader of any of its views; what the error pass reads is kept by the forward pass; gradients are
handed to the optimizer together, once enough have come. Stacks of gradients that are lent lie in memory of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphlocal.targets.eager import apply_updates
from graphlocal.targets.lowered import laid_out
from graphlocal.targets.reuse import IN_PLACE, ends_in
from graphlocal.targets.scratch import lending
from graphlocal.targets.stacked_updates import apply_stacks
from graphlocal.targets.training_graph import TrainingGraph


@dataclass(frozen=True)
class Moment:
    """The bytes that live while an operator runs, over what lives before the step.

    action: of the schedule, such as `U3`, or "". kept: by the forward pass, for the error pass; rest: outputs, errors,
    gradients, and values on their way.
    """

    action: str
    kept: int
    rest: int

    @property
    def total(self) -> int:
        return self.kept + self.rest


@dataclass(frozen=True)
class Liveness:
    """Bytes over what lives before the step.

    kept: what the forward pass hands to the error pass, outputs not counted; at_loss: that, and the outputs. moments:
    one an operator.
    """

    kept: int
    at_loss: int
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total, default=Moment("", 0, 0))

    def peak_with(self, loss: int) -> int:
        """The peak of a step whose loss, with its derivative, takes so many bytes by itself."""
        return max(self.peak.total, self.at_loss + loss)


def liveness(training: TrainingGraph, together: int = 0) -> Liveness:
    """The memory of a lowered training graph, at every operator.

    together: gradients wait for each other until they have as many numbers. A graph without `apply_updates` keeps all
    of its gradients to the end.
    """
    return _Walk(training, together).run()


class _Walk:
    def __init__(self, training: TrainingGraph, together: int) -> None:
        graph = training.module.graph
        self.nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr")]
        self.at = next(i for i, node in enumerate(self.nodes) if node.name == training.loss)
        self.loss, self.together = training.loss, together
        returned: Any = self.nodes[-1].args[0]
        self.lending = set(lending(graph))
        self.lent = {stack for node in self.lending for stack in node.args[2:]}  # in memory that is kept
        self.handed_out: list[fx.Node] = []  # gradients; the outputs are the caller's to free
        fx.map_arg(() if _fused(training) else returned[1:], self.handed_out.append)
        self.size: dict[int, int] = {}  # of each storage that the step makes
        self.roots: dict[fx.Node, dict[int, int]] = {}  # of each node: its own numbers of its storages, by torch's
        self.before = set(self.nodes[: self.at])
        for node in graph.nodes:
            self._place(node)
        self.born = self._births()
        self.last = self._deaths()

    def _place(self, node: fx.Node) -> None:
        """Number the storages of a node's value; those that it shares with an argument have their numbers already."""
        known: dict[int, int] = {}
        for source in node.all_input_nodes:
            known |= self.roots.get(source, {})
        if node.name == self.loss:
            return
        mine = {}
        over = self._written_over(node)
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in known and over is not None:
                    known[key] = over
                elif key not in known:
                    known[key] = len(self.size)
                    given = node.op in ("placeholder", "get_attr") or node in self.lent
                    self.size[known[key]] = 0 if given else int(storage.nbytes())
                mine[key] = known[key]
        self.roots[node] = mine

    def _written_over(self, node: fx.Node) -> int | None:
        """The storage of the argument that an operator writes its result over, if it may."""
        if node.target not in IN_PLACE or not ends_in(node.args[0], node):
            return None
        value: Any = node.args[0]
        same_pass = (value in self.before) == (node in self.before)
        return next(iter(self._numbers(value)), None) if same_pass else None

    def _numbers(self, node: fx.Node) -> set[int]:
        return set(self.roots.get(node, {}).values())

    def _births(self) -> dict[int, int]:
        born: dict[int, int] = {}
        for i, node in enumerate(self.nodes):
            for number in self._numbers(node):
                born.setdefault(number, self.at if node.target is laid_out else i)  # the loss makes the errors
        return born

    def _deaths(self) -> dict[int, int]:
        """The place of the last reader of each storage."""
        last = dict(self.born)
        waiting: set[int] = set()
        count = 0
        for i, node in enumerate(self.nodes):
            for source in node.all_input_nodes if node.op != "output" else self.handed_out:
                for number in self._numbers(source):
                    last[number] = max(last.get(number, i), i)
            if node.target is laid_out:  # the caller keeps the errors
                last |= dict.fromkeys(self._numbers(node), len(self.nodes) - 1)
            if node.target in (apply_updates, apply_stacks):
                waiting |= {number for source in node.all_input_nodes for number in self._numbers(source)}
                count += sum(_numel(source) for source in node.all_input_nodes)
                flushed = count >= self.together or node in self.lending
                last |= dict.fromkeys(waiting, i)
                if flushed:
                    waiting, count = set(), 0
        end = len(self.nodes) - 1
        return last | dict.fromkeys(waiting, end)

    def run(self) -> Liveness:
        across = {n for n, i in self.born.items() if i < self.at < self.last.get(n, i)}
        returned = {n for source in self.nodes[self.at].all_input_nodes for n in self._numbers(source)}
        kept = across - (returned - self._read_later())
        moments = tuple(self._moments(kept))
        at_loss = sum(self.size[n] for n, i in self.born.items() if i < self.at <= self.last.get(n, i))
        return Liveness(sum(self.size[n] for n in kept), at_loss, moments)

    def _read_later(self) -> set[int]:
        """The storages that the error pass itself reads."""
        later = self.nodes[self.at + 1 : -1]
        return {n for node in later for source in node.all_input_nodes for n in self._numbers(source)}

    def _moments(self, kept: set[int]) -> Iterator[Moment]:
        births: dict[int, list[int]] = {}
        deaths: dict[int, list[int]] = {}
        for number, i in self.born.items():
            births.setdefault(i, []).append(number)
            deaths.setdefault(self.last[number], []).append(number)
        now = [0, 0]
        for i, node in enumerate(self.nodes):
            for number in births.get(i, ()):
                now[number not in kept] += self.size[number]
            yield Moment(str(node.meta.get("action", "")), *now)
            for number in deaths.get(i, ()):
                now[number not in kept] -= self.size[number]


def _fused(training: TrainingGraph) -> bool:
    return any(node.name == "apply" for node in training.module.graph.find_nodes(op="placeholder"))


def _numel(node: fx.Node) -> int:
    value: Any = node.meta.get("val")
    return int(value.numel()) if isinstance(value, Tensor) else 0
