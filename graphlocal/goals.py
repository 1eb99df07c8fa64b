"""Goals: what the representation at a node should be, for rules that aim at representations and not at a loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphlocal.errors import InputError


@dataclass
class ClassCodes:
    """One code for each class: the goal of a sample's representation is its label's code, at every position.

    classes: how many. node: the value or subgraph that the goal stands at; None is the model's first float output.
    scale: the norm of a code. dynamic: the codes follow the representations: they are the orthonormal vectors nearest
    to the running class means (the polar factor of their matrix), so that each class stays near where it is and away
    from the others. momentum: of the running means. seed: of the first codes, which are the unit vectors where there
    are as many features as classes, else random and orthogonal as far as the features allow.

    Raises InputError for options out of range.
    """

    classes: int
    node: str | None = None
    scale: float = 1.0
    dynamic: bool = False
    momentum: float = 0.9
    seed: int = 0
    codes: Tensor | None = field(default=None, init=False, repr=False)
    means: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.classes, int) or self.classes < 2:
            raise InputError(f"ClassCodes(classes={self.classes!r})", why="it must be 2 or more")
        if not self.scale > 0 or not 0 <= self.momentum < 1:
            raise InputError(
                f"ClassCodes(scale={self.scale!r}, momentum={self.momentum!r})",
                why="a scale is above 0, a momentum at least 0 and below 1",
            )

    def __call__(self, u: Tensor, y: Any, axis: int) -> Tensor:
        """The goal, in the shape of the representation u; axis: its features. Raises InputError for bad labels."""
        labels = self._labels(u, y)
        features = u.movedim(axis, 1).flatten(2).mean(2) if u.dim() > 2 else u
        if self.codes is None or self.codes.shape[1] != features.shape[1]:
            self.codes = self._first(features.shape[1]).to(u)
            self.means = self.codes.clone()
        if self.dynamic:
            self._follow(features, labels)
        shape = [1] * u.dim()
        shape[0], shape[axis] = u.shape[0], features.shape[1]
        return self.codes[labels].view(shape).expand_as(u)

    def _labels(self, u: Tensor, y: Any) -> Tensor:
        if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != u.shape[:1]:
            kind = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise InputError(f"the labels are a {kind}", remedy=f"pass a LongTensor of {u.shape[0]} class numbers")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.classes:
            raise InputError(f"a label is not in 0 to {self.classes - 1}", remedy="pass classes= as many as there are")
        return y.to(u.device)

    def _first(self, features: int) -> Tensor:
        if features == self.classes:
            return torch.eye(features, dtype=torch.float64) * self.scale
        generator = torch.Generator().manual_seed(self.seed)
        return self._apart(torch.randn(self.classes, features, generator=generator, dtype=torch.float64))

    def _apart(self, rows: Tensor) -> Tensor:
        """The polar factor of the rows, each scaled to norm `scale`."""
        left, _, right = torch.linalg.svd(rows.double(), full_matrices=False)
        factor: Tensor = left @ right
        norms: Tensor = torch.linalg.vector_norm(factor, dim=1, keepdim=True)
        return factor * (self.scale / norms.clamp_min(1e-12))

    def _follow(self, features: Tensor, labels: Tensor) -> None:
        assert self.means is not None
        for label in labels.unique():
            mean = features[labels == label].mean(0)
            self.means[label] = self.momentum * self.means[label] + (1 - self.momentum) * mean
        self.codes = self._apart(self.means).to(features)
