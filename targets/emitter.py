"""A training graph while it is put together: the nodes made so far, and how pieces are added."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from graphlocal.feedback import weight_names
from graphlocal.fitting import feedback_map
from graphlocal.ir import Connection, LocalGraph
from graphlocal.rules import Rule
from graphlocal.targets.bodies import Feedback, add_messages, tail_function, twin_name
from graphlocal.targets.calibration import AtPreactivation
from graphlocal.targets.twins import Twin
from graphlocal.trace import TracedModel


class Emitter:
    """The nodes of a training graph by what they hold."""

    batch: fx.Node
    """The number of samples; known once the outputs are."""
    retain: fx.Node
    """Whether another error pass follows."""
    add: Callable[..., Any] = staticmethod(add_messages)
    """How messages are added."""

    def __init__(self, graph: LocalGraph, traced: TracedModel, model: nn.Module, rule: Rule,
                 error_weights: nn.Module, fused: bool) -> None:  # fmt: skip
        self.graph, self.traced, self.model, self.rule, self.fused = graph, traced, model, rule, fused
        self.fx = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.roots = {"original": model, "error_weights": error_weights, "constants": nn.Module()}
        for i, constant in enumerate(traced.constants.values()):
            self.roots["constants"].register_buffer(f"c{i}", constant)
        self.constant_names = {name: f"constants.c{i}" for i, name in enumerate(traced.constants)}
        self.attributes: dict[str, fx.Node] = {}
        self.seen: dict[str, fx.Node] = {}  # values as their readers see them: inputs, sizes, cut-off z
        self.attached: dict[str, fx.Node] = {}  # z and h with their subgraph's autograd history
        self.slope: fx.Node | None = None  # with which errors pass discrete units
        self.scores: dict[str, list[str]] = {}  # of each subgraph: the scores of its stochastic units
        self.errors: dict[str, fx.Node] = {}  # of each value, in the units of the loss
        self.feeds: dict[str, list[tuple[fx.Node, fx.Node]]] = {}  # of each subgraph: (output, its error)
        self.messages: dict[str, fx.Node] = {}  # of each vjp connection
        self.twins: dict[str, fx.Node] = {}
        self.gradients: dict[str, list[fx.Node]] = {}  # contributions to each parameter and E
        self.input_gradients: dict[str, list[fx.Node]] = {}
        self.weight_names = weight_names(graph)
        self.waiting = Counter(f"error_weights.{names[0]}" for names in self.weight_names.values())  # E's connections
        self.output_error: fx.Node | None = None
        self.gated: dict[str, fx.Node] = {}  # errors at the pre-activation
        self.exact: dict[str, fx.Node] = {}  # the exact part of each value's error

    def call(self, function: Callable[..., Any], *args: Any, name: str | None = None) -> fx.Node:
        return self.fx.create_node("call_function", function, args, {}, name)

    def call_module(self, name: str, module: nn.Module, *args: Any) -> fx.Node:
        self.modules[name] = module
        return self.fx.create_node("call_module", name, args, {}, name)

    def attribute(self, state: str) -> fx.Node:
        target = self.constant_names.get(state) or f"original.{state}"
        return self.get(target)

    def get(self, target: str) -> fx.Node:
        if target not in self.attributes:
            self.attributes[target] = self.fx.get_attr(target)
        return self.attributes[target]

    def twin(self, parameter: str) -> fx.Node:
        """The twin of a parameter, the same for all subgraphs."""
        if parameter not in self.twins:
            name = twin_name(parameter)
            stored = self.get(f"error_weights.{name}") if hasattr(self.roots["error_weights"], name) else None
            self.twins[parameter] = self.call_module(name, Twin(self.rule), self.attribute(parameter), stored)
        return self.twins[parameter]

    def message(self, connection: Connection) -> list[fx.Node]:
        """The messages of one connection; a value that the model returns twice has two errors."""
        if connection.kind == "loss":
            assert self.output_error is not None
            positions = [i for i, value in enumerate(self.graph.outputs) if value == connection.value]
            return [self.call(operator.getitem, self.output_error, i) for i in positions]
        if connection.kind == "vjp":
            return [self.messages[connection.name]] if connection.name in self.messages else []
        error = self.error_read(connection)
        if error is None:
            return []
        factors = [self.get(f"error_weights.{name}") for name in self.weight_names[connection.name]]
        return [self.feedback(connection, error, factors)]

    def error_read(self, connection: Connection) -> fx.Node | None:
        """The error that a feedback map reads.

        A fitted one reads it at the pre-activation; so does every map from an output of the model, where a squashing
        tail and its loss belong together: for a sigmoid under binary cross-entropy the error is p - y.
        """
        value = connection.source_value
        error, output = self.errors.get(value), self.graph.representation[value]
        tail = self.graph.tail(output)
        if error is None or not tail or not (connection.fitted or self._is_output_error(connection)):
            return error
        if value not in self.gated:
            phi = tail_function(self.traced.module, tail, output.preactivation)
            h = self.attached[output.preactivation]
            self.gated[value] = self.call_module(f"gated_{value}", AtPreactivation(phi), h, error)
        return self.gated[value]

    def _is_output_error(self, connection: Connection) -> bool:
        """Whether the source's error is the loss's own gradient and nothing else."""
        value = connection.source_value
        kinds = {c.kind for c in self.graph.incoming(connection.source) if c.value == value}
        return kinds == {"loss"} and not self.rule.decodes

    def feedback(self, connection: Connection, error: fx.Node, factors: list[fx.Node]) -> fx.Node:
        """The message of a feedback map."""
        module = Feedback(feedback_map(self.graph, connection))
        name = f"d_{connection.value}_from_{connection.source_value}"
        return self.call_module(name, module, error, self.attached[connection.value], *factors)

    def total(self, gradients: list[fx.Node]) -> fx.Node | None:
        """The sum of the contributions to one parameter's or input's gradient."""
        return gradients[0] if len(gradients) == 1 else self.call(add_messages, *gradients) if gradients else None

    def sum(self, nodes: list[fx.Node]) -> fx.Node | None:
        """The sum of errors or messages."""
        if len(nodes) < 2:
            return nodes[0] if nodes else None
        return self.call(self.add, *nodes)
