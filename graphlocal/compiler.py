"""From a model and one call's arguments to an executable training step: trace, passes, emit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphlocal.arguments import Arguments
from graphlocal.errors import InputError
from graphlocal.execution import Execution
from graphlocal.feedback import map_shapes, sparse_map, weight_names
from graphlocal.fitting import STEPS, fitted_buffers
from graphlocal.guards import has_guards
from graphlocal.ir import Connection, LocalGraph
from graphlocal.lift import lift
from graphlocal.partial_optimizer import together
from graphlocal.passes.discrete_units import FindDiscreteUnits
from graphlocal.passes.error_neurons import InsertErrorNeurons
from graphlocal.passes.partition import Partition
from graphlocal.passes.policies import Policy
from graphlocal.passes.schedule import Schedule
from graphlocal.passes.skip_errors import InsertSkipErrors
from graphlocal.pipeline import PassRecord, run
from graphlocal.rules import Backprop, Rule
from graphlocal.stored import StoredModel
from graphlocal.targets.bodies import twin_name
from graphlocal.targets.decoders import bias_name
from graphlocal.targets.eager import emit
from graphlocal.targets.emit_recompute import chosen
from graphlocal.targets.engines import ENGINES, Engine
from graphlocal.targets.flat import flatten
from graphlocal.targets.halting import CreditDepth
from graphlocal.targets.heads import head_name
from graphlocal.targets.nodes import Nodes
from graphlocal.targets.training_graph import TrainingGraph, split
from graphlocal.trace import DynamicDims, TracedModel, trace
from graphlocal.verify import dead_parameters

TARGETS = ("auto", "eager", "lowered", "batched", "inductor", "streams")


@dataclass(frozen=True)
class Options:
    """What a user asks of the compiler.

    streams: actions that the schedule may run at one time. target: what runs the training graph.
    recompute: subgraphs whose interior is not kept but worked out again at their update, as globs; True for all.
    """

    rule: Rule
    partition: Policy = "auto"
    skip_errors: tuple[tuple[str, str], ...] = ()
    streams: int = 1
    target: str = "auto"
    recompute: bool | tuple[str, ...] = False


@dataclass(frozen=True, eq=False)
class Compiled:
    """A model compiled for one kind of call.

    records: what each pass did. error_weights: holds the feedback maps E, and outlives this object. depth: how far the
    errors of the last step went, if the rule lets samples stop. fits: on a `calibration`, the graph whose maps it fits.
    """

    model: nn.Module
    options: Options
    traced: TracedModel
    graph: LocalGraph
    records: tuple[PassRecord, ...]
    emitted: TrainingGraph | None
    error_weights: nn.Module
    depth: CreditDepth
    fits: LocalGraph | None = None

    @cached_property
    def training(self) -> TrainingGraph:
        """The training graph. Raises InputError for a rule that runs no schedule."""
        require_schedule(self.options.rule)
        assert self.emitted is not None
        return self.emitted

    @cached_property
    def engine(self) -> Engine | None:
        """What runs a training step of a rule without a schedule."""
        make = ENGINES.get(self.options.rule.engine)
        return make(Nodes(self.graph, self.traced, self.model), self.options.rule, self.error_weights) if make else None

    @cached_property
    def calibration(self) -> Compiled:
        """The same subgraphs wired for backpropagation, to whose true gradients this graph's maps are fitted."""
        wired = replace(self.graph, connections=Backprop().connect(self.graph), schedule=())
        graph, _ = run(wired, (Schedule(self.options.streams),))
        emitted = emit(graph, self.traced, self.model, self.options.rule, self.error_weights, fits=self.graph)
        return replace(self, graph=graph, records=(), emitted=emitted, fits=self.graph)

    @cached_property
    def passes(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The training graph cut at the loss: forward pass and error pass."""
        return split(self._emitted(fused=False) if self.recomputed else self.training)

    @cached_property
    def fused_passes(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The same, handing every gradient over as soon as it is complete."""
        return split(self._emitted(fused=True))

    def _emitted(self, fused: bool) -> TrainingGraph:
        return emit(
            self.graph, self.traced, self.model, self.options.rule, self.error_weights, fused, self.depth, self.fits,
            self.recomputed,
        )  # fmt: skip

    @cached_property
    def run_passes(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """`passes`, as functions without overhead."""
        forward, error = self.passes
        return flatten(forward), flatten(error)

    @cached_property
    def run_fused_passes(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """`fused_passes`, as functions without overhead."""
        forward, error = self.fused_passes
        return flatten(forward), flatten(error)

    @cached_property
    def recomputed(self) -> frozenset[str]:
        """The names of the subgraphs whose interior is not kept. Raises InputError for a glob without a match."""
        return chosen(self.graph, self.options.rule, self.options.recompute)

    @property
    def rule(self) -> Rule:
        return self.options.rule

    @property
    def streams(self) -> int:
        return self.options.streams

    @property
    def calibrates(self) -> bool:
        """Whether this is a `calibration`."""
        return self.fits is not None

    @cached_property
    def execution(self) -> Execution:
        """Chooses what runs each call."""
        return Execution(self, self.options.target)

    @cached_property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the training graph updates, in its order."""
        return tuple(self.model.get_parameter(name) for name in self.training.weights)

    @cached_property
    def together(self) -> int:
        """How many numbers of gradients a fused step's updates wait for."""
        return together(self.weights, sparing=bool(self.recomputed))

    @cached_property
    def output_template(self) -> tuple[Any, ...]:
        """The flat outputs; `COMPUTED` stands for those that the graph computes."""
        (output,) = self.traced.module.graph.find_nodes(op="output")
        return tuple(COMPUTED if isinstance(x, fx.Node) else x for x in output.args[0])

    @cached_property
    def taken(self) -> tuple[bool, ...]:
        """For each output that the graph computes: whether an error neuron takes its gradient."""
        taken = {c.value for c in self.graph.connections if c.kind == "loss"}
        return tuple(value in taken for value in self.graph.outputs)

    @cached_property
    def differentiable(self) -> tuple[bool, ...]:
        """Those of `taken` that depend on a parameter by way of derivatives: what no_grad computed does not."""
        (output,) = self.traced.module.graph.find_nodes(op="output")
        pairs = zip(output.args[0], self.traced.requires_grad, strict=True)
        flags = [flag for value, flag in pairs if isinstance(value, fx.Node)]
        return tuple(taken and flag for taken, flag in zip(self.taken, flags, strict=True))

    def mismatch(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> set[tuple[int, int]] | None:
        """None if a call fits, else the (leaf, axis) of sizes that differ; empty if more than sizes differs."""
        arguments = self.traced.arguments
        if spec is not self._spec_that_fits and spec != arguments.spec:
            return set()
        self.__dict__["_spec_that_fits"] = spec  # equal to the example's, and known at sight from now on
        sizes: set[tuple[int, int]] = set()
        for i, (given, example) in enumerate(zip(leaves, arguments.leaves, strict=True)):
            if isinstance(example, torch.Tensor):
                if not isinstance(given, torch.Tensor) or not _alike(given, example):
                    return set()
                if given.shape != example.shape:
                    sizes |= {(i, k) for k, n in enumerate(example.shape) if given.shape[k] != n}
            elif given is not example and (type(given) is not type(example) or given != example):
                return set()
        sizes -= self.symbolic
        return sizes or None

    @cached_property
    def _spec_that_fits(self) -> pytree.TreeSpec:
        return self.traced.arguments.spec

    @cached_property
    def returns_one(self) -> bool:
        """Whether the model returns one value that the graph computes, and nothing around it."""
        return len(self.output_template) == 1 and self.traced.out_spec.is_leaf() and self.output_template[0] is COMPUTED

    @cached_property
    def guarded(self) -> bool:
        """True if the graph holds for the data only that take the recorded path."""
        return has_guards(self.traced.module)

    @cached_property
    def symbolic(self) -> frozenset[tuple[int, int]]:
        """The (leaf, axis) pairs whose size the graph leaves open."""
        types = [item.type for item in self.graph.inputs]
        return frozenset((i, k) for i, t in enumerate(types) if t for k, n in enumerate(t.shape) if isinstance(n, str))


COMPUTED = object()


def build(
    model: nn.Module, arguments: Arguments, options: Options, error_weights: nn.Module,
    dynamic: DynamicDims | None = None,
) -> Compiled:  # fmt: skip
    """Compile a model for calls like `arguments`; new feedback maps are added to `error_weights`.

    Raises a GraphLocalError, and leaves model and error_weights as they were, if any step fails.
    """
    traced, graph = operations(model, arguments, dynamic)
    _require_learnable(graph)
    _warn_of_dead_parameters(graph)
    graph, records = run(graph, passes(options))
    return finish(model, options, traced, graph, records, error_weights)


def operations(
    model: nn.Module, arguments: Arguments, dynamic: DynamicDims | None = None
) -> tuple[TracedModel, LocalGraph]:
    """A model's graph before any pass: by tracing, or the one that it was loaded with."""
    if isinstance(model, StoredModel):
        return model.traced(arguments), model.operations()
    traced = trace(model, arguments, dynamic)
    return traced, lift(traced, model)


def finish(
    model: nn.Module, options: Options, traced: TracedModel, graph: LocalGraph, records: tuple[PassRecord, ...],
    error_weights: nn.Module,
) -> Compiled:  # fmt: skip
    """What runs a scheduled graph; new feedback maps are added to `error_weights`."""
    _add_feedback(graph, options.rule, model, error_weights)
    depth = CreditDepth()
    chosen(graph, options.rule, options.recompute)
    scheduled = options.rule.engine == "schedule"
    training = emit(graph, traced, model, options.rule, error_weights, depth=depth) if scheduled else None
    return Compiled(model, options, traced, graph, records, training, error_weights, depth)


def require_schedule(rule: Rule) -> None:
    """Raise InputError for a rule whose training step is not one forward pass and one error pass."""
    if rule.engine != "schedule":
        raise InputError(
            f"the rule {rule.name!r} does not train by loss.backward()",
            why="a training step of it is not one forward pass and one error pass",
            remedy=f"step = graphlocal.train_step(local, loss_fn, optimizer), then {rule.call} for each batch; "
            "local.eval() or torch.no_grad() give the model itself",
        )


def passes(options: Options) -> tuple[Any, ...]:
    """The passes that `options` stand for, in order."""
    return (
        *([_find_discrete_units(options.rule)] if options.rule.passes_discrete else []),
        Partition(options.partition, options.rule.levels, options.rule.preferred_partition),
        InsertErrorNeurons(),
        InsertSkipErrors(options.rule, options.skip_errors),
        *([Schedule(options.streams)] if options.rule.engine == "schedule" else []),
    )


def _find_discrete_units(rule: Rule) -> FindDiscreteUnits:
    return FindDiscreteUnits(rule.passes_squashing, beside_derivatives=rule.needs_losses)


def _require_learnable(graph: LocalGraph) -> None:
    if not any(state.trainable for state in graph.states):
        raise InputError(
            f"{graph.name} has no trainable parameter that its forward reads",
            remedy="call requires_grad_(True) on the parameters to train",
        )
    types = [graph.type(value) for value in graph.outputs]
    if not any(t is not None and t.is_float for t in types):
        listed = ", ".join(t.dtype if t else "a number" for t in types) or "nothing"
        raise InputError(
            f"{graph.name} returns no float tensor (it returns {listed})",
            why="learning starts from the gradient of a loss at a float output",
            remedy="return the logits, not the predicted class",
        )


def _warn_of_dead_parameters(graph: LocalGraph) -> None:
    dead = dead_parameters(graph)
    if dead:
        listed = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
        warnings.warn(
            f"{graph.name} reads parameters that influence nothing it returns, so that they get no update: {listed}. "
            "Return what they compute if a loss is to train them, or freeze them.",
            stacklevel=6,
        )


def _add_feedback(graph: LocalGraph, rule: Rule, model: nn.Module, error_weights: nn.Module) -> None:
    """Draw each new E and each new twin; they depend on torch's seed, and the random stream is not moved."""
    example = next(p for p in model.parameters() if p.is_floating_point())
    names = weight_names(graph)
    _add_fitted(graph, example, error_weights)
    for i, connection in enumerate(c for c in graph.connections if c.kind == "feedback" and not c.fitted):
        generator = torch.Generator().manual_seed((torch.initial_seed() + 7919 * (i + 1)) % 2**63)
        wanted = dict(zip(names[connection.name], map_shapes(connection), strict=True))
        known = {name: getattr(error_weights, name, None) for name in wanted}
        if any(E is None or E.shape != wanted[name] for name, E in known.items()):
            for name, value in zip(wanted, _drawn(rule, connection, generator), strict=True):
                before = known[name]
                if before is not None and before.shape == wanted[name]:
                    continue
                dtype = example.dtype if value.is_floating_point() else value.dtype
                _register(error_weights, name, value.to(example.device, dtype), rule)
        bias = bias_name(names[connection.name][0])
        if rule.decodes and not hasattr(error_weights, bias):
            zeros = torch.zeros(connection.weight[0], device=example.device, dtype=example.dtype)
            _register(error_weights, bias, zeros, rule)
    _add_heads(graph, rule, example, error_weights)
    tensors = dict(model.named_parameters())
    for i, parameter in enumerate(graph.twins):
        generator = torch.Generator().manual_seed((torch.initial_seed() + 104729 * (i + 1)) % 2**63)
        if hasattr(error_weights, twin_name(parameter)):
            continue
        twin = rule.initial_twin(tensors[parameter], generator)
        if twin is not None:
            _register(error_weights, twin_name(parameter), twin, rule)
    for name, value in rule.buffers(graph).items():
        if not hasattr(error_weights, name):
            dtype = example.dtype if value.is_floating_point() else value.dtype
            error_weights.register_buffer(name, value.to(example.device, dtype))


def _drawn(rule: Rule, connection: Connection, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """A new E, or its factors, or the values of a sparse E and what they read; on the CPU."""
    if connection.fan_in and rule.learns_feedback:
        raise InputError(
            f"the rule {rule} draws a sparse feedback map that learns",
            why="what a sparse E does not read, it can't learn to read",
            remedy="leave learns_feedback False, or fan_in at 0",
        )
    if connection.fan_in:
        return sparse_map(connection, generator)
    return tuple(
        rule.initial_feedback(replace(connection, weight=pair), generator) for pair in pairwise(connection.weight)
    )


def _add_heads(graph: LocalGraph, rule: Rule, example: torch.Tensor, error_weights: nn.Module) -> None:
    """Draw the parameters of each new local head."""
    for i, connection in enumerate(c for c in graph.connections if c.kind == "head"):
        generator = torch.Generator().manual_seed((torch.initial_seed() + 15485863 * (i + 1)) % 2**63)
        for name, value in rule.initial_head(graph, connection.value, generator).items():
            known = getattr(error_weights, head_name(connection.value, name), None)
            if known is None or known.shape != value.shape:
                parameter = nn.Parameter(value.to(example.device, example.dtype))
                error_weights.register_parameter(head_name(connection.value, name), parameter)


def _add_fitted(graph: LocalGraph, example: torch.Tensor, error_weights: nn.Module) -> None:
    """The buffers of fitted maps, all zero, and the count of steps."""
    buffers = fitted_buffers(graph)
    dtype = torch.promote_types(example.dtype, torch.float32)
    for name, shape in buffers.items():
        known = getattr(error_weights, name, None)
        if known is None or known.shape != shape:
            error_weights.register_buffer(name, torch.zeros(shape, device=example.device, dtype=dtype))
    if buffers and not hasattr(error_weights, STEPS):
        error_weights.register_buffer(STEPS, torch.zeros((), dtype=torch.int64, device=example.device))


def _register(error_weights: nn.Module, name: str, value: torch.Tensor, rule: Rule) -> None:
    if rule.learns_feedback:
        error_weights.register_parameter(name, nn.Parameter(value))
    else:
        error_weights.register_buffer(name, value)


def _alike(given: torch.Tensor, example: torch.Tensor) -> bool:
    return given.dtype == example.dtype and given.device == example.device and given.dim() == example.dim()
