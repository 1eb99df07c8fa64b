"""Nonlinear transforms with local propagation: nodes that aim at sparse codes, and hand each other's misses down.

The terms, for a node v (a value that crosses to another subgraph, or that the model returns): q_v is its
pre-activation as a function of its parents' codes u_pa, u_v = T(q_v; tau_v) its **code**, with the soft threshold
T(q; t) = sign(q) * max(|q| - t, 0), and g_v its **goal**.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graphlocal.errors import InputError
from graphlocal.ir import Connection, LocalGraph
from graphlocal.rules.base import Rule, loss_connections, reversed_data_edges
from graphlocal.rules.lp import variables
from graphlocal.verify import learning_values


@dataclass(frozen=True)
class NLP(Rule):
    """Nonlinear transforms with local propagation (Kostadinov, Razeghi, Voloshynovskiy).

    The threshold stands in the place of the subgraphs' own elementwise tails, while training and in
    `graphlocal.representations`; the model itself, in eval(), keeps its tails. So what is learned is judged by its
    codes (`graphlocal.knn_error`), not by the model's output. A model that divides by what becomes a code, which can be
    zero, is told at the first step that its loss is not a number.

    Stage 1, forward: u_v = T(q_v; tau_v). tau_v is fixed on the first batch, such that the share `keep` of |q_v| is
    above it; at the model's outputs it is 0. Stage 2, in reverse: at a node with a goal of its own, y_v = g_v; at
    others nu_v = lambda_f sum over readers c of VJP_{c -> v}(u_c - y_c), and y_v = T(q_v - nu_v; lambda_1), which is
    the goal of that node. Nodes that no goal lies above stay as they are. With a loss in the place of a goal, its
    gradient at the outputs is their u - g.
    update: `"gradient"`, the batch mean gradient of |q_v - y_v|^2 / 2, for the optimizer; or `"ridge"`, for subgraphs
    that are one linear layer with parameters [W b] = A on inputs U (with ones for b) of N rows: A <- A + step (A* - A),
    A* = (Y^T U / N + mu A) (U^T U / N + mu I)^-1, which needs no optimizer. asynchronous: the probability that a
    subgraph is drawn to update at a step; None updates all.

    The paper's own formulas disagree in signs and cancel the message; this is the form that works (see design notes).
    Raises InputError for options out of range.
    """

    name: ClassVar[str] = "nlp"
    engine: ClassVar[str] = "nonlinear"
    feedback: ClassVar[bool] = False
    lambda_f: float = 0.3
    lambda_1: float = 0.0
    keep: float = 0.5
    update: Literal["gradient", "ridge"] = "gradient"
    mu: float = 1.0
    step: float = 0.5
    asynchronous: float | None = None

    def __post_init__(self) -> None:
        if self.update not in ("gradient", "ridge"):
            raise InputError(f"NLP(update={self.update!r})", remedy="use 'gradient' or 'ridge'")
        for option, low, high in (
            ("lambda_f", 0, math.inf), ("lambda_1", 0, math.inf), ("keep", 0, 1), ("mu", 0, math.inf), ("step", 0, 1),
            ("asynchronous", 0, 1),
        ):  # fmt: skip
            value = getattr(self, option)
            if option == "asynchronous" and value is None:
                continue
            positive = option in ("keep", "mu", "step", "asynchronous")
            valid = isinstance(value, (int, float)) and low <= value <= high and value < math.inf
            if not valid or (positive and not value > 0):
                span = f"{'above' if positive else 'at least'} 0" + (f" and at most {high}" if high < math.inf else "")
                raise InputError(f"NLP({option}={value!r})", why=f"it must be a number {span}")

    @property
    def needs_optimizer(self) -> bool:
        return self.update == "gradient"

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        found = (*hidden_nodes(graph), *output_nodes(graph))
        messages = [c for c in reversed_data_edges(graph, exact=False) if c.value in found]
        computed = [c for c in reversed_data_edges(graph) if c.value not in found]
        return (*loss_connections(graph), *messages, *computed)

    def buffers(self, graph: LocalGraph) -> dict[str, Tensor]:
        return {threshold_name(value): torch.tensor(math.nan) for value in hidden_nodes(graph)}


def hidden_nodes(graph: LocalGraph) -> tuple[str, ...]:
    """The nodes that others read, which have thresholds."""
    return variables(graph)


def output_nodes(graph: LocalGraph) -> tuple[str, ...]:
    """The nodes that the model returns and nothing in it reads."""
    learning = learning_values(graph)
    return tuple(
        value
        for neuron in graph.error_neurons
        for value in neuron.values
        if value in learning and value in graph.outputs and value not in graph.readers
    )


def threshold_name(value: str) -> str:
    """The name under which a node's threshold is kept with the model."""
    return f"threshold_{value}"


def soft_threshold(q: Tensor, threshold: Tensor | float) -> Tensor:
    """T(q; t) = sign(q) * max(|q| - t, 0)."""
    return q.sign() * (q.abs() - threshold).clamp_min(0)
