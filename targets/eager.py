"""The eager target: emit a scheduled `LocalGraph` as one executable `torch.fx.GraphModule`, the training graph.

Called as `training_graph(*inputs, loss)`, it runs the schedule's actions in order and returns
`(outputs, parameter gradients, feedback gradients, input gradients)`. `loss` maps the tuple of outputs to the
tuple of their errors dloss/doutput. `graphlocal.targets.training_graph.split` cuts the graph at that point, for
training loops in which the loss is the user's own code.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from graphlocal.feedback import layout, weight_names
from graphlocal.fitting import feedback_map, fitted_groups, moment_names
from graphlocal.ir import Connection, LocalGraph, Representation, Subgraph
from graphlocal.rules import Rule
from graphlocal.targets.bodies import (
    Feedback,
    FeedbackUpdate,
    LocalError,
    Update,
    UpdateShape,
    add_messages,
    boundary,
    model_input,
    preactivations,
    sizes_read,
    subgraph_body,
    tail_function,
    twin_name,
    twins_read,
)
from graphlocal.targets.calibration import AtPreactivation, Fit
from graphlocal.targets.training_graph import TrainingGraph, assemble
from graphlocal.targets.twins import Twin
from graphlocal.trace import TracedModel

LossErrors = Callable[[tuple[Any, ...]], Sequence[Tensor | None]]
Apply = Callable[[tuple[str, ...], tuple[Tensor | None, ...]], None]


def output_errors(loss: LossErrors, outputs: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """dloss/doutput for every output; None where there is none."""
    return tuple(loss(outputs))


def batch_size(*candidates: Any) -> int:
    """The size of the first axis of the first candidate that has one."""
    return next((x.shape[0] for x in candidates if isinstance(x, Tensor) and x.dim() > 0), 1)


def copied(gradient: Tensor | None) -> Tensor | None:
    """A gradient of its own, with the same values."""
    return None if gradient is None else gradient.clone()


def apply_updates(apply: Apply, names: tuple[str, ...], *gradients: Tensor | None) -> None:
    """Hand finished gradients to the optimizer; nothing else holds them afterwards."""
    apply(names, gradients)


def emit(
    graph: LocalGraph,
    traced: TracedModel,
    model: nn.Module,
    rule: Rule,
    error_weights: nn.Module,
    fused: bool = False,
    fits: LocalGraph | None = None,
) -> TrainingGraph:
    """The training graph of a scheduled graph.

    error_weights: holds the feedback maps, under `weight_names(graph)`. fused: hand each gradient to a further
    argument `apply(names, gradients)` as soon as it is complete, instead of returning them all. fits: a graph with the
    same subgraphs, whose fitted feedback maps are fitted to this one's gradients.
    """
    return _Emitter(graph, traced, model, rule, error_weights, fused, fits).emit()


class _Emitter:
    def __init__(self, graph: LocalGraph, traced: TracedModel, model: nn.Module, rule: Rule,
                 error_weights: nn.Module, fused: bool, fits: LocalGraph | None) -> None:  # fmt: skip
        self.fits, self.gated = fits, dict[str, fx.Node]()  # gated: errors at the pre-activation
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
        self.errors: dict[str, fx.Node] = {}  # of each value, in the units of the loss
        self.feeds: dict[str, list[tuple[fx.Node, fx.Node]]] = {}  # of each subgraph: (output, its error)
        self.messages: dict[str, fx.Node] = {}  # of each vjp connection
        self.twins: dict[str, fx.Node] = {}
        self.gradients: dict[str, list[fx.Node]] = {}  # contributions to each parameter and E
        self.input_gradients: dict[str, list[fx.Node]] = {}
        self.weight_names = weight_names(fits or graph)
        self.waiting = Counter(f"error_weights.{names[0]}" for names in self.weight_names.values())  # E's connections
        self.output_error: fx.Node | None = None
        self.last_user = {
            name: subgraph.name for subgraph in self._update_order() for name in graph.trainable(subgraph)
        }

    def _update_order(self) -> list[Subgraph]:
        return [self.graph.subgraphs[a.subgraph - 1] for a in self.graph.schedule if a.kind == "U"]

    def emit(self) -> TrainingGraph:
        for item in self.graph.inputs:
            placeholder = self.fx.placeholder(item.name)
            self.seen[item.name] = self.call(model_input, placeholder) if item.type else placeholder
        self.loss = self.fx.placeholder("loss")
        self.apply = self.fx.placeholder("apply") if self.fused else None
        self.retain = self.fx.placeholder("retain", default_value=False)
        self._sizes()
        actions = [(a.kind, self.graph.subgraphs[a.subgraph - 1]) for a in self.graph.schedule]
        for kind, subgraph in actions:
            if kind == "F":
                self._forward(subgraph)
        self._loss()
        for kind, subgraph in actions:
            if kind == "D":
                self._displace(subgraph)
                self._fit(subgraph)
            elif kind == "U":
                self._update(subgraph)
        return self._finish()

    # Small helpers.

    def call(self, function: Callable[..., Any], *args: Any, name: str | None = None) -> fx.Node:
        return self.fx.create_node("call_function", function, args, {}, name)

    def call_module(self, name: str, module: nn.Module, *args: Any) -> fx.Node:
        self.modules[name] = module
        return self.fx.create_node("call_module", name, args, {}, name)

    def attribute(self, state: str) -> fx.Node:
        target = self.constant_names.get(state) or f"original.{state}"
        return self._get(target)

    def _get(self, target: str) -> fx.Node:
        if target not in self.attributes:
            self.attributes[target] = self.fx.get_attr(target)
        return self.attributes[target]

    # The actions.

    def _sizes(self) -> None:
        nodes = {node.name: node for node in self.traced.module.graph.nodes}
        for op in self.graph.sizes:
            self.seen[op.name] = self.fx.node_copy(nodes[op.name], lambda n: self.seen[n.name])

    def _forward(self, subgraph: Subgraph) -> None:
        number = self.graph.number[subgraph.name]
        body = subgraph_body(self.traced.module, self.graph, subgraph)
        inputs = [self.seen[value] for value in (*subgraph.inputs, *sizes_read(self.graph, subgraph))]
        twins = [self._twin(name) for name in twins_read(self.graph, subgraph)]
        result = self.call_module(f"F{number}", body, *inputs, *map(self.attribute, subgraph.states), *twins)
        names = [*(output.value for output in subgraph.outputs), *preactivations(subgraph)]
        for i, name in enumerate(names):
            self.attached[name] = self.call(operator.getitem, result, i, name=f"{name}_in_F{number}")
        sent_back = {c.value for c in self.graph.incoming(subgraph.name) if c.kind == "vjp"}
        for output in subgraph.outputs:
            cut = self.call(boundary, self.attached[output.value], output.value in sent_back, name=output.value)
            self.seen[output.value] = cut

    def _twin(self, parameter: str) -> fx.Node:
        """The twin of a parameter, the same for all subgraphs."""
        if parameter not in self.twins:
            name = twin_name(parameter)
            stored = self._get(f"error_weights.{name}") if hasattr(self.roots["error_weights"], name) else None
            self.twins[parameter] = self.call_module(name, Twin(self.rule), self.attribute(parameter), stored)
        return self.twins[parameter]

    def _loss(self) -> None:
        outputs = tuple(self._returned(value) for value in self.graph.outputs)
        self.outputs = outputs
        self.output_error = self.call(output_errors, self.loss, outputs, name="output_error")
        candidates = [*outputs, *(self.seen[item.name] for item in self.graph.inputs)]
        self.batch = self.call(batch_size, *candidates, name="batch")

    def _returned(self, value: str) -> fx.Node:
        return self.seen[value] if value in self.seen else self._get(self.constant_names.get(value, value))

    def _displace(self, subgraph: Subgraph) -> None:
        feeds: list[tuple[fx.Node, fx.Node]] = []
        outputs = {output.value: output for output in subgraph.outputs}
        for value in self.graph.neuron[subgraph.name].values:
            incoming = [c for c in self.graph.incoming(subgraph.name) if c.value == value]
            exact = self._sum([m for c in incoming if c.exact for m in self._message(c)])
            displacement = self._sum([m for c in incoming if not c.exact for m in self._message(c)])
            local = None
            if displacement is not None:
                local = self._local_error(outputs[value], displacement, incoming, feeds)
            if exact is not None:
                feeds.append((self.attached[value], exact))
            error = self._sum([e for e in (exact, local) if e is not None])
            if error is not None:
                self.errors[value] = error
        self.feeds[subgraph.name] = feeds

    def _local_error(self, output: Representation, displacement: fx.Node, incoming: list[Connection],
                     feeds: list[tuple[fx.Node, fx.Node]]) -> fx.Node:  # fmt: skip
        value = output.value
        phi = tail_function(self.traced.module, self.graph.tail(output), output.preactivation)
        module = LocalError(self.rule, value, phi)
        h, z = self.attached[output.preactivation], self.attached[output.smooth or value]
        error = self.call_module(f"e_{value}", module, h, z, displacement, self.batch)
        feeds.append((h if self.rule.feeds == "preactivation" else z, error))
        if self.rule.learns_feedback:
            for connection in incoming:
                if connection.kind == "feedback":
                    self._learn_feedback(connection, module, h, z, displacement)
        return error

    def _learn_feedback(self, connection: Connection, error: LocalError, h: fx.Node, z: fx.Node,
                        displacement: fx.Node) -> None:  # fmt: skip
        names = [f"error_weights.{name}" for name in self.weight_names[connection.name]]
        update = FeedbackUpdate(error, layout(self.graph, connection))
        source = self.errors.get(connection.source_value)
        node = self.call_module(f"{connection.value}_from_{connection.source_value}_update", update,
                                h, z, displacement, source, self.batch, *map(self._get, names))  # fmt: skip
        for i, name in enumerate(names):
            self.gradients.setdefault(name, []).append(self.call(operator.getitem, node, i))
        self.waiting[names[0]] -= 1
        if not self.waiting[names[0]]:
            self._apply(names)

    def _message(self, connection: Connection) -> list[fx.Node]:
        """The messages of one connection; a value that the model returns twice has two errors."""
        if connection.kind == "loss":
            assert self.output_error is not None
            positions = [i for i, value in enumerate(self.graph.outputs) if value == connection.value]
            return [self.call(operator.getitem, self.output_error, i) for i in positions]
        if connection.kind == "vjp":
            return [self.messages[connection.name]] if connection.name in self.messages else []
        error = self._error_read(connection)
        if error is None:
            return []
        factors = [self._get(f"error_weights.{name}") for name in self.weight_names[connection.name]]
        module = Feedback(feedback_map(self.graph, connection))
        name = f"d_{connection.value}_from_{connection.source_value}"
        return [self.call_module(name, module, error, self.attached[connection.value], *factors)]

    def _error_read(self, connection: Connection) -> fx.Node | None:
        """The error that a feedback map reads; a fitted one reads it at the pre-activation."""
        value = connection.source_value
        error, output = self.errors.get(value), self.graph.representation[value]
        tail = self.graph.tail(output)
        if error is None or not connection.fitted or not tail:
            return error
        if value not in self.gated:
            phi = tail_function(self.traced.module, tail, output.preactivation)
            h = self.attached[output.preactivation]
            self.gated[value] = self.call_module(f"gated_{value}", AtPreactivation(phi), h, error)
        return self.gated[value]

    def _fit(self, subgraph: Subgraph) -> None:
        """Fit the maps of the subgraph's values to what of its gradient does not come by exact messages."""
        if self.fits is None or self.rule.calibration is None:
            return
        exact = {c.name for c in self.fits.connections if c.exact}
        groups = fitted_groups(self.fits)
        for output in subgraph.outputs:
            group = groups.get(output.value, ())
            sent = [c for c in self.graph.incoming(subgraph.name) if c.value == output.value and c.name not in exact]
            gradient = self._sum([m for c in sent for m in self._message(c)])
            errors = [self._error_read(c) for c in group]
            if not group or gradient is None or None in errors:
                continue
            maps = [feedback_map(self.fits, c) for c in group]
            names = [*moment_names(output.value), *(self.weight_names[c.name][0] for c in group)]
            second, cross, *weights = [self._get(f"error_weights.{name}") for name in names]
            module = Fit(self.rule.calibration, maps, output.axis)
            self.call_module(f"fit_{output.value}", module, gradient, second, cross, *errors, *weights)

    def _sum(self, nodes: list[fx.Node]) -> fx.Node | None:
        if len(nodes) < 2:
            return nodes[0] if nodes else None
        return self.call(add_messages, *nodes)

    def _update(self, subgraph: Subgraph) -> None:
        number = self.graph.number[subgraph.name]
        feeds = self.feeds[subgraph.name]
        weights = self.graph.trainable(subgraph)
        sent = [c for c in self.graph.connections if c.kind == "vjp" and c.source == subgraph.name]
        inputs = [item.name for item in self.graph.inputs if item.name in subgraph.inputs and item.type]
        if not feeds:
            return
        shape = UpdateShape(len(feeds), len(weights), len(sent) + len(inputs))
        result = self.call_module(
            f"U{number}", Update(self.rule, shape),
            *(output for output, _ in feeds), *(error for _, error in feeds),
            *map(self.attribute, weights), *(self.seen[c.value] for c in sent), *(self.seen[x] for x in inputs),
            self.retain,
        )  # fmt: skip
        taken = [self.call(operator.getitem, result, i) for i in range(shape.parameters + shape.inputs)]
        for name, node in zip(weights, taken[: shape.parameters], strict=True):
            self.gradients.setdefault(name, []).append(node)
            if self.rule.learns_feedback and name in self.graph.twins:
                self.gradients.setdefault(f"error_weights.{twin_name(name)}", []).append(self.call(copied, node))
        for connection, node in zip(sent, taken[shape.parameters :], strict=False):
            self.messages[connection.name] = node
        for name, node in zip(inputs, taken[shape.parameters + len(sent) :], strict=True):
            self.input_gradients.setdefault(name, []).append(node)
        done = [name for name in weights if self.last_user[name] == subgraph.name]
        twins = [f"error_weights.{twin_name(name)}" for name in done]
        self._apply([*done, *(name for name in twins if name in self.gradients)])

    def _apply(self, names: list[str]) -> None:
        if self.fused and names:
            gradients = [self._sum(self.gradients[name]) for name in names]
            self.call(apply_updates, self.apply, tuple(names), *gradients)

    def _finish(self) -> TrainingGraph:
        weights = tuple(s.name for s in self.graph.states if s.trainable and s.name in self.gradients)
        feedback = tuple(name for name in self.gradients if name.startswith("error_weights."))
        returned: Any = self.outputs
        if not self.fused:
            inputs = [self._sum(self.input_gradients.get(item.name, [])) for item in self.graph.inputs]
            returned = (
                self.outputs,
                tuple(self._sum(self.gradients[name]) for name in weights),
                tuple(self._sum(self.gradients[name]) for name in feedback),
                tuple(inputs),
            )
        self.fx.output(returned)
        assert self.output_error is not None
        module = assemble(self.fx, self.modules, self.roots, f"{self.graph.name}Training")
        return TrainingGraph(module, weights, feedback, self.output_error.name)
