"""The eager target: emit a scheduled `LocalGraph` as one executable `torch.fx.GraphModule`, the training graph.

Called as `training_graph(*inputs, loss)`, it runs the schedule's actions in order and returns
`(outputs, parameter gradients, feedback gradients, input gradients)`. `loss` maps the tuple of outputs to the
tuple of their errors dloss/doutput. `graphlocal.targets.training_graph.split` cuts the graph at that point, for
training loops in which the loss is the user's own code.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from graphlocal.feedback import layout
from graphlocal.ir import Connection, LocalGraph, Representation, Subgraph
from graphlocal.rules import Backprop, Head, RelaxingRule, Rule
from graphlocal.targets.bodies import (
    FeedbackUpdate,
    LocalError,
    Update,
    UpdateShape,
    boundary,
    model_input,
    preactivations,
    sizes_read,
    subgraph_body,
    tail_function,
    twin_name,
    twins_read,
)
from graphlocal.targets.decoders import bias_name
from graphlocal.targets.emit_fit import Fitting
from graphlocal.targets.emit_halting import Halting
from graphlocal.targets.emit_recompute import Recomputation
from graphlocal.targets.emit_reread import Rereads
from graphlocal.targets.emitter import Emitter
from graphlocal.targets.equilibrium import emit_relaxation
from graphlocal.targets.halting import CreditDepth, whole
from graphlocal.targets.heads import LocalHead, head_name
from graphlocal.targets.training_graph import TrainingGraph, assemble
from graphlocal.targets.units import STEPS, Advantage, Slope, score_name, scored_units
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
    depth: CreditDepth | None = None,
    fits: LocalGraph | None = None,
    recompute: frozenset[str] = frozenset(),
) -> TrainingGraph:
    """The training graph of a scheduled graph.

    error_weights: holds the feedback maps, under `weight_names(graph)`. fused: hand each gradient to a further
    argument `apply(names, gradients)` as soon as it is complete, instead of returning them all. depth: takes note of
    how far errors go, if the rule lets samples stop. fits: a graph with the same subgraphs, whose fitted feedback maps
    are fitted to this one's gradients. recompute: subgraphs that keep what they read, and run again for their update.
    """
    depth = depth or CreditDepth()
    return _Training(graph, traced, model, rule, error_weights, fused, depth, fits, recompute).emit()


class _Training(Emitter):
    """The actions of a training step, one after another."""

    def __init__(
        self, graph: LocalGraph, traced: TracedModel, model: nn.Module, rule: Rule, error_weights: nn.Module,
        fused: bool, depth: CreditDepth, fits: LocalGraph | None, recompute: frozenset[str],
    ) -> None:  # fmt: skip
        super().__init__(graph, traced, model, rule, error_weights, fused)
        self.rereads = Rereads(self) if rule.rereads else None
        self.halting = None if rule.halting is None else Halting(self, depth)
        self.fitting = None if fits is None else Fitting(self, fits)
        self.recomputation = Recomputation(self, recompute)
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
        if self.rule.needs_labels:
            self.labels = self.fx.placeholder("labels_of_heads", default_value=None)
        if self.rule.needs_losses:
            self.losses = self.fx.placeholder("losses_of_samples", default_value=None)
        self._sizes()
        if isinstance(self.rule, Backprop) and self.rule.anneals:
            self.slope = self.call_module("slope", Slope(self.rule), self.get(f"error_weights.{STEPS}"))
        if isinstance(self.rule, RelaxingRule):
            self._hand_over(list(emit_relaxation(self, self.rule)))
            return self._finish()
        self._tag("")
        run = {"F": self._forward, "D": self._displace, "U": self._update}
        for kinds in ("F", "DU"):
            for action in self.graph.schedule:
                if action.kind in kinds:
                    run[action.kind](self.graph.subgraphs[action.subgraph - 1])
                    if action.kind == "D" and self.fitting is not None:
                        self.fitting.emit(self.graph.subgraphs[action.subgraph - 1])
                    self._tag(str(action))
            if kinds == "F":
                self.take_loss()
                self._tag("")
        return self._finish()

    def _tag(self, action: str) -> None:
        """Write on the new nodes which action they belong to."""
        for node in reversed(self.fx.nodes):
            if "action" in node.meta:
                break
            node.meta["action"] = action

    # The actions.

    def _sizes(self) -> None:
        nodes = {node.name: node for node in self.traced.module.graph.nodes}
        for op in self.graph.sizes:
            self.seen[op.name] = self.fx.node_copy(nodes[op.name], lambda n: self.seen[n.name])

    def _forward(self, subgraph: Subgraph) -> None:
        number = self.graph.number[subgraph.name]
        if self.rereads:
            self.rereads.snapshot(subgraph)
        body = subgraph_body(self.traced.module, self.graph, subgraph, self.rule)
        inputs = [self.seen[value] for value in (*subgraph.inputs, *sizes_read(self.graph, subgraph))]
        twins = [self.twin(name) for name in twins_read(self.graph, subgraph)]
        slope = [] if self.slope is None else [self.slope]
        runs = self.recomputation.forward(subgraph, body)
        result = self.call_module(f"F{number}", runs, *inputs, *map(self.attribute, subgraph.states), *twins, *slope)
        names = [*(output.value for output in subgraph.outputs), *preactivations(subgraph)]
        scored = scored_units(self.graph, subgraph, self.rule)
        names += [score_name(unit) for unit in scored]
        self.scores[subgraph.name] = names[len(names) - len(scored) :]
        for i, name in enumerate(names):
            self.attached[name] = self.call(operator.getitem, result, i, name=f"{name}_in_F{number}")
        sent_back = {c.value for c in self.graph.incoming(subgraph.name) if c.kind == "vjp"}
        for output in subgraph.outputs:
            cut = self.call(boundary, self.attached[output.value], output.value in sent_back, name=output.value)
            self.seen[output.value] = cut

    def take_loss(self) -> None:
        """The outputs, their errors, and the size of the batch."""
        outputs = tuple(self._returned(value) for value in self.graph.outputs)
        self.outputs = outputs
        self.output_error = self.call(output_errors, self.loss, outputs, name="output_error")
        candidates = [*outputs, *(self.seen[item.name] for item in self.graph.inputs)]
        self.batch = self.call(batch_size, *candidates, name="batch")
        if isinstance(self.rule, Backprop) and self.rule.needs_losses:
            kept = [self.get(f"error_weights.{name}") for name in ("estimator_baseline", STEPS)]
            self.advantage = self.call_module("advantage", Advantage(self.rule), self.losses, self.batch, *kept)

    def _returned(self, value: str) -> fx.Node:
        return self.seen[value] if value in self.seen else self.get(self.constant_names.get(value, value))

    def message(self, connection: Connection) -> list[fx.Node]:
        return [self._head(connection)] if connection.kind == "head" else super().message(connection)

    def _head(self, connection: Connection) -> fx.Node:
        """The error from a local head, whose parameters learn at once."""
        value, prefix = connection.value, "error_weights."
        axis = self.graph.representation[value].axis
        head = Head(value, axis, self.rule.head_outputs(self.graph))
        kept = self.roots["error_weights"]._parameters
        names = [name for name in kept if name.endswith(head_name(value, ""))]
        module = LocalHead(self.rule, head, [name.removesuffix(head_name(value, "")) for name in names])
        parameters = [self.get(prefix + name) for name in names]
        result = self.call_module(f"head_{value}", module, self.attached[value], self.labels, *parameters)
        for i, name in enumerate(names):
            self.gradients[prefix + name] = [self.call(operator.getitem, result, i + 1)]
        self._apply([prefix + name for name in names])
        return self.call(operator.getitem, result, 0)

    def feedback(self, connection: Connection, error: fx.Node, factors: list[fx.Node]) -> fx.Node:
        if self.halting:
            return self.halting.feedback(connection, error, factors)
        if self.rule.decodes and self.rereads:
            return self.rereads.decoded(connection, error, factors)
        return super().feedback(connection, error, factors)

    def _displace(self, subgraph: Subgraph) -> None:
        self.recomputation.repeat(subgraph)
        feeds: list[tuple[fx.Node, fx.Node]] = []
        outputs = {output.value: output for output in subgraph.outputs}
        for value in self.graph.neuron[subgraph.name].values:
            incoming = [c for c in self.graph.incoming(subgraph.name) if c.value == value]
            exact = self.sum([m for c in incoming if c.exact for m in self.message(c)])
            displacement = self.sum([m for c in incoming if not c.exact for m in self.message(c)])
            local = None
            if displacement is not None:
                local = self._local_error(outputs[value], displacement, incoming, feeds)
            if exact is not None:
                self.exact[value] = exact
                feeds.append((self.attached[value], exact))
            error = self.sum([e for e in (exact, local) if e is not None])
            if error is not None:
                self.errors[value] = error
        feeds += [(self.attached[name], self.advantage) for name in self.scores.get(subgraph.name, ())]
        self.feeds[subgraph.name] = feeds
        if self.halting:
            self.halting.stop(subgraph)
        self._release(subgraph.name)

    def _local_error(self, output: Representation, displacement: fx.Node, incoming: list[Connection],
                     feeds: list[tuple[fx.Node, fx.Node]]) -> fx.Node:  # fmt: skip
        value = output.value
        phi = tail_function(self.traced.module, self.graph.tail(output), output.preactivation)
        module = LocalError(self.rule, value, phi)
        h, z = self.attached[output.preactivation], self.attached[output.smooth or value]
        if self.rule.inner_steps > 1 and self.rereads:
            error = self.rereads.walk(output, module, displacement, incoming)
        elif self.halting:
            error = self.halting.local_error(output, displacement)
        else:
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
        if self.rule.decodes and self.rereads:
            names.append(bias_name(names[0]))
            node = self.rereads.decoder_update(connection, [self.get(name) for name in names])
        else:
            update = FeedbackUpdate(error, layout(self.graph, connection))
            source = self.error_read(connection)
            node = self.call_module(f"{connection.value}_from_{connection.source_value}_update", update,
                                    h, z, displacement, source, self.batch, *map(self.get, names))  # fmt: skip
        for i, name in enumerate(names):
            self.gradients.setdefault(name, []).append(self.call(operator.getitem, node, i))
        self.waiting[names[0]] -= 1
        if not self.waiting[names[0]]:
            self._apply(names)

    def _update(self, subgraph: Subgraph) -> None:
        number = self.graph.number[subgraph.name]
        feeds = self.feeds[subgraph.name]
        weights = self.graph.trainable(subgraph)
        sent = [c for c in self.graph.connections if c.kind == "vjp" and c.source == subgraph.name]
        inputs = [item.name for item in self.graph.inputs if item.name in subgraph.inputs and item.type]
        if not feeds:
            return
        shape = UpdateShape(len(feeds), len(weights), len(sent) + len(inputs))
        arguments = (
            *(output for output, _ in feeds), *(error for _, error in feeds),
            *map(self.attribute, weights), *(self.seen[c.value] for c in sent), *(self.seen[x] for x in inputs),
        )  # fmt: skip
        if self.halting:
            read = [*(c.value for c in sent), *inputs]
            result = self.halting.update(subgraph, Update(self.rule, shape), read, arguments)
        else:
            result = self.call_module(f"U{number}", Update(self.rule, shape), *arguments, self.retain)
        taken = [self.call(operator.getitem, result, i) for i in range(shape.parameters + shape.inputs)]
        for name, node in zip(weights, taken[: shape.parameters], strict=True):
            self.gradients.setdefault(name, []).append(node)
            if self.rule.learns_feedback and name in self.graph.twins:
                self.gradients.setdefault(f"error_weights.{twin_name(name)}", []).append(self.call(copied, node))
        for connection, node in zip(sent, taken[shape.parameters :], strict=False):
            self.messages[connection.name] = node
        for name, node in zip(inputs, taken[shape.parameters + len(sent) :], strict=True):
            gradient = self.call(whole, node, self.seen[name]) if self.halting else node
            self.input_gradients.setdefault(name, []).append(gradient)
        done = [name for name in weights if self.last_user[name] == subgraph.name]
        twins = [f"error_weights.{twin_name(name)}" for name in done]
        self._apply([*done, *(name for name in twins if name in self.gradients)])

    def _apply(self, names: list[str]) -> None:
        if self.rereads and names:
            self.rereads.hold(names)
            self._release()
        else:
            self._hand_over(names)

    def _release(self, displaced: str = "") -> None:
        for names in self.rereads.release(displaced) if self.rereads else ():
            self._hand_over(names)

    def _hand_over(self, names: list[str]) -> None:
        if self.fused and names:
            gradients = [self.total(self.gradients[name]) for name in names]
            self.call(apply_updates, self.apply, tuple(names), *gradients)

    def _finish(self) -> TrainingGraph:
        weights = tuple(s.name for s in self.graph.states if s.trainable and s.name in self.gradients)
        feedback = tuple(name for name in self.gradients if name.startswith("error_weights."))
        returned: Any = self.outputs
        if not self.fused:
            inputs = [self.total(self.input_gradients.get(item.name, [])) for item in self.graph.inputs]
            returned = (
                self.outputs,
                tuple(self.total(self.gradients[name]) for name in weights),
                tuple(self.total(self.gradients[name]) for name in feedback),
                tuple(inputs),
            )
        self.fx.output(returned)
        assert self.output_error is not None
        module = assemble(self.fx, self.modules, self.roots, f"{self.graph.name}Training")
        return TrainingGraph(module, weights, feedback, self.output_error.name)
