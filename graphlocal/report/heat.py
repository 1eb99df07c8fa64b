"""Heat maps as inline SVG: a row for each subgraph, for models with more of them than small charts fit."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from graphlocal.report.charts import BOTTOM, RIGHT, TOP, Frame, drawing
from graphlocal.report.scales import Scale, label, scale

LETTERS = 28
"""Longer names lose their middle."""
COLUMNS = 120
"""Of more observations than this, evenly many are shown."""
LEGEND = (24, 6)
"""Cells of the legend, and the width of each."""

Rows = Sequence[tuple[str, Sequence[tuple[float, float | None]]]]


def heat(rows: Rows, frame: Frame, title: str, diverging: bool = False) -> str:
    """A heat map: a row of cells for each name, from its points (x, y).

    y is coloured from the lowest to the highest value of all, or between `frame.limits`; with `diverging` the colours
    turn in the middle.
    """
    height = 15 if len(rows) <= 40 else 8
    bottom, left = TOP + height * len(rows), 30 + 6 * min(LETTERS, max((len(name) for name, _ in rows), default=0))
    xs = sorted({x for _, points in rows for x, _ in points})
    xs = xs[:: -(-len(xs) // COLUMNS)]
    across = Scale(0, max(len(xs), 1), left, frame.width - RIGHT)
    values = [y for _, points in rows for _, y in points]
    colour = Scale(*frame.limits, 0, 1, frame.log) if frame.limits else scale(values, 0, 1, log=frame.log)
    parts = []
    for i, (name, points) in enumerate(rows):
        y = TOP + i * height
        if height > 10 or i % 2 == 0:
            parts.append(_text("tick", left - 6, y + height - 3.5, "end", _short(name)))
        parts += _cells(name, dict(points), xs, across, colour, diverging, (y, height - 1))
    parts += [
        _text("tick", across(i + 0.5), bottom + 13, "middle", label(xs[i]))
        for i in range(0, len(xs), max(1, len(xs) // 8))
    ]
    parts.append(_text("name", left, bottom + 32, "start", frame.x_label))
    parts.append(_legend(colour, frame, diverging, bottom + 23))
    return drawing(frame.width, bottom + BOTTOM + 6, title, parts)


def _cells(name: str, values: dict[float, float | None], xs: Sequence[float], across: Scale, colour: Scale,
           diverging: bool, at: tuple[float, float]) -> list[str]:  # fmt: skip
    y, height = at
    parts = []
    for i, x in enumerate(xs):
        value = values.get(x)
        if value is not None and colour.holds(value):
            fill = ramp(min(1.0, max(0.0, colour(value))), diverging)
            parts.append(
                f'<rect x="{across(i):.1f}" y="{y}" width="{across(i + 1) - across(i) + 0.3:.1f}" height="{height}" '
                f'fill="{fill}"><title>{escape(name)}, step {label(x)}: {value:.4g}</title></rect>'
            )
    return parts


def _legend(colour: Scale, frame: Frame, diverging: bool, y: float) -> str:
    cells, wide = LEGEND
    x = frame.width - RIGHT - cells * wide - 20
    parts = [_text("name", x - 16, y + 9, "end", frame.y_label)]
    for i in range(cells):
        fill = ramp(i / (cells - 1), diverging)
        parts.append(f'<rect x="{x + i * wide}" y="{y}" width="{wide + 0.3}" height="9" fill="{fill}"/>')
    parts += [
        _text("tick", x + at, y + 20, "middle", f"{value:.3g}")
        for value, at in ((colour.low, 0), (colour.high, cells * wide))
    ]
    return "".join(parts)


def _text(css: str, x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"{name[:12]}…{name[-15:]}"


_SEQUENTIAL = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_DIVERGING = ((21, 88, 176), (134, 176, 224), (214, 214, 214), (240, 160, 100), (176, 68, 0))


def ramp(share: float, diverging: bool = False) -> str:
    """A colour between ends that every kind of sight tells apart: violet to yellow, or blue by grey to orange."""
    stops = _DIVERGING if diverging else _SEQUENTIAL
    at = share * (len(stops) - 1)
    i = min(int(at), len(stops) - 2)
    mixed = [round(a + (b - a) * (at - i)) for a, b in zip(stops[i], stops[i + 1], strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)
