"""Equilibrium propagation: two relaxations of one energy, free and nudged, and the difference of what they end in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from graphlocal.errors import InputError
from graphlocal.ir import Connection, LocalGraph, Subgraph
from graphlocal.rules.aligning import require_counts, require_positive
from graphlocal.rules.base import Rule, loss_connections, reversed_data_edges
from graphlocal.verify.rule import place


class RelaxingRule(Rule):
    """Rules that relax a chain of affine subgraphs; see EquilibriumPropagation for the options."""

    relaxes: ClassVar[bool] = True
    beta: float
    sign: Literal["random", "fixed"]
    free_steps: int
    nudged_steps: int
    dt: float


@dataclass(frozen=True)
class EquilibriumPropagation(RelaxingRule):
    """Equilibrium propagation (Scellier and Bengio, 2017), in the form of Ernoult et al. (2019) with a leak.

    The model must be a chain of subgraphs s_i = phi_i(A_i(s_{i-1})) with affine A_i and elementwise phi_i that never
    fall, that of the last one the identity. Its state minimizes
    E = sum_i G_i(s_i) - s_i . A_i(s_{i-1}), with G_i' the inverse of phi_i:
    s_i <- (1 - dt) s_i + dt phi_i(A_i(s_{i-1}) + A_{i+1}^T s_{i+1}), with the weights' transpose taken by derivatives.
    Free phase: `free_steps` of it, from the states of the forward pass. Nudged phase: `nudged_steps` more, with
    -beta e added to the last state, where e is the gradient of each sample's loss at the free phase's output, held
    fixed. Update: (dE/dtheta at the nudged state - dE/dtheta at the free one) / beta, which becomes the gradient of the
    loss at the free fixed point as beta goes to 0 and the phases converge.

    In training mode the compiled model returns the output of the free phase, not of one forward pass; in evaluation
    mode it is the original model. Chains of several hidden layers need more steps than the defaults, which are the
    paper's for one: an error takes a step for each layer that it passes, and shrinks with dt. beta: nudging; sign: of
    beta, `"fixed"` positive or `"random"` in every step.

    Raises InputError for options out of range; compiling does, with the place of the first obstacle, for a model that
    is no such chain.
    """

    name: ClassVar[str] = "equilibrium"
    feedback: ClassVar[bool] = False
    beta: float = 0.5
    sign: Literal["random", "fixed"] = "random"
    free_steps: int = 20
    nudged_steps: int = 4
    dt: float = 0.5

    def __post_init__(self) -> None:
        require_positive(self, ("beta", "dt"))
        require_counts(self, ("free_steps", "nudged_steps"))
        if self.dt > 1:
            raise InputError(f"EquilibriumPropagation(dt={self.dt!r})", why="a step goes at most all the way, dt=1")
        if self.sign not in ("random", "fixed"):
            raise InputError(f"EquilibriumPropagation(sign={self.sign!r})", remedy="use 'random' or 'fixed'")

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        require_affine_chain(graph, self.name)
        return (*loss_connections(graph), *reversed_data_edges(graph, exact=False))


_AFFINE = re.compile(
    r"aten\.(linear|conv\dd|convolution|addmm|mm|matmul|t|view|_unsafe_view|reshape|flatten|unflatten|permute|transpose|"
    r"contiguous|clone|squeeze|unsqueeze|avg_pool\dd|adaptive_avg_pool\dd|add|sub|mul)\b"
)


_RISING = re.compile(
    r"aten\.(tanh|sigmoid|relu6?_?|leaky_relu|elu|selu|celu|softplus|hardtanh|hardsigmoid|clamp|clamp_min|clone)\b"
)


def require_affine_chain(graph: LocalGraph, rule: str) -> None:
    """Raise InputError, naming the first obstacle, unless the graph is a chain of affine subgraphs with tails."""

    def refuse(problem: str, operation: str) -> InputError:
        return InputError(
            f"the rule {rule!r} has no energy for this model: {problem}",
            where=place(graph, operation),
            why="it relaxes a chain of subgraphs, each an affine map and an elementwise function that never falls",
            remedy="use another rule, or partition='leaf' if the model is such a chain",
        )

    before = ""
    for subgraph in graph.subgraphs:
        last = subgraph.operations[-1]
        if len(subgraph.inputs) != 1 or len(subgraph.outputs) != 1:
            count = f"{len(subgraph.inputs)} values and gives {len(subgraph.outputs)}"
            raise refuse(f"subgraph {subgraph.name!r} reads {count}, in place of one each", last)
        (value,), (output,) = subgraph.inputs, subgraph.outputs
        if value != before and before:
            raise refuse(f"subgraph {subgraph.name!r} does not read {before!r}, the one before it", last)
        if output.smooth:
            raise refuse(f"subgraph {subgraph.name!r} ends in a discrete unit", output.value)
        _require_affine(graph, subgraph, refuse)
        before = output.value
    final = graph.subgraphs[-1].outputs[0]
    if graph.outputs != (final.value,) or len(graph.inputs) != 1:
        raise refuse("it has several inputs or outputs", final.value)
    if final.preactivation != final.value:
        raise refuse(f"its output is {graph.operation[final.value].target} of an affine map", final.value)


def _require_affine(graph: LocalGraph, subgraph: Subgraph, refuse: object) -> None:
    """Every operation up to the pre-activation is affine in the one value that the subgraph reads."""
    assert callable(refuse)
    (output,) = subgraph.outputs
    tail = set(graph.tail(output))
    moving = set(subgraph.inputs)
    for name in subgraph.operations:
        op = graph.operation[name]
        if op.effects:
            raise refuse(f"{op.target} draws random numbers or changes a state", name)
        if moving.isdisjoint(op.inputs):
            continue
        moving.add(name)
        affine = _AFFINE.match(op.target) and len(moving.intersection(op.inputs)) == 1
        if name not in tail and not (affine and op.type is not None and op.type.is_float):
            raise refuse(f"{op.target} is not affine", name)
        if name in tail and not _RISING.match(op.target):
            raise refuse(f"{op.target} is not known to be a function that never falls", name)
