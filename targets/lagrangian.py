"""The engine of Local Propagation: all variables, multipliers and weights step at once, from their old values.

The subgraphs meet in the variables alone, so no subgraph waits for another. Only values without variables (made of
parameters alone, or of the inputs alone) are computed in program order, and their errors in reverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.rules.lp import LP, variables
from graphlocal.sample_store import SampleStore
from graphlocal.targets.nodes import LossErrors, Nodes, Run, StepCall, add_to
from graphlocal.targets.samples import SampleAxes, find_sample_axes

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """The Lagrangian of a batch and its derivatives, by value or parameter name.

    loss: V, in the user's units. residuals: r_v. variables: dL/dx_v for each sample. parameters: dL/dtheta, summed
    over the samples.
    """

    loss: Tensor
    residuals: dict[str, Tensor]
    variables: dict[str, Tensor]
    parameters: dict[str, Tensor]


class LagrangianEngine:
    """Steps of Local Propagation on one compiled model.

    order: in which the subgraphs are gone through; any order gives the same, as long as computed values (see above)
    come before their readers.
    """

    def __init__(self, nodes: Nodes, rule: LP, error_weights: nn.Module) -> None:
        self.nodes, self.rule = nodes, rule
        self.variables = variables(nodes.graph)
        self.order = nodes.graph.subgraphs

    def step(self, leaves: Sequence[Any], call: StepCall) -> tuple[Tensor, dict[str, Tensor]]:
        """One visit of a batch. Raises InputError for an index that does not number the samples of the batch."""
        index, memory = call.index, call.memory
        if index is None:
            raise InputError(
                "the rule 'lp' needs the numbers of the samples",
                why="it keeps variables for each sample from one visit to the next",
                remedy="call step(x, y, index=i), with i a LongTensor of the samples' places in the data set",
            )
        if not isinstance(index, Tensor) or index.dim() != 1:
            raise InputError("index is no vector", remedy="pass a LongTensor with one number for each sample")
        axes, store = self._memory(memory, leaves, index)
        axes.require_batch(leaves, len(index))
        x, multipliers = self._load(leaves, axes, store, index)
        for _ in range(self.rule.inner_steps):
            found = self.evaluate(leaves, x, multipliers, call.loss, len(index))
            x = {v: x[v] - self.rule.eta_x * found.variables[v] for v in x}
            multipliers = {
                v: multipliers[v] + self.rule.eta_lambda * self.rule.constraint(found.residuals[v]) for v in x
            }
        rows = {f"x {v}": axes.rows(v, x[v]) for v in x}
        rows |= {f"lambda {v}": axes.rows(v, multipliers[v]) for v in x}
        _require_finite(rows)
        store.write(index, rows)
        return found.loss, {name: gradient / len(index) for name, gradient in found.parameters.items()}

    def evaluate(
        self, leaves: Sequence[Any], x: Tensors, multipliers: Tensors, loss: LossErrors, samples: int
    ) -> Evaluation:
        """L and its derivatives at given variables and multipliers, which have the shapes of their values."""
        seen = {**self.nodes.given(leaves), **x}
        returned: dict[str, Any] = dict.fromkeys(self.nodes.graph.outputs)
        runs: list[Run] = []
        residuals = {}
        for subgraph in self.order:
            run = self.nodes.run(subgraph, self._cast(subgraph.inputs, seen))
            runs.append(run)
            for output in subgraph.outputs:
                value = output.value
                made = _detached(run.values[value])
                if value in x:
                    residuals[value] = x[value] - made
                else:
                    seen[value] = made
                if value in returned:
                    returned[value] = made
        flat = self.nodes.outputs({**seen, **{k: v for k, v in returned.items() if v is not None}})
        total, slopes = loss(flat)
        errors: dict[str, Tensor] = {}
        for value, slope in zip(self.nodes.graph.outputs, slopes, strict=True):
            if slope is not None:  # per sample: the loss is a mean over the batch
                add_to(errors, {value: slope * samples})
        pulls = {v: multipliers[v] * self.rule.slope(r) + self.rule.rho * r for v, r in residuals.items()}
        add_to(errors, pulls, -1.0)
        return Evaluation(total, residuals, *self._derivatives(runs, errors, pulls))

    def _derivatives(
        self, runs: list[Run], errors: dict[str, Tensor], pulls: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """dL/dx and dL/dtheta, from the cotangents of what each subgraph made."""
        products = {}
        for run in reversed(runs):
            made = {o.value: errors[o.value] for o in run.subgraph.outputs if o.value in errors}
            products[run.subgraph.name] = by_parameter, by_input = self.nodes.vjp(run, made)
            add_to(errors, {value: message for value, message in by_input.items() if value not in pulls})
        slopes: dict[str, Tensor] = dict(pulls)
        gradients: dict[str, Tensor] = {}
        for subgraph in self.nodes.graph.subgraphs:  # sums are taken in one order, whatever `order` is
            by_parameter, by_input = products[subgraph.name]
            add_to(gradients, by_parameter)
            add_to(slopes, {value: message for value, message in by_input.items() if value in pulls})
        return slopes, gradients

    def _cast(self, names: Sequence[str], seen: Mapping[str, Any]) -> Mapping[str, Any]:
        """Variables may be kept in a wider dtype than the value that they stand for."""
        narrow = {}
        for name in names:
            if name in self._dtypes and seen[name].dtype != self._dtypes[name]:
                narrow[name] = seen[name].to(self._dtypes[name])
        return {**seen, **narrow} if narrow else seen

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        types = {v: self.nodes.graph.type(v) for v in self.variables}
        return {v: getattr(torch, t.dtype) for v, t in types.items() if t is not None}

    def _memory(self, memory: dict[str, Any], leaves: Sequence[Any], index: Tensor) -> tuple[SampleAxes, SampleStore]:
        """The sample axes and the store, made at the first visit."""
        if "store" not in memory:
            axes = find_sample_axes(self.nodes, leaves, len(index), self.variables)
            sizes = {v: axes.size(v) for v in self.variables}
            fields = {f"{kind} {v}": size for kind in ("x", "lambda") for v, size in sizes.items()}
            rule = self.rule
            memory["axes"] = axes
            memory["store"] = SampleStore(
                fields, axes.dtype, axes.device, samples=rule.samples, path=rule.path, max_bytes=rule.max_bytes
            )
        axes = memory["axes"]
        if tuple(axes.values) != self.variables:
            raise InputError(
                "the model has other subgraphs than at the first step, so the samples' variables don't fit",
                remedy="make a new train_step after changing the model",
            )
        return axes, memory["store"]

    def _load(
        self, leaves: Sequence[Any], axes: SampleAxes, store: SampleStore, index: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        visited, rows = store.read(index)
        device = axes.device
        x = {v: rows[f"x {v}"].to(device) for v in self.variables}
        if self.rule.x0 == "forward" and not bool(visited.all()):
            start = self.nodes.forward(leaves)
            known = visited.to(device).unsqueeze(1)
            x = {v: torch.where(known, x[v], axes.rows(v, start[v]).to(x[v].dtype)) for v in x}
        return (
            {v: axes.values_of(v, x[v]) for v in x},
            {v: axes.values_of(v, rows[f"lambda {v}"].to(device)) for v in x},
        )


def _require_finite(rows: Tensors) -> None:
    """Raise LocalTrainingError, before anything is kept, if a variable or multiplier is not a number."""
    if not rows or bool(torch.stack([row.sum() for row in rows.values()]).isfinite().all()):
        return
    bad = next((name for name, row in rows.items() if not bool(row.isfinite().all())), next(iter(rows)))
    raise LocalTrainingError(
        f"{bad!r} has grown beyond all numbers (x are the samples' variables, lambda their multipliers)",
        remedy="lower eta_x, eta_lambda or the learning rate",
    )


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
