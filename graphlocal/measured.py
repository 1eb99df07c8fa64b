"""Times of a compiled model's actions on this machine."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphlocal.compiler import Compiled
from graphlocal.passes.cost import Key, Sizes, open_sizes
from graphlocal.preserve import preserved
from graphlocal.targets.accesses import annotate
from graphlocal.targets.flat import flatten
from graphlocal.targets.lowered import lower
from graphlocal.targets.pieces import Cut, cut
from graphlocal.targets.shared_errors import sum_positions
from graphlocal.targets.training_graph import TrainingGraph, split


@dataclass(frozen=True)
class Measured:
    """Mean seconds of each action, and of a whole step without the loss and the optimizer; means add up."""

    actions: dict[Key, float]
    step: float


def lowered_step(compiled: Compiled) -> TrainingGraph:
    """The lowered training graph for the example inputs, and `example_labels` where the rule needs labels.

    Raises NotLowered for a model without a lowered form.
    """
    labels = example_labels(compiled)
    lowered = lower(compiled.training, _leaves(compiled), compiled.differentiable, labels=labels)
    sum_positions(lowered)
    return lowered


def example_labels(compiled: Compiled) -> Tensor | None:
    """Labels for rules that need them, which the example inputs don't hold: one class for each row of features.

    (batch,) for logits of batch x classes, batch x tokens for batch x tokens x classes; int64. None for other rules.
    """
    if not compiled.rule.needs_labels:
        return None
    graph, leaves = compiled.graph, _leaves(compiled)
    example = next(x for x in leaves if isinstance(x, Tensor))
    output = next(v for v in graph.outputs if graph.is_float(v) and v in graph.representation)
    known, sizes = graph.type(output), Sizes(graph, open_sizes(graph, leaves))
    assert known is not None
    axis = graph.representation[output].axis
    shape = [sizes.dim(n) for k, n in enumerate(known.shape) if k != axis]
    return torch.zeros(shape, dtype=torch.int64, device=example.device)


def _leaves(compiled: Compiled) -> list[Any]:
    return [x.detach() if isinstance(x, Tensor) else x for x in compiled.traced.arguments.leaves]


def measure(compiled: Compiled, repeats: int = 15) -> Measured:
    """Time the actions of the lowered training graph on the example inputs; the model is left as it was.

    Raises NotLowered for a model without a lowered form.
    """
    leaves, labels = _leaves(compiled), example_labels(compiled)
    after_loss = () if labels is None else (labels,)
    lowered = lowered_step(compiled)
    annotate(lowered)
    forward, error = split(lowered)
    in_pieces = [_Timed(cut(module, join=False)) for module in (forward, error)]
    whole = [flatten(forward, lowered=True), flatten(error, lowered=True)]
    steps: list[float] = []
    devices = range(torch.cuda.device_count())
    with preserved(compiled.model), preserved(compiled.error_weights), torch.random.fork_rng(devices), torch.no_grad():
        for i in range(repeats + 2):
            for timed in in_pieces:
                timed.keep = i > 1
            _step(in_pieces[0], in_pieces[1], leaves, compiled.differentiable, after_loss)
            start = _now()
            _step(whole[0], whole[1], leaves, compiled.differentiable, after_loss)
            if i > 1:
                steps.append(_now() - start)
    found: defaultdict[Key, float] = defaultdict(float)
    for timed in in_pieces:
        for piece, times in zip(timed.cut.pieces, timed.times, strict=True):
            label = piece.name.split()[0]
            if label[0] in "FDU" and label[1:].isdigit():
                found[label[0], int(label[1:])] += statistics.fmean(times)  # type: ignore[index]
    return Measured(dict(found), statistics.fmean(steps))


def _step(
    forward: Callable[..., Any], error: Callable[..., Any], leaves: list[Any], taken: tuple[bool, ...],
    after_loss: tuple[Tensor, ...],
) -> None:  # fmt: skip
    outputs, saved = forward(*leaves)
    errors = [torch.ones_like(z) / z.numel() if wanted else None for z, wanted in zip(outputs, taken, strict=True)]
    error(saved, errors, False, *after_loss)


class _Timed:
    """Runs a pass piece by piece, and keeps the seconds of each."""

    def __init__(self, cut: Cut) -> None:
        self.cut, self.keep = cut, False
        self.times: list[list[float]] = [[] for _ in cut.pieces]

    def __call__(self, *arguments: Any) -> Any:
        table = dict(zip(self.cut.arguments, arguments, strict=True))
        table |= {name: table["saved"][position] for name, position in self.cut.saved}
        for piece, function, times in zip(self.cut.pieces, self.cut.functions, self.times, strict=True):
            start = _now()
            results = function(*(table[name] for name in piece.reads))
            if self.keep:
                times.append(_now() - start)
            table.update(zip(piece.writes, results, strict=True))
        return self.cut.finish(*(table[name] for name in self.cut.returned))


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
