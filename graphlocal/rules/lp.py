"""Local Propagation: the model as constraints, solved by a saddle point in variables, multipliers and weights.

The terms, for a subgraph v that reads the values x_pa and gives f_v(x_pa; theta_v): its **variable** x_v^i is what
its readers see of sample i in its place, its **multiplier** lambda_v^i weighs the constraint x_v^i = f_v(x_pa^i).
Both stay with the sample from one visit to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graphlocal.errors import InputError
from graphlocal.ir import Connection, LocalGraph
from graphlocal.rules.base import Rule, loss_connections, reversed_data_edges
from graphlocal.verify import learning_values


@dataclass(frozen=True)
class LP(Rule):
    """Local Propagation in its Lagrangian form (Marra, Tiezzi, Melacci, Betti, Maggini, Gori, 2020).

    L = sum V(f_o(x_pa), y) + sum_v [lambda_v . G(r_v) + rho/2 |r_v|^2] over the samples, with r_v = x_v - f_v(x_pa).
    At each visit of a sample, with m_v = lambda_v * G'(r_v) + rho r_v and all values those of before the step:
    x_v -= eta_x dL/dx_v, lambda_v += eta_lambda G(r_v); the gradient of theta_v is the batch mean of -VJP(m_v).
    The model's outputs have no variable of their own; a value made of parameters alone is computed.
    The augmented term rho is not in the paper, and is what makes it work at these step sizes.

    G: `"linear"`, G(r) = r, or `"abs"`, |r|. epsilon: violations up to it are free; G shrinks by it towards 0.
    With |r| the multipliers only ever grow: take an eta_lambda of about 0.01.
    rho, eta_x, eta_lambda: as above. What matters is how stiff the constraints are beside the loss, and that the
    multipliers follow: variables that move too easily fit the labels by themselves, layer upon layer further from what
    the net computes of the sample (nine tanh layers on the digits, with rho 1 and etas of 0.3: a loss of 0.02 on the
    variables, 1.6 by the net's own forward pass, 54 to 65 % correct; with these defaults 89 to 92 %, backpropagation
    96 %). With rho 10 or more the etas have to fall, and errors take longer to come down.
    inner_steps: steps of x and lambda at each visit, of which each carries errors one subgraph further down.
    x0: where a sample's variables start, at the model's own forward pass or at zeros.
    samples: how many there are; None lets the store grow to the largest index. store: `"memory"`, on the model's
    device, or `"mmap"`, in the file `path`. max_bytes: the most that the store may take; None is 4 GiB in memory,
    and on disk what is free.

    Raises InputError for options out of range.
    """

    name: ClassVar[str] = "lp"
    engine: ClassVar[str] = "lagrangian"
    call: ClassVar[str] = "step(x, y, index=i), with i the numbers of the samples in the data set,"
    feedback: ClassVar[bool] = False
    G: Literal["linear", "abs"] = "linear"
    epsilon: float = 0.0
    rho: float = 3.0
    eta_x: float = 0.15
    eta_lambda: float = 1.0
    inner_steps: int = 1
    x0: Literal["forward", "zeros"] = "forward"
    samples: int | None = None
    store: Literal["memory", "mmap"] = "memory"
    path: str | Path | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for option, known in (("G", ("linear", "abs")), ("x0", ("forward", "zeros")), ("store", ("memory", "mmap"))):
            if getattr(self, option) not in known:
                raise InputError(f"LP({option}={getattr(self, option)!r})", remedy=f"use one of {known}")
        for option in ("epsilon", "rho", "eta_x", "eta_lambda"):
            value = getattr(self, option)
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise InputError(f"LP({option}={value!r})", why="it must be a number of 0 or more")
        for option in ("inner_steps", "samples", "max_bytes"):
            value = getattr(self, option)
            optional = option != "inner_steps" and value is None
            if not optional and not (isinstance(value, int) and value > 0):
                raise InputError(f"LP({option}={value!r})", why="it must be a whole number above 0")
        if (self.store == "mmap") != (self.path is not None):
            raise InputError(
                f"LP(store={self.store!r}, path={self.path!r})",
                why="a store in a file needs its path, and one in memory has none",
                remedy='pass both: LP(store="mmap", path="variables.bin")',
            )

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        """Raises InputError, naming the operation, for a model whose samples have no values of their own."""
        require_sample_identity(graph, self.name)
        kept = variables(graph)
        computed = (c for c in reversed_data_edges(graph) if c.value not in kept)
        messages = (c for c in reversed_data_edges(graph, exact=False) if c.value in kept)
        return (*loss_connections(graph), *messages, *computed)

    def constraint(self, residual: Tensor) -> Tensor:
        """G(r)."""
        size = residual.abs().sub(self.epsilon).clamp_min(0) if self.epsilon or self.G == "abs" else residual.abs()
        return size if self.G == "abs" else size * residual.sign()

    def slope(self, residual: Tensor) -> Tensor:
        """G'(r), 0 where G has a kink."""
        if self.G == "linear" and not self.epsilon:
            return torch.ones_like(residual)
        outside = (residual.abs() > self.epsilon).to(residual.dtype)
        return outside if self.G == "linear" else outside * residual.sign()


def variables(graph: LocalGraph) -> tuple[str, ...]:
    """The values that have variables, in program order.

    Those float values that cross from one subgraph to another, depend both on the model's inputs and on a trainable
    parameter, and lead to a float output.
    """
    data = {item.name for item in graph.inputs}
    for op in graph.operations:
        if not data.isdisjoint(op.inputs):
            data.add(op.name)
    learning = learning_values(graph)
    return tuple(
        value
        for neuron in graph.error_neurons
        for value in neuron.values
        if value in data and value in learning and value in graph.readers
    )


def require_sample_identity(graph: LocalGraph, rule: str) -> None:
    """Raise InputError for an operation that gives one sample different values from visit to visit."""
    found = [op for op in graph.operations if any(e == "random" or e.startswith("writes ") for e in op.effects)]
    if not found:
        return
    op = next((op for op in found if "norm" in op.target), found[0])  # a BatchNorm counts its batches before
    written = [effect.removeprefix("writes ") for effect in op.effects if effect.startswith("writes ")]
    does = f"changes the buffer {written[0]} at every step" if written else "draws random numbers"
    others = f"; so do {len(found) - 1} other operations" if len(found) > 1 else ""
    norm = ", or normalize within each sample (GroupNorm, LayerNorm)" if "norm" in op.target else ""
    raise InputError(
        f"the rule {rule!r} can't train through {op.name!r} ({op.target}), which {does}{others}",
        where=", ".join(part for part in (op.module, op.source) if part),
        why="the rule keeps variables for each sample, whose values must follow from the sample alone",
        remedy=f"take it out, or call eval() on that module after local.train(){norm}",
    )
