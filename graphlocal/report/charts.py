"""Charts as inline SVG: lines and dots. Colours are the style sheet's, so that they follow the theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from graphlocal.report.scales import Scale, integers, label, scale

LEFT, RIGHT, TOP, BOTTOM = 56, 10, 12, 40
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
    across = scale(xs, LEFT, right, zero=True)
    if frame.epochs:
        across = integers(round(max(xs, default=1)), LEFT, right, first=int(min(xs, default=1) >= 1))
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
    return drawing(frame.width, frame.height, title, parts)


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
            place = f'x="{across(x):.1f}" y="{up(y) + 4:.1f}" text-anchor="middle"'
            parts.append(f'<text class="cluster" {place}>{escape(name)}</text>')
    return drawing(size, size, title, parts)


def drawing(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """The SVG element of a chart."""
    box = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"'
    return f'<svg class="chart" {box}>{"".join(parts)}</svg>'


def finite(value: float | None) -> float | None:
    """The value, or None if it is not a number."""
    return value if value is not None and math.isfinite(value) else None
