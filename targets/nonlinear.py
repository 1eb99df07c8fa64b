"""The engine of nonlinear transforms with local propagation: codes forward, goals backward, then all updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphlocal.errors import InputError, LocalTrainingError, nearest
from graphlocal.ir import Subgraph
from graphlocal.rules.nlp import NLP, hidden_nodes, output_nodes, soft_threshold, threshold_name
from graphlocal.targets.nodes import Nodes, Run, StepCall, add_to
from graphlocal.targets.ridge import Ridge

_MOST_FOR_QUANTILE = 1_000_000
"""The most values that a quantile is taken of; of more, evenly spaced ones."""


@dataclass(frozen=True)
class Codes:
    """Stage 1: each subgraph's run, and q and u of each node; `seen` holds what readers see."""

    runs: list[Run]
    q: dict[str, Tensor]
    u: dict[str, Tensor]
    seen: dict[str, Any]


class NonlinearEngine:
    """Steps of nonlinear transforms on one compiled model; error_weights keeps the thresholds."""

    def __init__(self, nodes: Nodes, rule: NLP, error_weights: nn.Module) -> None:
        self.nodes, self.rule, self.error_weights = nodes, rule, error_weights
        self.hidden, self.outputs = hidden_nodes(nodes.graph), output_nodes(nodes.graph)
        values = (*self.hidden, *self.outputs)
        self.preactivation = {value: nodes.graph.representation[value].preactivation for value in values}
        ridge = rule.update == "ridge"
        self.ridge = {s.name: Ridge(nodes, s, values) for s in nodes.graph.subgraphs if ridge and self._learns(s)}

    def _learns(self, subgraph: Subgraph) -> bool:
        return bool(self.nodes.graph.trainable(subgraph)) and subgraph.name in self.nodes.graph.neuron

    def step(self, leaves: Sequence[Any], call: StepCall) -> tuple[Tensor, dict[str, Tensor]]:
        """One training step. Raises InputError for goals at nodes that do not exist."""
        codes = self.codes(leaves)
        loss, goals, slopes = self._aims(codes, call)
        targets, passed = self._targets(codes, goals, slopes)
        drawn = self._draw(codes.runs)
        gradients: dict[str, Tensor] = {}
        solved: list[tuple[Ridge, Tensor]] = []
        rows = call.samples(leaves)
        for run in codes.runs:
            if run.subgraph.name not in drawn:
                continue
            ridge = self.ridge.get(run.subgraph.name)
            if ridge is not None and ridge.value in targets:
                solved.append((ridge, ridge.solve(run, targets[ridge.value], self.rule)))
                continue
            cotangents: dict[str, Tensor] = {}
            for output in run.subgraph.outputs:
                value = output.value
                if value in targets:
                    add_to(cotangents, {self.preactivation[value]: codes.q[value] - targets[value]})
                elif value in passed and value not in codes.q:
                    add_to(cotangents, {value: passed[value]})
            add_to(gradients, self.nodes.vjp(run, cotangents)[0], 1 / rows)
        for ridge, weights in solved:
            ridge.write(weights)
        return loss, gradients

    def codes(self, leaves: Sequence[Any]) -> Codes:
        """Stage 1. Thresholds that are not set yet are set by this batch."""
        seen = self.nodes.given(leaves)
        runs, q, u = [], {}, {}
        for subgraph in self.nodes.graph.subgraphs:
            run = self.nodes.run(subgraph, seen)
            runs.append(run)
            for output in subgraph.outputs:
                value = output.value
                made = run.values[value]
                if value in self.preactivation:
                    q[value] = run.values[output.preactivation].detach()
                    u[value] = made = self._code(value, q[value])
                seen[value] = made.detach() if isinstance(made, Tensor) else made
        return Codes(runs, q, u, seen)

    def _code(self, value: str, q: Tensor) -> Tensor:
        if value in self.outputs:
            return q
        threshold = self.error_weights.get_buffer(threshold_name(value))
        if bool(threshold.isnan()):
            size = q.abs().flatten()
            size = size[:: len(size) // _MOST_FOR_QUANTILE + 1]
            threshold.copy_(torch.quantile(size.float(), 1 - self.rule.keep))
        return soft_threshold(q, threshold.to(q.dtype))

    def _aims(self, codes: Codes, call: StepCall) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The loss to report, the goal of each node that has one, and the loss's gradient for each sample."""
        if not call.goals:
            loss, slopes = call.loss(self.nodes.outputs(codes.seen))
            scale = call.samples([codes.seen[item.name] for item in self.nodes.graph.inputs])
            found: dict[str, Tensor] = {}
            for value, slope in zip(self.nodes.graph.outputs, slopes, strict=True):
                if slope is not None and value in codes.q:
                    add_to(found, {value: slope * scale})
            return loss, {}, found
        goals = {}
        for goal in call.goals:
            value = self.node(goal.node)
            axis = self.nodes.graph.representation[value].axis
            goals[value] = goal(codes.u[value], call.y, axis)
        misses = [(codes.u[v] - g).square().flatten(1).sum(1).mean() / 2 for v, g in goals.items()]
        loss = torch.stack(misses).sum()
        if bool(loss.isnan()):
            raise LocalTrainingError(
                "the distance from the goals is not a number",
                why="the inputs hold NaN, the steps are too large, or the model divides by a code that is zero",
                remedy="lower the learning rate or lambda_f, or raise mu",
            )
        return loss, goals, {}

    def node(self, name: str | None) -> str:
        """The node that a goal or a user names: a value, a subgraph with one node, or None for the first output.

        Raises InputError if there is none of that name.
        """
        graph = self.nodes.graph
        if name is None:
            return next(value for value in graph.outputs if value in self.preactivation)
        if name in self.preactivation:
            return name
        subgraph = graph.subgraph.get(name)
        inside = [o.value for o in subgraph.outputs if o.value in self.preactivation] if subgraph else []
        if len(inside) != 1:
            known = [*self.preactivation, *graph.subgraph]
            raise InputError(f"there is no node {name!r}: {nearest(name, known)}", remedy="print(local.graph)")
        return inside[0]

    def _targets(
        self, codes: Codes, goals: Mapping[str, Tensor], slopes: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Stage 2: y of each node that an aim lies above, and the messages that reached each value."""
        messages: dict[str, Tensor] = {}
        targets: dict[str, Tensor] = {}
        for run in reversed(codes.runs):
            cotangents: dict[str, Tensor] = {}
            for output in run.subgraph.outputs:
                value = output.value
                if value not in codes.q:
                    if value in messages:
                        add_to(cotangents, {value: messages[value]})
                    continue
                target = self._target(value, codes, goals, slopes, messages)
                if target is not None:
                    targets[value] = target
                    add_to(cotangents, {self.preactivation[value]: codes.u[value] - target})
            add_to(messages, self.nodes.vjp(run, cotangents, retain=True)[1])
        return targets, messages

    def _target(
        self, value: str, codes: Codes, goals: Mapping[str, Tensor], slopes: Mapping[str, Tensor],
        messages: Mapping[str, Tensor],
    ) -> Tensor | None:  # fmt: skip
        if value in goals:
            return goals[value]
        if value not in messages and value not in slopes:
            return None
        shift = torch.zeros_like(codes.q[value])
        if value in messages:
            shift = shift + self.rule.lambda_f * messages[value]
        if value in slopes:
            shift = shift + slopes[value]
        moved = codes.q[value] - shift
        return moved if value in self.outputs else soft_threshold(moved, self.rule.lambda_1)

    def _draw(self, runs: Sequence[Run]) -> set[str]:
        names = [run.subgraph.name for run in runs]
        if self.rule.asynchronous is None:
            return set(names)
        chosen = torch.rand(len(names)) < self.rule.asynchronous
        return {name for name, drawn in zip(names, chosen.tolist(), strict=True) if drawn}
