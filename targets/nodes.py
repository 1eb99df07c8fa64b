"""The subgraphs of a compiled model one by one, for engines that run them in a loop of their own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphlocal.ir import LocalGraph, Subgraph
from graphlocal.targets.bodies import add_messages, hooks_aside, preactivations, sizes_read, subgraph_body
from graphlocal.trace import TracedModel

LossErrors = Callable[[Sequence[Any]], tuple[Tensor, tuple[Tensor | None, ...]]]
"""From the model's outputs to the loss and its gradient for each of them (None where there is none)."""


@dataclass(frozen=True)
class StepCall:
    """What a training step is asked to learn.

    loss: of the model's outputs. goals: of representations, in the place of the loss if there are any. y: what goals
    are set from. index: the numbers of the samples. memory: what the engine keeps from step to step.
    """

    loss: LossErrors
    goals: tuple[Any, ...]
    y: Any
    index: Tensor | None
    memory: dict[str, Any]

    @staticmethod
    def samples(leaves: Sequence[Any]) -> int:
        """The size of the batch: of the first axis of the first input that has one."""
        return next((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim() > 0), 1)


@dataclass(frozen=True)
class Run:
    """One subgraph after its forward: what it read (cut off) and what it made (with its autograd history)."""

    subgraph: Subgraph
    inputs: dict[str, Any]
    values: dict[str, Any]


class Nodes:
    """Runs the subgraphs of `graph`, and takes their vector-Jacobian products.

    inputs_with_errors: for each subgraph, the values that it reads to which it sends errors.
    """

    def __init__(self, graph: LocalGraph, traced: TracedModel, model: nn.Module) -> None:
        self.graph, self.traced, self.model = graph, traced, model
        self.inputs_with_errors = {
            subgraph.name: {c.value for c in graph.connections if c.kind == "vjp" and c.source == subgraph.name}
            for subgraph in graph.subgraphs
        }
        self._bodies = {s.name: subgraph_body(traced.module, graph, s) for s in graph.subgraphs}
        self._reads = {s.name: (*s.inputs, *sizes_read(graph, s)) for s in graph.subgraphs}
        self._names = {s.name: [*(output.value for output in s.outputs), *preactivations(s)] for s in graph.subgraphs}
        self._sizes = _sizes(graph, traced.module)
        self._orders: dict[str, tuple[int, ...]] = {}

    def given(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """The model's inputs and the sizes, by name."""
        inputs = {item.name: leaf for item, leaf in zip(self.graph.inputs, leaves, strict=True)}
        sizes = self._sizes(*leaves)
        return {**inputs, **dict(zip((op.name for op in self.graph.sizes), sizes, strict=True))}

    def run(self, subgraph: Subgraph, seen: Mapping[str, Any]) -> Run:
        """Run one subgraph on values that are cut off from what made them."""
        wanted = self.inputs_with_errors[subgraph.name]
        inputs = {name: self._laid_out(name, seen[name]) for name in self._reads[subgraph.name]}
        inputs |= {name: inputs[name].detach().requires_grad_() for name in inputs if name in wanted}
        with torch.enable_grad():
            result = self._bodies[subgraph.name](*inputs.values(), *map(self.state, subgraph.states))
        values = dict(zip(self._names[subgraph.name], result, strict=True))
        self._remember(values)
        return Run(subgraph, inputs, values)

    def forward(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """The model's own forward pass: every value that crosses a boundary, by name, detached."""
        seen = self.given(leaves)
        with torch.no_grad():
            for subgraph in self.graph.subgraphs:
                result = self._bodies[subgraph.name](
                    *(seen[name] for name in self._reads[subgraph.name]), *map(self.state, subgraph.states)
                )
                values = dict(zip(self._names[subgraph.name], result, strict=True))
                self._remember(values)
                seen.update(values)
        return seen

    def _remember(self, values: Mapping[str, Any]) -> None:
        """Note the order of the axes in memory of each value, which views of it rely on."""
        for name, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                strides = [0 if value.is_contiguous() else -stride for stride in value.stride()]
                self._orders[name] = tuple(sorted(range(value.dim()), key=strides.__getitem__))

    def _laid_out(self, name: str, value: Any) -> Any:
        """What stands for a value, with its axes in the same order in memory."""
        order = self._orders.get(name)
        if order is None or value.permute(order).is_contiguous():
            return value
        back = sorted(range(len(order)), key=order.__getitem__)
        return value.permute(order).contiguous().permute(back)

    def outputs(self, seen: Mapping[str, Any]) -> list[Any]:
        """What the model returns, flattened."""
        return [seen[value] if value in seen else self.state(value) for value in self.graph.outputs]

    def state(self, name: str) -> Any:
        """A parameter, buffer or traced constant as it is now."""
        constants = self.traced.constants
        return constants[name] if name in constants else operator.attrgetter(name)(self.model)

    def vjp(
        self, run: Run, errors: Mapping[str, Tensor], retain: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The vector-Jacobian products of a subgraph: (by parameter, by input value).

        errors: the cotangents of values that the run made. retain: whether the run is asked again.
        """
        pairs = [(run.values[name], error) for name, error in errors.items() if run.values[name].requires_grad]
        parameters = {name: self.state(name) for name in self.graph.trainable(run.subgraph)}
        inputs = {name: run.inputs[name] for name in run.inputs if name in self.inputs_with_errors[run.subgraph.name]}
        sought = [tensor for tensor in (*parameters.values(), *inputs.values()) if tensor.requires_grad]
        if not pairs or not sought:
            return {}, {}
        values, cotangents = zip(*pairs, strict=True)
        cotangents = tuple(c.to(v.dtype) for v, c in pairs)
        with hooks_aside(sought):
            found = torch.autograd.grad(values, sought, cotangents, allow_unused=True, retain_graph=retain)
        products = {id(tensor): product for tensor, product in zip(sought, found, strict=True) if product is not None}
        return (
            {name: products[id(tensor)] for name, tensor in parameters.items() if id(tensor) in products},
            {name: products[id(tensor)] for name, tensor in inputs.items() if id(tensor) in products},
        )


def add_to(total: dict[str, Tensor], found: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Add each tensor of `found`, times `scale`, to that of its name in `total`."""
    for name, tensor in found.items():
        added = add_messages(total.get(name), tensor if scale == 1.0 else tensor * scale)
        assert added is not None
        total[name] = added


def _sizes(graph: LocalGraph, source: fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
    """The size operations, as a function of the model's flat inputs."""
    nodes = {node.name: node for node in source.graph.nodes}
    sizes = fx.Graph()
    copied = {nodes[item.name]: sizes.placeholder(item.name) for item in graph.inputs}
    for op in graph.sizes:
        copied[nodes[op.name]] = sizes.node_copy(nodes[op.name], copied.__getitem__)
    sizes.output(tuple(copied[nodes[op.name]] for op in graph.sizes))
    return fx.GraphModule({}, sizes, class_name="Sizes").forward
