"""The training graph of rules that relax an energy: a free phase forward, a nudged phase back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphlocal.ir import LocalGraph
from graphlocal.rules import RelaxingRule
from graphlocal.targets.bodies import preactivations, sizes_read, subgraph_body, tail_function


@dataclass(frozen=True)
class Layer:
    """One link of the chain. result: the place of its pre-activation among the results of the body."""

    function: fx.GraphModule
    result: int
    phi: Callable[[Tensor], Tensor]

    def affine(self, below: Tensor, arguments: Sequence[Any]) -> Tensor:
        return self.function(below, *arguments)[self.result]  # type: ignore[no-any-return]


Arguments = Sequence[Sequence[Any]]


class Chain(nn.Module):
    """The energy of a chain of layers, and its relaxation. States are s_1 .. s_L; the input x stays."""

    def __init__(self, rule: RelaxingRule, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.rule, self.layers = rule, tuple(layers)

    def coupling(self, x: Tensor, states: Sequence[Tensor], arguments: Arguments) -> Tensor:
        """sum_i s_i . A_i(s_{i-1}), over the batch: what the energy lacks of a sum of functions of single states."""
        below = (x, *states[:-1])
        parts = zip(self.layers, below, states, arguments, strict=True)
        terms = [(s * layer.affine(b, given)).sum() for layer, b, s, given in parts]
        return torch.stack(terms).sum()

    def relax(self, x: Tensor, states: Sequence[Tensor], arguments: Arguments, steps: int, nudge: Tensor | None
              ) -> tuple[Tensor, ...]:  # fmt: skip
        dt, states = self.rule.dt, tuple(states)
        arguments = [[a.detach() if isinstance(a, Tensor) else a for a in given] for given in arguments]
        for _ in range(steps):
            with torch.enable_grad():
                leaves = [s.detach().requires_grad_() for s in states]
                drives = list(torch.autograd.grad(self.coupling(x, leaves, arguments), leaves))
            with torch.no_grad():
                if nudge is not None:
                    drives[-1] = drives[-1] - nudge
                pairs = zip(self.layers, states, drives, strict=True)
                states = tuple((1 - dt) * s + dt * layer.phi(drive) for layer, s, drive in pairs)
        return states


class FreePhase(Chain):
    """forward(x, arguments of each layer) -> states"""

    def forward(self, x: Tensor, arguments: Arguments) -> tuple[Tensor, ...]:
        with torch.no_grad():
            states: list[Tensor] = []
            for layer, given in zip(self.layers, arguments, strict=True):
                states.append(layer.phi(layer.affine(states[-1] if states else x, given)))
        return self.relax(x.detach(), states, arguments, self.rule.free_steps, None)


class NudgedPhase(Chain):
    """forward(x, states, error of the output, batch, arguments of each layer, parameters) -> updates, one each"""

    def forward(self, x: Tensor, states: Sequence[Tensor], error: Tensor | None, batch: int, arguments: Arguments,
                parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:  # fmt: skip
        if error is None:
            return (None,) * len(parameters)
        x = x.detach()
        negative = self.rule.sign == "random" and bool(torch.rand(()) < 0.5)
        beta = -self.rule.beta if negative else self.rule.beta
        nudged = self.relax(x, states, arguments, self.rule.nudged_steps, beta * batch * error)
        with torch.enable_grad():
            difference = self.coupling(x, states, arguments) - self.coupling(x, nudged, arguments)
            return torch.autograd.grad(difference / (beta * batch), list(parameters), allow_unused=True)


def emit_relaxation(emitter: Any, rule: RelaxingRule) -> tuple[str, ...]:
    """Put both phases into an emitter whose inputs and sizes are there; returns the names of the parameters.

    Their gradients are in `emitter.gradients`.
    """
    graph: LocalGraph = emitter.graph
    layers, arguments = [], []
    for subgraph in graph.subgraphs:
        (output,) = subgraph.outputs
        body = subgraph_body(emitter.traced.module, graph, subgraph)
        emitter.modules[f"F{graph.number[subgraph.name]}"] = body
        names = [output.value, *preactivations(subgraph)]
        phi = tail_function(emitter.traced.module, graph.tail(output), output.preactivation)
        layers.append(Layer(body, names.index(output.preactivation), phi))
        sizes = (emitter.seen[size] for size in sizes_read(graph, subgraph))
        arguments.append((*sizes, *map(emitter.attribute, subgraph.states)))
    x = emitter.seen[graph.inputs[0].name]
    states = emitter.call_module("free_phase", FreePhase(rule, layers), x, tuple(arguments))
    value = graph.outputs[0]
    emitter.seen[value] = emitter.call(operator.getitem, states, len(layers) - 1, name=value)
    emitter.take_loss()
    error = emitter.call(operator.getitem, emitter.output_error, 0)
    weights = tuple(s.name for s in graph.states if s.trainable)
    parameters = tuple(map(emitter.attribute, weights))
    result = emitter.call_module(
        "nudged_phase", NudgedPhase(rule, layers), x, states, error, emitter.batch, tuple(arguments), parameters
    )
    for i, name in enumerate(weights):
        emitter.gradients[name] = [emitter.call(operator.getitem, result, i)]
    return weights
