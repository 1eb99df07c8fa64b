"""Charts as inline SVG: lines, dots and heat maps. Colours are the style sheet's, so that they follow the theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from graphlocal.report.scales import Scale, integers, label, scale

LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
"""Room around the plot for the axes' numbers and names."""
MARKED = 40
"""Series of up to this many points show them."""


@dataclass(frozen=True)
class Series:
    """A line: its name, points (x, y) with None for no value, and the class that gives its colour."""

    name: str
    points: Sequence[tuple[float, float | None]]
    css: str
    faint: bool = False


@dataclass(frozen=True)
class Frame:
    """How a chart is drawn. limits: of y. line_at: a level that is marked. epochs: x counts whole epochs."""

    x_label: str
    y_label: str
    width: int = 460
    height: int = 260
    log: bool = False
    zero: bool = False
    limits: tuple[float, float] | None = None
    y_ticks: tuple[float, ...] | None = None
    line_at: float | None = None
    epochs: bool = False


def lines(series: Sequence[Series], frame: Frame, title: str) -> str:
    """A line chart. title: what it shows, for those who can't see it."""
    right, bottom = frame.width - RIGHT, frame.height - BOTTOM
    xs = [x for one in series for x, _ in one.points]
    across = integers(round(max(xs, default=1)), LEFT, right) if frame.epochs else scale(xs, LEFT, right, zero=True)
    if frame.limits:
        up = Scale(*frame.limits, bottom, TOP, frame.log)
    else:
        values = [y for one in series for _, y in one.points]
        up = scale(values, bottom, TOP, log=frame.log, zero=frame.zero)
    parts = [_axes(across, up, frame)]
    if frame.line_at is not None and up.low <= frame.line_at <= up.high:
        y = up(frame.line_at)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts += [_line(one, across, up, frame) for one in series]
    return _svg(frame.width, frame.height, title, parts)


def _line(series: Series, across: Scale, up: Scale, frame: Frame) -> str:
    runs: list[list[tuple[float, float, float, float]]] = [[]]
    for x, y in series.points:
        if y is not None and up.holds(y):
            runs[-1].append((across(x), max(min(up(y), up.start), up.end), x, y))
        elif runs[-1]:
            runs.append([])
    kind = f"{series.css} faint" if series.faint else series.css
    parts = []
    for run in runs:
        if len(run) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in run)
            parts.append(f'<polyline class="line {kind}" points="{path}"/>')
    dots = [point for run in runs for point in run]
    if not series.faint and len(dots) <= MARKED:
        x_name, y_name = frame.x_label.split(" (")[0], escape(series.name)
        parts += [
            f'<circle class="dot {kind}" cx="{px:.1f}" cy="{py:.1f}" r="2.6"><title>{y_name}, {x_name} {label(x)}: '
            f"{y:.4g}</title></circle>"
            for px, py, x, y in dots
        ]
    return "".join(parts)


def _axes(across: Scale, up: Scale, frame: Frame) -> str:
    right, bottom = frame.width - RIGHT, frame.height - BOTTOM
    parts = []
    for tick in frame.y_ticks or up.ticks(max(3, frame.height // 45)):
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label(tick)}</text>')
    for tick in across.ticks(max(3, frame.width // 75)):
        if frame.epochs and tick % 1:
            continue
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(_names((LEFT + right) / 2, frame.height - 6, (TOP + bottom) / 2, frame.x_label, frame.y_label))
    return "".join(parts)


def _names(x: float, y: float, middle: float, x_label: str, y_label: str) -> str:
    return (
        f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="name" transform="translate(13 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )


def dots(points: Sequence[tuple[float, float, int]], classes: Sequence[str], size: int, title: str) -> str:
    """A scatter of (x, y, class); each class's name stands at the median of its points. No axes: only nearness means
    something.
    """
    margin = 10
    across = scale([x for x, _, _ in points], margin, size - margin)
    up = scale([y for _, y, _ in points], size - margin, margin)
    parts = [
        f'<circle class="point c{c % 10}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.4"><title>{escape(classes[c])}'
        "</title></circle>"
        for x, y, c in points
    ]
    for c, name in enumerate(classes):
        own = [(x, y) for x, y, k in points if k == c]
        if own:
            x, y = (sorted(values)[len(own) // 2] for values in zip(*own, strict=True))
            parts.append(
                f'<text class="cluster" x="{across(x):.1f}" y="{up(y) + 4:.1f}" text-anchor="middle">{escape(name)}</text>'
            )
    return _svg(size, size, title, parts)


def heat(rows: Sequence[tuple[str, Sequence[tuple[float, float | None]]]], frame: Frame, title: str,
         diverging: bool = False) -> str:  # fmt: skip
    """A heat map: a row of cells for each name, from its points (x, y). diverging: colours turn at `frame.line_at`.

    y is coloured from the lowest to the highest value of all, or between `frame.limits`.
    """
    height = 15 if len(rows) <= 40 else 8
    left, width, legend = 190, frame.width, 46
    bottom = TOP + height * len(rows)
    xs = sorted({x for _, points in rows for x, _ in points})
    across = Scale(0, max(len(xs), 1), left, width - RIGHT)
    values = [y for _, points in rows for _, y in points]
    colour = Scale(*frame.limits, 0, 1, frame.log) if frame.limits else scale(values, 0, 1, log=frame.log)
    place = {x: i for i, x in enumerate(xs)}
    parts = []
    for i, (name, points) in enumerate(rows):
        y = TOP + i * height
        if height > 10 or i % 2 == 0:
            shown = name if len(name) <= 28 else f"{name[:12]}…{name[-15:]}"
            parts.append(
                f'<text class="tick" x="{left - 6}" y="{y + height - 3.5}" text-anchor="end">{escape(shown)}</text>'
            )
        for x, value in points:
            if value is not None and colour.holds(value):
                at = across(place[x])
                fill = ramp(min(1.0, max(0.0, colour(value))), diverging)
                parts.append(
                    f'<rect x="{at:.1f}" y="{y}" width="{across(place[x] + 1) - at + 0.3:.1f}" height="{height - 1}" '
                    f'fill="{fill}"><title>{escape(name)}, step {label(x)}: {value:.4g}</title></rect>'
                )
    for i in range(0, len(xs), max(1, len(xs) // 8)):
        parts.append(
            f'<text class="tick" x="{across(i + 0.5):.1f}" y="{bottom + 13}" text-anchor="middle">{label(xs[i])}</text>'
        )
    parts.append(f'<text class="name" x="{left}" y="{bottom + 32}">{escape(frame.x_label)}</text>')
    parts.append(_legend(colour, frame, diverging, width, bottom + 23))
    return _svg(width, bottom + legend, title, parts)


def _legend(colour: Scale, frame: Frame, diverging: bool, width: int, y: float) -> str:
    cells, wide, x = 24, 6, width - RIGHT - 190
    parts = [f'<text class="name" x="{x - 8}" y="{y + 9}" text-anchor="end">{escape(frame.y_label)}</text>']
    for i in range(cells):
        parts.append(
            f'<rect x="{x + i * wide}" y="{y}" width="{wide + 0.3}" height="9" fill="{ramp(i / 23, diverging)}"/>'
        )
    for value, at in ((colour.low, 0), (colour.high, cells * wide)):
        parts.append(f'<text class="tick" x="{x + at}" y="{y + 20}" text-anchor="middle">{value:.2g}</text>')
    return "".join(parts)


_SEQUENTIAL = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_DIVERGING = ((21, 88, 176), (134, 176, 224), (214, 214, 214), (240, 160, 100), (176, 68, 0))


def ramp(share: float, diverging: bool = False) -> str:
    """A colour between two ends, told apart by every kind of sight: dark violet to yellow, or blue by grey to orange."""
    stops = _DIVERGING if diverging else _SEQUENTIAL
    at = share * (len(stops) - 1)
    i = min(int(at), len(stops) - 2)
    mixed = [round(a + (b - a) * (at - i)) for a, b in zip(stops[i], stops[i + 1], strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def finite(value: float | None) -> float | None:
    """The value, or None if it is not a number."""
    return value if value is not None and math.isfinite(value) else None
