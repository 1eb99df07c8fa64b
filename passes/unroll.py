"""Unroll: a model whose recurrent layers are written out step by step, with an error neuron for every hidden step.

Like PerturbConvolutions it rewrites modules, before tracing:

    unrolled = Unroll().rewrite(model)
    print(unrolled.report)
    local = graphlocal.compile(unrolled.model, example_inputs=example_inputs)

The steps share the layer's weights, so their updates add up, and the model that was given is the one that learns.
Without this pass a recurrent layer is one operation, with autograd through time inside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from graphlocal.errors import InputError
from graphlocal.passes.rewriting import (
    LeftAlone,
    Rewritten,
    aligned,
    copy_sharing_tensors,
    has_hooks,
    left_alone_table,
    listed_reasons,
    shown_path,
)
from graphlocal.unrolled import UNROLLED


@dataclass(frozen=True)
class UnrolledLayer:
    """A recurrent layer that runs step by step; `cells`: its layers times directions."""

    path: str
    kind: str
    cells: int


@dataclass(frozen=True)
class UnrollReport:
    """What Unroll did; `print` shows it."""

    model: str
    unrolled: tuple[UnrolledLayer, ...]
    left_alone: tuple[LeftAlone, ...]

    def __str__(self) -> str:
        count = len(self.unrolled)
        lines = [f"{self.model}: {count} of {count + len(self.left_alone)} recurrent layers run step by step", ""]
        rows = [(shown_path(layer.path), layer.kind, str(layer.cells)) for layer in self.unrolled]
        lines += aligned([("unrolled", "kind", "cells a step"), *rows])
        return "\n".join([*lines, *left_alone_table(self.left_alone)])


@dataclass(frozen=True)
class Unroll:
    """Write out every `nn.RNN`, `nn.LSTM` and `nn.GRU`, with all layers, directions and projections.

    Left alone are layers of other classes and those with hooks, whose computation is not known. A sequence of another
    length is another graph: the runtime compiles again for it. Source: LRA, appendix B.
    """

    name: str = "unroll"

    def rewrite(self, model: nn.Module) -> Rewritten[UnrollReport]:
        """A new model with its report; `model` itself is left as it was, and shares all its tensors.

        Raises InputError for what is no model, or can't be copied, and if there is no recurrent layer to unroll.
        """
        new = copy_sharing_tensors(model)
        done: list[UnrolledLayer] = []
        left: list[LeftAlone] = []
        for path, layer in list(new.named_modules()):
            if not isinstance(layer, nn.RNNBase):
                continue
            unrolled = UNROLLED.get(type(layer))
            if unrolled is None:
                left.append(LeftAlone(path, f"a {type(layer).__name__}, not a plain nn.RNN, nn.LSTM or nn.GRU"))
            elif has_hooks(layer):
                left.append(LeftAlone(path, "it has hooks, such as those of weight_norm"))
            else:
                kind = type(layer).__name__
                layer.__class__ = unrolled  # keeps its attributes and parameters
                cast(Any, layer).unroll()
                done.append(UnrolledLayer(path, kind, layer.num_layers * (1 + layer.bidirectional)))
        if not done:
            raise InputError(
                f"{type(model).__name__} has no recurrent layer to unroll",
                why=listed_reasons(left),
                remedy="compile the model as it is: loops over cells in its forward are traced step by step",
            )
        return Rewritten(new, UnrollReport(type(model).__name__, tuple(done), tuple(left)))
