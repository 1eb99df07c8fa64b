"""Feedback maps: how an error of one shape becomes a displacement of another.

The map E acts on features. Axes that both values have (the batch, and positions such as tokens where both
have them) are kept; between maps of unlike sizes (14 x 14 and 7 x 7, as convolutions with strides make) each position
goes to the one at the same place, relative to the size: errors that meet there are summed, those of fewer positions are
repeated. The source's other positions are summed, and the target's others share one displacement. Where E
is *whole* at an end, it has a number for each feature and each of these other positions instead. A *sparse* E reads a
few of the source's features for each of the target's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from graphlocal.ir import Connection, Dim, LocalGraph


@dataclass(frozen=True)
class Layout:
    """The shapes of one connection's ends. axis: the feature axis, equal to the rank if it is implied.

    shared: pairs (source axis, target axis) of positions that both ends have, in order. resized: (axis, source size,
    target size) of those whose sizes differ. whole_source: E reads every
    position of the source by itself. whole_target: the sizes of the target's own positions, if E writes each by itself.
    sparse: E is given by its values and the features that they are read from.
    """

    source_rank: int
    source_axis: int
    target_rank: int
    target_axis: int
    shared: tuple[tuple[int, int], ...]
    whole_source: bool = False
    whole_target: tuple[int, ...] = ()
    resized: tuple[tuple[int, int, int], ...] = ()
    sparse: bool = False

    def apply(self, factors: Sequence[Tensor], error: Tensor, target: Tensor) -> Tensor:
        """E e, laid out like `target` (its shape and dtype).

        factors: E as a product, the first with target features rows, the last with source features columns; or the
        values of a sparse E and the features that they are read from, both target features x fan-in.
        error: the source's error.
        """
        message = self._gathered(error.to(factors[0].dtype))
        if self.sparse:
            message = _picked(message, *factors)
        else:
            for factor in reversed(factors):
                message = F.linear(message, factor)
        if self.whole_target:
            return self._placed(message).to(target.dtype)
        implied = self.target_axis == self.target_rank
        for axis in self._missing:
            message = message.unsqueeze(axis)
        if self.target_axis < self.target_rank - 1:
            message = message.movedim(-1, self.target_axis)
        if self._missing:
            message = message.expand((*target.shape, 1) if implied else target.shape)
        message = message.to(target.dtype)
        return message.squeeze(-1) if implied else message

    def rows(self, error: Tensor, target: Tensor, stride: int = 1) -> Tensor:
        """What E reads at every `stride`-th position of `target`: positions x source features."""
        message = self._gathered(error)
        for axis in self._missing:
            message = message.unsqueeze(axis)
        positions = target_rows(target, self.target_axis, flat=False).shape[:-1]
        return message.expand(*positions, -1).reshape(-1, message.shape[-1])[::stride]

    def _gathered(self, error: Tensor) -> Tensor:
        """The error with its features last, summed over the positions that the target does not have."""
        for axis, before, after in self.resized:
            error = F.linear(error.movedim(axis, -1), _same_place(before, after, error)).movedim(-1, axis)
        if self.source_axis == self.source_rank:
            error = error.unsqueeze(-1)
        if self.source_axis < self.source_rank - 1:
            error = error.movedim(self.source_axis, -1)
        if not self._summed:
            return error
        if self.whole_source:
            kept = error.dim() - 1 - len(self._summed)
            return error.movedim(self._summed, list(range(kept + 1, error.dim()))).flatten(kept)
        return error.sum(self._summed)

    def _placed(self, message: Tensor) -> Tensor:
        """A message with (features x the target's own positions) as its last axis, laid out like the target."""
        kept = message.dim() - 1
        message = message.unflatten(-1, (-1, *self.whole_target)).movedim(kept, -1)
        message = message.movedim([kept + i for i in range(len(self._missing))], self._missing)
        if self.target_axis == self.target_rank:
            return message.squeeze(-1)
        return message.movedim(-1, self.target_axis)

    @cached_property
    def _summed(self) -> list[int]:
        """The source's positions that the target does not have, once its features are the last axis."""
        kept = [_without(axis, self.source_axis) for axis, _ in self.shared]
        return [axis for axis in range(self._full(self.source_rank, self.source_axis) - 1) if axis not in kept]

    @cached_property
    def _missing(self) -> list[int]:
        """The target's positions that the source does not have, once its features are the last axis."""
        kept = [_without(axis, self.target_axis) for _, axis in self.shared]
        return [axis for axis in range(self._full(self.target_rank, self.target_axis) - 1) if axis not in kept]

    @staticmethod
    def _full(rank: int, axis: int) -> int:
        return rank + (axis == rank)


def _picked(message: Tensor, values: Tensor, reads: Tensor) -> Tensor:
    """A sparse E times a message with its features last."""
    if reads.shape[1] > 8:  # a temporary of all products, in place of as many operations
        return (message[..., reads] * values).sum(-1)
    flat = message.flatten(0, -2) if message.dim() > 2 else message  # torch's CPU kernel is 20 times faster on matrices
    picked = [flat.index_select(-1, r) * v for r, v in zip(reads.unbind(1), values.unbind(1), strict=True)]
    return sum(picked[1:], picked[0]).view(*message.shape[:-1], reads.shape[0])


def sparse_map(connection: Connection, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The values of a sparse E, 1 or -1 over the root of its fan-in, and the source features that they are read from.

    No target feature reads a source feature twice, and all source features are read as often, or once more or less
    (about as often, where the fan-in does not divide their number). E e has the variance that it has with the dense E
    of `Rule.initial_feedback`.
    """
    (rows, columns), fan_in = connection.weight, connection.fan_in
    per_permutation = columns // fan_in
    shuffled = [torch.randperm(columns, generator=generator) for _ in range(-(-rows // per_permutation))]
    reads = torch.cat([order[: per_permutation * fan_in].view(-1, fan_in) for order in shuffled])[:rows]
    signs = torch.randint(2, (rows, fan_in), generator=generator) * 2 - 1
    return signs / fan_in**0.5, reads.contiguous()


def _same_place(before: int, after: int, like: Tensor) -> Tensor:
    """After x before, 1 where a position of one grid lies at that of the other."""
    old, new = torch.arange(before, device=like.device), torch.arange(after, device=like.device).unsqueeze(1)
    pairs = old * after // before == new if before > after else new * before // after == old
    return pairs.to(like.dtype)


def target_rows(value: Tensor, axis: int, flat: bool = True) -> Tensor:
    """A value with its feature axis last; `flat`: positions x features."""
    rows = value.unsqueeze(-1) if axis == value.dim() else value.movedim(axis, -1)
    return rows.reshape(-1, rows.shape[-1]) if flat else rows


def _without(axis: int, removed: int) -> int:
    """The number of an axis once another one has been moved to the end."""
    return axis - (axis > removed)


def layout(graph: LocalGraph, connection: Connection) -> Layout:
    """The layout of a feedback connection: positions are matched in order by their size or symbol.

    E is whole at an end where it has more sizes than the end has features.
    """
    source, target = graph.type(connection.source_value), graph.type(connection.value)
    assert source is not None
    assert target is not None
    source_axis = graph.representation[connection.source_value].axis
    target_axis = graph.representation[connection.value].axis
    shared = _match(source.shape, source_axis, target.shape, target_axis)
    found = Layout(len(source.shape), source_axis, len(target.shape), target_axis, shared, sparse=connection.fan_in > 0)
    own_source, own_target = own_positions(graph, connection.source_value, connection.value)
    if connection.weight[0] == _size(target.shape, target_axis) * math.prod(own_target) and math.prod(own_target) > 1:
        found = replace(found, whole_target=own_target)
    whole = connection.weight[-1] == _size(source.shape, source_axis) * math.prod(own_source)
    found = replace(found, whole_source=whole and math.prod(own_source) > 1)
    if found.whole_source or found.whole_target or source_axis != target_axis:
        return found
    resized = _resized(source.shape, target.shape, source_axis, shared)
    pairs = sorted([*shared, *((axis, axis) for axis, _, _ in resized)])
    return replace(found, shared=tuple(pairs), resized=resized)


def _resized(
    source: tuple[Dim, ...], target: tuple[Dim, ...], axis: int, shared: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int, int], ...]:
    """The axes of two maps, with features on the same axis of both, that are positions of unlike numbers.

    Tokens (features last, one axis of positions) are no map: their order tells nothing about those of others.
    """
    if len(source) != len(target) or (axis != 1 and len(source) < 4):
        return ()
    taken = {i for pair in shared for i in pair} | {axis}
    return tuple(
        (i, s, t)
        for i, (s, t) in enumerate(zip(source, target, strict=True))
        if i not in taken and isinstance(s, int) and isinstance(t, int) and min(s, t) > 1
    )


def own_positions(graph: LocalGraph, source_value: str, value: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of the positions of a connection's source and target that the other end does not have.

    () for an end with a position whose size changes from batch to batch, where no E can have a number for each.
    """
    ends = [(graph.type(v), graph.representation[v].axis) for v in (source_value, value)]
    shapes = [known.shape for known, _ in ends if known is not None]
    shared = _match(shapes[0], ends[0][1], shapes[1], ends[1][1])
    found = []
    for end, (shape, (_, axis)) in enumerate(zip(shapes, ends, strict=True)):
        own = [size for i, size in enumerate(shape) if i != axis and all(i != pair[end] for pair in shared)]
        found.append(tuple(size for size in own if isinstance(size, int)))
        if len(found[-1]) < len(own):
            found[-1] = ()
    return found[0], found[1]


def _size(shape: tuple[Dim, ...], axis: int) -> Dim:
    return shape[axis] if axis < len(shape) else 1


def _match(
    source: tuple[Dim, ...], source_axis: int, target: tuple[Dim, ...], target_axis: int
) -> tuple[tuple[int, int], ...]:
    alike = len(source) == len(target) and source_axis == target_axis  # then height goes with height alone
    pairs: list[tuple[int, int]] = []
    start = 0
    for i, size in enumerate(source):
        if i == source_axis or size == 1:
            continue
        for k in range(start, len(target)):
            if k != target_axis and target[k] == size and (k == i or not alike or isinstance(size, str)):
                pairs.append((i, k))
                start = k + 1
                break
    return tuple(pairs)


def weight_names(graph: LocalGraph) -> dict[str, tuple[str, ...]]:
    """The attribute names of the factors of each feedback connection's E (or of the values and the features read, if
    E is sparse), by the connection's name.

    Calls of one module share E as they share their weights: the copies of an unrolled layer (LRA, appendix B).
    """
    first: dict[object, str] = {}
    found: dict[str, tuple[str, ...]] = {}
    for connection in graph.connections:
        if connection.kind == "feedback":
            name = first.setdefault(shared_map(graph, connection), f"{connection.value}_from_{connection.source_value}")
            if connection.fan_in:
                found[connection.name] = (f"{name}_values", f"{name}_reads_of_{connection.weight[-1]}")
            else:
                found[connection.name] = (name,) if len(connection.weight) == 2 else (f"{name}_left", f"{name}_right")
    return found


def map_shapes(connection: Connection) -> tuple[tuple[int, ...], ...]:
    """The shapes of what `weight_names` names, of a connection that is not fitted."""
    if connection.fan_in:
        return ((connection.weight[0], connection.fan_in),) * 2
    return tuple(pairwise(connection.weight))


def shared_map(graph: LocalGraph, connection: Connection) -> object:
    """Equal for connections that share their E.

    Their ends are at the same places of other calls of the same modules, in subgraphs that train the same parameters.
    Fitted maps are never shared: each fits the gradient of its own target.
    """
    if connection.fitted:
        return connection.name
    ends = ((connection.source, connection.source_value), (connection.target, connection.value))
    places = [(graph.place_in_module[value], graph.trainable(graph.subgraph[name])) for name, value in ends]
    return (*places, connection.weight, connection.fan_in)


def cotangent_update(map_: Layout, factors: Sequence[Tensor], error: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Sum over batch and positions of C eᵀ: the gradient of <C, E e> with respect to E's factors."""
    with torch.enable_grad():
        leaves = [factor.detach().requires_grad_() for factor in factors]
        message = map_.apply(leaves, error, cotangent)
        return torch.autograd.grad(message, leaves, cotangent)
