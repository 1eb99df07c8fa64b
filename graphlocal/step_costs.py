"""The seconds of every action of a step of a rule, and of backpropagation's on the same subgraphs, for the plan.

Three ways lead to them. By the graph: `passes.cost.roofline`, from the traced operations and the connections, for rules
whose actions are products and little else. By operators: the same roofline of every operator of the lowered training
graph, so that inner steps, decoders, twins, heads, normalizations and fits are counted as they run. Measured: on this
machine.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from graphlocal.compiler import Compiled, Options, build
from graphlocal.ir import LocalGraph
from graphlocal.live_memory import tensor_bytes
from graphlocal.measured import Measured, lowered_step, measure
from graphlocal.passes.cost import KINDS, Device, Key, Sizes, roofline
from graphlocal.rules import Backprop, RecLRA, Rule
from graphlocal.targets.lowered import NotLowered, attribute
from graphlocal.targets.simplify import VIEWS

Costs = dict[Key, float]


@dataclass(frozen=True)
class StepCosts:
    """Seconds of `F`, `D` and `U` of every subgraph, on the whole batch; 0 where there is nothing to do.

    calibration: those of a step that fits the rule's maps, None for rules without such steps. measured: what `local`
    was measured as. notes: what the reader of a plan has to know of them.
    """

    local: Costs
    backprop: Costs
    calibration: Costs | None = None
    measured: Measured | None = None
    notes: tuple[str, ...] = ()


def measured_costs(compiled: Compiled) -> StepCosts:
    """Times on this machine. Raises NotLowered for a model without a lowered form."""
    graph = compiled.graph
    local, true = measure(compiled), measure(_copy_by_backprop(compiled))
    fit = measure(compiled.calibration).actions if compiled.rule.calibration else None
    ratio = sum(local.actions.values()) / local.step
    note = f"Times are measured here, action by action; their sum is {ratio:.2f} of the measured step."
    return StepCosts(
        _complete(graph, local.actions),
        _complete(graph, true.actions),
        None if fit is None else _complete(graph, fit),
        local,
        (note, *_notes(compiled)),
    )


def roofline_costs(compiled: Compiled, sizes: Sizes, device: Device) -> StepCosts:
    """Times by the roofline, of the lowered operators where the graph doesn't tell all that the rule does."""
    graph, rule = compiled.graph, compiled.rule
    note = "Times are from the roofline of the given rates, not measured"
    by_graph = roofline(graph, sizes, device), roofline(graph, sizes, device, exact=True)
    if told_by_graph(rule, graph):
        return StepCosts(*by_graph, notes=(f"{note}.",))
    try:
        local, true = (_by_operators(c, device) for c in (compiled, _copy_by_backprop(compiled)))
        fit = _by_operators(compiled.calibration, device) if rule.calibration else None
    except NotLowered as error:
        missing = f"{note}; what the rule {rule.name!r} does beyond products is left out, so that local takes longer"
        reason = f"than this: {error.message}."
        return StepCosts(*by_graph, by_graph[1] if rule.calibration else None, notes=(f"{missing} {reason}",))
    return StepCosts(local, true, fit, notes=(f"{note}: of every operator that the actions run.", *_notes(compiled)))


def told_by_graph(rule: Rule, graph: LocalGraph) -> bool:
    """Whether a rule's actions are the operations and connections of the graph, and a target of a few values."""
    if rule.rereads or rule.learns_feedback or rule.needs_labels or rule.calibration is not None or graph.twins:
        return False
    if isinstance(rule, RecLRA):
        return type(rule).local_error is RecLRA.local_error and rule.reprojection is None
    return type(rule).local_error is Rule.local_error and type(rule).project is Rule.project


def _notes(compiled: Compiled) -> tuple[str, ...]:
    found = []
    if compiled.rule.needs_labels:
        found.append("The local heads are costed for labels of one class for each row of the output's features.")
    if compiled.rule.rereads:
        found.append("Actions that evaluate subgraphs again do so as if every device had their parameters.")
    return tuple(found)


def _by_operators(compiled: Compiled, device: Device) -> Costs:
    """The roofline's times of a compiled step's lowered operators. Raises NotLowered where there are none."""
    lowered = lowered_step(compiled)

    def value(node: fx.Node) -> Any:
        return attribute(lowered.module, str(node.target)) if node.op == "get_attr" else node.meta.get("val")

    found: defaultdict[str, float] = defaultdict(float)
    for node in filter(_computes, lowered.module.graph.nodes):
        moved = sum(_traffic(value(x)) for x in (*node.all_input_nodes, node))
        found[node.meta.get("action") or ""] += device.seconds(_flops(node, value), moved)
    return {(kind, n): found[f"{kind}{n}"] for n in compiled.graph.number.values() for kind in KINDS}


def _computes(node: fx.Node) -> bool:
    """Whether a node is an operator that does more than look at memory in another way."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and not target.is_view and target not in VIEWS


def _traffic(value: Any) -> int:
    """Bytes of the tensors among a value; what is expanded is read once."""
    tensors = (x for x in pytree.tree_leaves(value) if isinstance(x, Tensor))
    return sum(min(tensor_bytes(x), x.untyped_storage().nbytes()) for x in tensors)


def _flops(node: fx.Node, value: Callable[[fx.Node], Any]) -> int:
    """Floating-point operations: by torch's formulas or those below, or one for each element of the result."""
    out = value(node)
    target: Any = node.target
    if target in _FORMULAS:
        return _FORMULAS[target](*(value(x) for x in node.all_input_nodes))
    formula = flop_registry.get(_LIKE.get(target) or getattr(target, "overloadpacket", None))
    if formula is not None:
        return int(formula(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value), out_val=out))
    return sum(x.numel() for x in pytree.tree_leaves(out) if isinstance(x, Tensor))


def _cholesky(matrix: Tensor) -> int:
    return matrix.numel() * matrix.shape[-1] // 3


def _cholesky_solve(right: Tensor, factor: Tensor) -> int:
    return 2 * right.numel() * factor.shape[-1]


def _recurrent(x: Tensor, weight: Tensor, recurrent: Tensor, *_: Tensor) -> int:
    return 2 * x.shape[:2].numel() * (weight.numel() + recurrent.numel())


aten = torch.ops.aten

_FORMULAS: Mapping[Any, Callable[..., int]] = {
    aten.linalg_cholesky_ex.default: _cholesky,
    aten.cholesky_solve.default: _cholesky_solve,
    aten.mkldnn_rnn_layer.default: _recurrent,
    aten.mkldnn_rnn_layer_backward.default: lambda *given: 2 * _recurrent(*given),
}
"""For operators that torch's counter does not know, of the tensors that they read."""

_LIKE = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}
"""Operators that count like another, which the counter knows."""


def _copy_by_backprop(compiled: Compiled) -> Compiled:
    """A copy of the model, cut into the same subgraphs, trained by backpropagation."""
    owner = compiled.graph.owner
    options = Options(Backprop(), partition=lambda op: owner[op.name])
    return build(copy.deepcopy(compiled.model), compiled.traced.arguments, options, nn.Module())


def _complete(graph: LocalGraph, actions: Mapping[Key, float]) -> Costs:
    """Times of all actions; those that the lowered graph has no operators for take none."""
    return {(kind, n): actions.get((kind, n), 0.0) for n in graph.number.values() for kind in KINDS}
