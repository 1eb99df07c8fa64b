"""Variable-depth credit assignment: errors of some samples only, on the rows of those samples.

The pieces pass errors as `Rows`, which hold the samples' numbers and their part of the error. A plain tensor stands for
all samples, None for none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphlocal.feedback import Layout
from graphlocal.rules import AligningRule, Neuron
from graphlocal.targets.bodies import Update, UpdateShape
from graphlocal.targets.reread import Body

WORTH = 2 / 3
"""Up to this share of the batch, evaluating a subgraph again on rows costs less than its derivative on all of them."""


class CreditDepth:
    """How far the errors of the last error pass went: the share of the samples that reached each subgraph."""

    def __init__(self) -> None:
        self.reached: dict[str, float] = {}

    @property
    def mean(self) -> float:
        """Of how many subgraphs the mean sample's error reached the error neuron."""
        return sum(self.reached.values())


class Rows(NamedTuple):
    """An error of some samples, by their numbers (None: of all). losses: the local loss of each, if it has one."""

    samples: Tensor | None
    values: Tensor
    losses: Tensor | None = None


Error = Rows | Tensor | None


def rows(error: Error) -> Rows | None:
    """An error as `Rows`."""
    return Rows(None, error) if isinstance(error, Tensor) else error


def whole(error: Error, like: Tensor) -> Tensor | None:
    """An error as a tensor in the shape of `like`, with zeros for samples that have none."""
    if not isinstance(error, Rows):
        return error
    if error.samples is None:
        return error.values
    return torch.zeros_like(like, dtype=error.values.dtype).index_copy(0, error.samples, error.values)


def add_rows(*errors: Error) -> Error:
    """The sum of errors of different samples, as an error of all that have one."""
    found = [r for r in map(rows, errors) if r is not None]
    if len(found) < 2:
        return found[0] if found else None
    if all(r.samples is found[0].samples for r in found):
        return Rows(found[0].samples, torch.stack([r.values for r in found]).sum(0))
    dense = next((r.values for r in found if r.samples is None), None)
    if dense is None:
        index = torch.cat([r.samples for r in found if r.samples is not None]).unique()
        total = found[0].values.new_zeros(len(index), *found[0].values.shape[1:])
    else:
        index, total = None, torch.zeros_like(dense)
    for r in found:
        if r.samples is None:
            total = total + r.values
        else:
            place = r.samples if index is None else torch.searchsorted(index, r.samples)
            total = total.index_add(0, place, r.values)
    return Rows(index, total)


def select(error: Error, senders: Tensor | None) -> Rows | None:
    """The part of an error that belongs to the samples `senders` (None: to all)."""
    found = rows(error)
    if found is None or senders is None:
        return found
    if found.samples is None:
        index, values = senders, found.values.index_select(0, senders)
    else:
        kept = torch.isin(found.samples, senders).nonzero().squeeze(1)
        index, values = found.samples.index_select(0, kept), found.values.index_select(0, kept)
    return Rows(index, values) if len(index) else None


def taken(tensor: Tensor, index: Tensor | None) -> Tensor:
    """The rows `index` of a tensor (None: all)."""
    return tensor if index is None else tensor.index_select(0, index)


class RowsError(nn.Module):
    """`LocalError` of the samples that an error reaches. batched: whether axis 0 of the representation is the batch."""

    def __init__(self, rule: AligningRule, value: str, phi: Callable[[Tensor], Tensor], batched: bool) -> None:
        super().__init__()
        self.rule, self.value, self.phi, self.batched = rule, value, phi, batched

    def forward(self, h: Tensor, z: Tensor, displacement: Error, batch: int) -> Rows | None:
        if not self.batched:
            displacement = whole(displacement, z)
        found = rows(displacement)
        if found is None:
            return None
        with torch.no_grad():
            neuron = Neuron(self.value, taken(h.detach(), found.samples), taken(z.detach(), found.samples), self.phi)
            scale = self.rule.per_sample(batch)
            d = found.values * scale
            losses = self.rule.losses(neuron, d) if self.batched else None
            return Rows(found.samples, self.rule.local_error(neuron, d) / scale, losses)


class Stop(nn.Module):
    """The samples that send their errors further down from a subgraph: None for all, an empty index for none.

    forward(batch, example, (exact, local) of each value): example: a tensor on the device. batched: of each value.
    """

    def __init__(self, rule: AligningRule, name: str, depth: CreditDepth, batched: Sequence[bool]) -> None:
        super().__init__()
        self.epsilon, self.name, self.depth, self.batched = rule.halting or 0.0, name, depth, all(batched)
        self.per_sample = rule.per_sample

    def forward(self, batch: int, example: Tensor, *errors: tuple[Error, Error]) -> Tensor | None:
        with torch.no_grad():
            reached = torch.zeros(batch, dtype=torch.bool, device=example.device)
            if not self.batched:
                self.depth.reached[self.name] = float(any(e is not None for pair in errors for e in pair))
                return None
            losses = torch.zeros(batch, dtype=example.dtype, device=example.device)
            for exact, local in errors:
                for found, is_exact in ((rows(exact), True), (rows(local), False)):
                    if found is None:
                        continue
                    e = found.values
                    loss = (
                        (e * self.per_sample(batch)).square().reshape(len(e), -1).sum(1) / 2
                        if is_exact
                        else found.losses
                    )
                    assert loss is not None
                    if found.samples is None:
                        reached, losses = torch.ones_like(reached), losses + loss
                    else:
                        reached = reached.index_fill(0, found.samples, True)
                        losses = losses.index_add(0, found.samples, loss)
            self.depth.reached[self.name] = int(reached.sum()) / batch
            senders = (reached & (losses >= self.epsilon)).nonzero().squeeze(1)
            return None if len(senders) == batch else senders


class RowsFeedback(nn.Module):
    """The message E e of the samples that send one. batched: whether axis 0 of both ends is the batch."""

    def __init__(self, layout: Layout, batched: bool) -> None:
        super().__init__()
        self.layout, self.batched = layout, batched and (0, 0) in layout.shared

    def forward(self, error: Error, target: Tensor, like: Tensor, senders: Tensor | None, *factors: Tensor) -> Error:
        found = select(error, senders)
        if found is None:
            return None
        maps = [E.detach() for E in factors]
        if self.batched:
            return Rows(found.samples, self.layout.apply(maps, found.values, target[: len(found.values)]))
        return self.layout.apply(maps, whole(found, like), target)  # type: ignore[arg-type]


class RowsUpdate(nn.Module):
    """`Update`, with errors of some samples; evaluates the subgraph again on their rows where that is allowed and less.

    forward(*outputs, *errors, *parameters, *inputs, senders, batch, arguments, retain) -> (updates..., messages...)
    arguments: what the body was called with. batched: of each input, whether axis 0 is the batch; `separable`: whether
    each sample's results depend on its own rows alone, as far as the graph tells. That is checked in every use: the
    first rows that come out otherwise end it.
    """

    def __init__(self, update: Update, body: Body, batched: Sequence[bool], separable: Sequence[bool] | None,
                 places: Sequence[int]) -> None:  # fmt: skip
        super().__init__()
        self.update, self.body, self.batched = update, body, tuple(batched)
        self.by_sample = separable  # of each argument of the body: whether it has rows
        self.places = tuple(places)  # of each output among the body's results

    @property
    def shape(self) -> UpdateShape:
        return self.update.shape

    def forward(self, *values: Any) -> tuple[Error, ...]:
        *tensors, senders, batch, arguments, retain = values
        count, shape = self.shape.outputs, self.shape
        outputs, errors, wanted = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        found = [rows(error) for error in errors]
        index = self._index(found)
        parameters = wanted[: shape.parameters]
        if all(r is None for r in found):
            return (*map(torch.zeros_like, parameters), *[None] * shape.inputs)
        result = None
        if index is not None and self.by_sample is not None and len(index) <= WORTH * batch:
            result = self._on_rows(outputs, found, wanted, index, arguments)
        if result is None:
            index = None
            full = [whole(r, z) for r, z in zip(found, outputs, strict=True)]
            result = self.update(*outputs, *full, *wanted, retain)
        updates, messages = result[: shape.parameters], result[shape.parameters :]
        pairs = zip(messages, self.batched, wanted[shape.parameters :], strict=True)
        return (*updates, *(self._sent(m, index, sent, senders, x) for m, sent, x in pairs))

    @staticmethod
    def _index(found: Sequence[Rows | None]) -> Tensor | None:
        """The samples with an error; None for all."""
        indices = [r.samples for r in found if r is not None]
        known = [index for index in indices if index is not None]
        if len(known) < len(indices) or not known:
            return None
        return known[0] if all(index is known[0] for index in known) else torch.cat(known).unique()

    def _sent(self, message: Tensor | None, index: Tensor | None, batched: bool, senders: Tensor | None, read: Any
              ) -> Error:  # fmt: skip
        if message is None:
            return None
        if not batched:
            return message
        return select(Rows(index, message), senders)

    def _on_rows(self, outputs: Sequence[Tensor], found: Sequence[Rows | None], wanted: Sequence[Any], index: Tensor,
                 arguments: Sequence[Any]) -> Sequence[Tensor | None] | None:  # fmt: skip
        """The update from the rows of some samples, or None if the subgraph's results are others on these alone."""
        assert self.by_sample is not None
        replaced: dict[int, Tensor] = {}
        given = []
        for x, by_sample in zip(arguments, self.by_sample, strict=True):
            if by_sample:
                replaced[id(x)] = x.detach().index_select(0, index).requires_grad_(x.requires_grad)
            given.append(replaced.get(id(x), x))
        with torch.enable_grad():
            results = self.body(None, given)
        again = [results[place] for place in self.places]
        if not all(_same(a, z.detach().index_select(0, index)) for a, z in zip(again, outputs, strict=True)):
            self.by_sample = None
            return None
        errors = [None if r is None else expanded(r, index) for r in found]
        return self.update(*again, *errors, *(replaced.get(id(x), x) for x in wanted), False)  # type: ignore[no-any-return]


def expanded(error: Rows, index: Tensor) -> Tensor:
    """The rows `index` of an error, with zeros for samples that have none."""
    if error.samples is index:
        return error.values
    if error.samples is None:
        return error.values.index_select(0, index)
    total = error.values.new_zeros(len(index), *error.values.shape[1:])
    return total.index_copy(0, torch.searchsorted(index, error.samples), error.values)


def _same(again: Tensor, before: Tensor) -> bool:
    if again.shape != before.shape:
        return False
    tolerance = 1e-6 if again.dtype == torch.float64 else 1e-3 if again.dtype == torch.float32 else 5e-2
    return torch.allclose(again.detach(), before, rtol=tolerance, atol=tolerance * float(before.abs().max()))
