"""The error that a step raises whose updates are not numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from graphlocal.arguments import empty_batch
from graphlocal.compiler import Compiled
from graphlocal.errors import LocalTrainingError
from graphlocal.norms import UpdateNorms


def require_finite(
    compiled: Compiled, errors: Iterable[Tensor | None], norms: UpdateNorms, empty: bool = False
) -> None:
    """Raise LocalTrainingError, naming the subgraph, if the norm of an update is not a number; InputError if the batch
    is `empty`.

    An infinite output error is let pass: a loss scaler makes it, looks for it, and skips the step.
    """
    if not norms.found or not math.isnan(norms.total()):
        return
    given = [error for error in errors if error is not None]
    if empty:
        raise empty_batch("a mean over no samples is not a number")
    if any(bool(error.isinf().any()) for error in given):
        return
    if any(bool(error.isnan().any()) for error in given):
        raise LocalTrainingError(
            "the error of the output is not a number",
            why="the loss or the outputs hold NaN",
            remedy="lower the learning rate, or look for NaN in the inputs (set local.check_finite = False to go on)",
        )
    bad = norms.bad()
    order = [compiled.graph.subgraphs[a.subgraph - 1] for a in compiled.graph.schedule if a.kind == "D"]
    subgraph = next(s for s in (order or reversed(compiled.graph.subgraphs)) if bad.intersection(s.states))
    raise LocalTrainingError(
        f"the local error of subgraph {subgraph.name!r} is not a number",
        where=compiled.graph.operation[subgraph.operations[0]].source,
        why=f"its update of {next(name for name in subgraph.states if name in bad)} holds NaN",
        remedy="lower the learning rate or beta (set local.check_finite = False to go on)",
    )
