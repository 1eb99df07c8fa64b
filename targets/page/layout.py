"""Positions: layers from left to right that wrap into bands, boxes within boxes.

A group's members stand in columns by the longest path that leads to them; where a row of columns gets too wide
it goes on in a band below, as text does. All positions are whole pixels, and equal graphs give equal positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GAP_X, GAP_Y, BAND_GAP = 34, 18, 46
PAD_X, PAD_Y = 16, 38
TALLEST = 6
"""A layer of more members stands in several columns."""
_ASPECT = 1.4
_WIDTHS = tuple(range(600, 6001, 150))
OWN_WIDTH = 1000
"""Of the bands of a group that is closed at first."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where a member stands: its upper left corner, relative to its group's."""

    x: int
    y: int
    band: int
    column: int


@dataclass(frozen=True)
class Box:
    """A group laid out: its size, and its members in their places."""

    size: Size
    places: Mapping[str, Place]


@dataclass(frozen=True)
class Nest:
    """What is to be laid out: a group's members (by id) in order, and the edges between them.

    leaves: sizes of those members that show nothing inside. inner: the members that do.
    """

    members: tuple[str, ...]
    edges: frozenset[tuple[str, str]]
    leaves: Mapping[str, Size]
    inner: Mapping[str, Nest]


def arrange(nest: Nest, widths: Sequence[int] = _WIDTHS) -> dict[str, Box]:
    """The boxes of all groups, the outermost under `""`; bands are as wide as fits the screen best, of `widths`."""
    layered = _Layered(nest)
    candidates = (layered.boxes(width) for width in widths)
    return min(candidates, key=lambda boxes: _cost(boxes[""].size))


def _cost(size: Size) -> float:
    """How small the drawing gets on a screen: the width that it needs, were the screen one unit wide."""
    width, height = size
    return max(width, height * _ASPECT)


class _Layered:
    """A nest with its layers, which don't depend on the width."""

    def __init__(self, nest: Nest) -> None:
        self.nest = nest
        self.columns = _columns(nest.members, nest.edges)
        self.inner = {name: _Layered(inner) for name, inner in nest.inner.items()}

    def boxes(self, width: int, name: str = "") -> dict[str, Box]:
        """This group's box under `name`, and those inside it, for bands up to `width`."""
        found: dict[str, Box] = {}
        for member, inner in self.inner.items():
            found |= inner.boxes(width - 2 * PAD_X, member)
        sizes = {m: found[m].size if m in found else self.nest.leaves[m] for m in self.nest.members}
        found[name] = _packed(self.columns, sizes, width)
        return found


def _columns(members: Sequence[str], edges: frozenset[tuple[str, str]]) -> list[list[str]]:
    """Members by their longest path; edges against the order of `members` close a cycle and don't count."""
    order = {member: i for i, member in enumerate(members)}
    before: dict[str, list[str]] = {member: [] for member in members}
    for a, b in sorted(edges):
        if order[a] < order[b]:
            before[b].append(a)
    rank: dict[str, int] = {}
    layers: dict[int, list[str]] = {}
    for member in members:
        rank[member] = max((rank[source] + 1 for source in before[member]), default=0)
        layers.setdefault(rank[member], []).append(member)
    height: dict[str, float] = {}
    columns = []
    for number in sorted(layers):
        layer = sorted(layers[number], key=lambda m: (_mean([height[s] for s in before[m]]), order[m]))
        height |= {member: i - (len(layer) - 1) / 2 for i, member in enumerate(layer)}
        parts = -(-len(layer) // TALLEST)
        columns += [layer[len(layer) * i // parts : len(layer) * (i + 1) // parts] for i in range(parts)]
    return columns


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def _packed(columns: Sequence[Sequence[str]], sizes: Mapping[str, Size], limit: int) -> Box:
    """Columns side by side in bands, each column's members centred in its band."""
    widths = [max(sizes[m][0] for m in column) for column in columns]
    heights = [sum(sizes[m][1] for m in column) + GAP_Y * (len(column) - 1) for column in columns]
    places: dict[str, Place] = {}
    right, y = PAD_X, PAD_Y
    for band, (start, end) in enumerate(_bands(widths, limit)):
        x, tall = PAD_X, max(heights[start:end])
        for i in range(start, end):
            top = y + (tall - heights[i]) // 2
            for member in columns[i]:
                places[member] = Place(x + (widths[i] - sizes[member][0]) // 2, top, band, i - start)
                top += sizes[member][1] + GAP_Y
            x += widths[i] + GAP_X
        right = max(right, x - GAP_X)
        y += tall + BAND_GAP
    return Box((right + PAD_X, y - BAND_GAP + PAD_Y), places)


def _bands(widths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """As few bands as the limit allows, and with that number as even as can be."""
    fewest = len(_filled(widths, limit))
    low, high = max(widths, default=0), max(limit, max(widths, default=0))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(widths, middle)) <= fewest else (middle + 1, high)
    return _filled(widths, low)


def _filled(widths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    bands, start, used = [], 0, 0
    for i, width in enumerate(widths):
        if i > start and used + GAP_X + width > limit:
            bands.append((start, i))
            start, used = i, width
        else:
            used += width + (GAP_X if i > start else 0)
    return [*bands, (start, len(widths))] if widths else []
