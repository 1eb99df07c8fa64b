"""Local losses: every representation learns from a head of its own, and nothing is sent between subgraphs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from graphlocal.errors import InputError
from graphlocal.ir import Connection, LocalGraph
from graphlocal.rules.base import Head, Rule, features
from graphlocal.rules.wiring import local_heads


@dataclass(frozen=True)
class LocalLoss(Rule):
    """Local error signals (Nøkland and Eidnes, "Training neural networks with local error signals", 2019).

    Each subgraph with parameters has a head on each of its representations z; the gradient of the head's loss at z is
    the subgraph's error, and the head learns by its own gradient. The last subgraph has the loss itself. The labels y
    are needed: `train_step` hands them over, elsewhere set `local.labels = y` before every backward pass.

    head: `"prediction"`, a linear map from the features to y, with cross-entropy for class indices and the mean squared
    error for float y; `"similarity"`, the mean squared difference of the cosine similarities of all pairs of samples,
    in a linear map of the features (its standard deviations over positions where there are any) and in y; `"both"`,
    similarity_share of the second and the rest of the first, as predsim in the paper. outputs: numbers that are
    predicted for each label (classes); None takes the features of the model's first float output.

    The axes of y are found among those of z in order, by their sizes; z is averaged over the others, but for its
    features. Where only the first is found (the samples), the head predicts all labels of a sample alike. The
    similarity head's map is linear also for images, where the paper's is a 3x3 convolution.

    Raises InputError for options out of range, or for labels that fit neither z nor the model's output.
    """

    name: ClassVar[str] = "local-loss"
    feedback: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    head: Literal["prediction", "similarity", "both"] = "both"
    similarity_share: float = 0.99
    outputs: int | None = None

    def __post_init__(self) -> None:
        allowed = ("prediction", "similarity", "both")
        if self.head not in allowed:
            raise InputError(f"LocalLoss(head={self.head!r})", remedy=f"use one of {allowed}")
        if not isinstance(self.similarity_share, (int, float)) or not 0 <= self.similarity_share <= 1:
            raise InputError(f"LocalLoss(similarity_share={self.similarity_share!r})", why="it is a share, 0 to 1")
        if self.outputs is not None and (not isinstance(self.outputs, int) or self.outputs < 1):
            raise InputError(f"LocalLoss(outputs={self.outputs!r})", why="it is a whole number, 1 or more, or None")

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        return local_heads(graph)

    def head_outputs(self, graph: LocalGraph) -> int:
        return self.outputs or _outputs(graph)

    def initial_head(self, graph: LocalGraph, value: str, generator: torch.Generator) -> dict[str, Tensor]:
        size = features(graph, value)
        if not isinstance(size, int):
            raise InputError(
                f"no local head can be made for the representation {value}",
                why=f"the size of its feature axis, {size}, changes from batch to batch",
                remedy="compile with a partition that cuts elsewhere, such as a list of module globs",
            )

        def drawn(rows: int) -> Tensor:
            return (torch.rand(rows, size, generator=generator) * 2 - 1) / math.sqrt(size)  # nn.Linear's

        found = {}
        if self.head != "similarity":
            outputs = self.head_outputs(graph)
            found["weight"], found["bias"] = drawn(outputs), torch.zeros(outputs)
        if self.head != "prediction":
            found["similarity"] = drawn(size)
        return found

    def head_loss(self, head: Head, z: Tensor, labels: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        z = z.unsqueeze(-1) if head.axis == z.dim() else z.movedim(head.axis, -1)
        share = {"prediction": 0.0, "similarity": 1.0, "both": self.similarity_share}[self.head]
        total = z.new_zeros(())
        if self.head != "similarity":
            total = total + (1 - share) * _prediction(head.value, z, labels, parameters["weight"], parameters["bias"])
        if self.head != "prediction":
            mapped = F.linear(z, parameters["similarity"])
            total = total + share * _similarity(head.value, mapped, labels, head.outputs)
        return total


def _outputs(graph: LocalGraph) -> int:
    for value in graph.outputs:
        if value in graph.representation and graph.is_float(value):
            size = features(graph, value)
            if isinstance(size, int):
                return size
    raise InputError("the number of outputs of the local heads is not known", remedy="pass LocalLoss(outputs=...)")


def _matched(value: str, z: Tensor, labels: Tensor, axes: int) -> list[int]:
    """The axes of z (features last) that the first `axes` axes of the labels are; at least the samples'."""
    sizes = list(z.shape[:-1])
    found: list[int] = []
    for size in labels.shape[:axes]:
        later = [k for k in range(found[-1] + 1 if found else 0, len(sizes)) if sizes[k] == size]
        if not later:
            break
        found.append(later[0])
    if not found:
        raise InputError(
            f"the labels, of shape {list(labels.shape)}, fit no axis of the representation {value}, "
            f"of shape {list(z.shape)} with the features last",
            why="a local head compares samples of both",
            remedy="pass labels whose first axis is the batch, or cut elsewhere with partition=...",
        )
    return found if len(found) == axes else found[:1]


def _pooled(z: Tensor, kept: list[int]) -> Tensor:
    """The mean over all axes of z but the last and those kept."""
    others = [axis for axis in range(z.dim() - 1) if axis not in kept]
    return z.mean(others) if others else z


def _prediction(value: str, z: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The loss of a linear map from the features to class indices, or to float labels (features last or second)."""
    is_class = not labels.is_floating_point()
    if is_class and labels.numel() == z.shape[0] != labels.shape[0]:
        labels = labels.flatten()  # tokens for samples
    if not is_class:
        labels = _features_last(labels, len(weight))
    axes = labels.dim() - (not is_class)
    kept = _matched(value, z, labels, axes)
    scores = F.linear(_pooled(z, kept), weight, bias)
    if len(kept) < axes:
        scores = scores.reshape(len(scores), *[1] * (axes - 1), -1).expand(*labels.shape[:axes], -1)
    if not is_class:
        return F.mse_loss(scores, labels.to(scores.dtype))
    try:
        return F.cross_entropy(scores.flatten(0, -2), labels.flatten())
    except IndexError as error:
        raise InputError(
            f"the labels hold a class that the local heads have no output for; they have {len(weight)}",
            remedy="pass LocalLoss(outputs=...) with the number of classes",
        ) from error


def _features_last(labels: Tensor, count: int) -> Tensor:
    """Float labels with their features as the last axis."""
    if labels.dim() > 1 and labels.shape[-1] == count and (labels.dim() == 2 or labels.shape[1] != count):
        return labels
    if labels.dim() > 1 and labels.shape[1] == count:
        return labels.movedim(1, -1)
    if count == 1:
        return labels.unsqueeze(-1)
    raise InputError(
        f"float labels of shape {list(labels.shape)} for local heads with {count} outputs",
        remedy="pass labels in the shape of the model's output, or LocalLoss(outputs=...)",
    )


def _similarity(value: str, z: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean squared difference between the similarities of samples in z and in the labels."""
    sample = _matched(value, z, labels, 1)[0]
    rows = z.movedim(sample, 0)
    if rows.dim() > 2:
        positions = rows.flatten(1, -2)
        rows = (positions.var(1, correction=0) + 1e-8).sqrt() if positions.shape[1] > 1 else positions.squeeze(1)
    return F.mse_loss(similarities(rows), similarities(_described(labels, classes).to(z.dtype)))


def _described(labels: Tensor, classes: int) -> Tensor:
    """One row of numbers for each sample: the label itself, or the share of each class among a sample's labels."""
    if labels.is_floating_point():
        return labels.reshape(len(labels), -1)
    flat = labels.reshape(len(labels), -1)
    return (flat.unsqueeze(-1) == torch.arange(classes, device=flat.device)).to(torch.float32).mean(1)


def similarities(rows: Tensor) -> Tensor:
    """The cosines between all pairs of rows, each less its own mean (samples x samples)."""
    centred = rows - rows.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    scaled = centred / (norms + 1e-8)
    found: Tensor = (scaled @ scaled.mT).clamp(-1, 1)
    return found
