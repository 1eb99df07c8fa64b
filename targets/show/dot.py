"""A drawing for Graphviz, and as SVG by Graphviz.

Values flow down along solid edges. Error connections are dashed and don't take part in the ranks: data decide them.
What one box sends to many others goes over a **rail**, a line beside them with one arrow off to each: errors on the
right, values, such as an attention mask that every block reads, on the left.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from itertools import pairwise

from graphlocal.errors import InputError
from graphlocal.ir import LocalGraph
from graphlocal.targets.show.colours import COLOUR, LIGHT_AND_DARK, fill
from graphlocal.targets.show.view import Box, Edge, Errors, Group, View, view

LEGEND = {"loss": "loss's own gradient", "vjp": "vector-Jacobian product", "feedback": "feedback map E"}
ERROR_RAIL, DATA_RAIL = 2, 4
"""So many feedback connections, or readers, of one source share a rail."""
SECONDS = 120
"""How long Graphviz may take."""
FONT = "Helvetica,Arial,sans-serif"


def dot(graph: LocalGraph, *, operations: bool = False, errors: Errors = "all") -> str:
    """The drawing in Graphviz's language. operations: open the subgraphs. errors: the connections to draw.

    Raises InputError for an `errors` that names a subgraph which isn't there.
    """
    return _dot(view(graph, operations=operations, errors=errors))


def svg(graph: LocalGraph, *, operations: bool = False, errors: Errors = "all") -> str:
    """The drawing of `dot` as SVG, in light or dark colours as the reader's system asks for.

    Raises InputError where Graphviz is not installed, fails, or takes too long.
    """
    drawing = view(graph, operations=operations, errors=errors)
    done = _run_graphviz(_dot(drawing))
    if done.returncode:  # some versions fail to route an edge beside a rail
        done = _run_graphviz(_dot(drawing, rails=False))
    if done.returncode:
        raise InputError("Graphviz could not draw the graph", why=done.stderr.decode(errors="replace").strip())
    drawn = done.stdout.decode()
    pairs = [(light, dark) for light, dark in LIGHT_AND_DARK.values()]
    rules = [f'.graphlocal [{part}="{light}"]{{{part}:{dark}}}' for light, dark in pairs for part in ("fill", "stroke")]
    style = f"<style>@media (prefers-color-scheme: dark){{{' '.join(rules)}}}</style>\n"
    drawn = drawn[drawn.index("<svg") :].replace("<svg", '<svg class="graphlocal"', 1)
    start = drawn.index(">") + 1
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{drawn[:start]}\n{style}{drawn[start:].lstrip()}'


def _run_graphviz(source: str) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("dot")
    if program is None:
        raise InputError(
            "an SVG is drawn by Graphviz, and its program `dot` is not installed",
            remedy="install graphviz (apt install graphviz, brew install graphviz), or write .mmd or .html instead",
        )
    try:
        return subprocess.run([program, "-Tsvg"], input=source.encode(), capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"Graphviz has not drawn the graph in {SECONDS} seconds",
            remedy="draw less: without operations=True, with errors='none', or with fewer subgraphs",
        ) from None


# The language. Keys of boxes and groups need no quotes; all other text is escaped.


def _dot(drawing: View, rails: bool = True) -> str:
    lines = [
        "digraph graphlocal {",
        f'  graph [newrank=true, nodesep=0.3, ranksep=0.35, bgcolor="{COLOUR["paper"]}", labelloc=t, '
        f'fontname="{FONT}", fontsize=11, fontcolor="{COLOUR["muted"]}", label=<{_heading(drawing)}>]',
        f'  node [shape=box, style="rounded,filled", color="{COLOUR["line"]}", fontname="{FONT}", fontsize=11, '
        f'fontcolor="{COLOUR["ink"]}", margin="0.1,0.05", height=0.3]',
        f'  edge [color="{COLOUR["line"]}", fontname="{FONT}", fontsize=9, arrowsize=0.6]',
        *_inside(drawing, "", "  "),
        *_data(drawing, rails),
        *_errors(drawing, rails),
        *_held(drawing),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _heading(drawing: View) -> str:
    kinds = dict.fromkeys(edge.kind for edge in drawing.errors)
    legend = [f'<font color="{COLOUR[kind]}">╌╌ {LEGEND[kind]}</font>' for kind in LEGEND if kind in kinds]
    if any(edge.kind == "vjp" and not edge.exact for edge in drawing.errors):
        legend.append(f'<font color="{COLOUR["vjp"]}">┈┈ the same, not exact</font>')
    title = f'<font color="{COLOUR["ink"]}"><b>{_html(drawing.title[0])}</b></font>'
    return "<br/>".join([title, *map(_html, drawing.title[1:]), *(["&#160;&#160; ".join(legend)] if legend else [])])


def _inside(drawing: View, group: str, indent: str) -> Iterator[str]:
    """What stands directly in a group, or in none (the empty key): boxes first, then groups."""
    yield from (f"{indent}{_box(box)}" for box in drawing.boxes if box.group == group)
    for inner in drawing.groups:
        if inner.parent == group:
            yield f"{indent}subgraph cluster_{inner.key} {{"
            yield f"{indent}  {_cluster(inner)}"
            yield from _inside(drawing, inner.key, indent + "  ")
            yield f"{indent}}}"


def _cluster(group: Group) -> str:
    return (
        f'graph [style="rounded,filled", color="{COLOUR["line"]}", fillcolor="{COLOUR["group"]}", labeljust=l, '
        f"fontsize=10, label=<{_html(group.title)}>]"
    )


def _box(box: Box) -> str:
    title = _html(box.title) if box.kind == "operation" else f"<b>{_html(box.title)}</b>"
    small = (f'<font point-size="9" color="{COLOUR["muted"]}">{_html(line)}</font>' for line in box.lines)
    name = _quoted(str(box.facts["name"]))
    width = ", width=2.5" if box.kind == "subgraph" else ""
    return (
        f'{box.key} [fillcolor="{COLOUR[fill(box)]}"{width}, tooltip={name}, label=<{"<br/>".join([title, *small])}>]'
    )


def _data(drawing: View, rails: bool) -> Iterator[str]:
    readers: dict[str, list[Edge]] = {}
    for edge in drawing.data:
        readers.setdefault(edge.source, []).append(edge)
    for number, (source, edges) in enumerate(readers.items(), 1):
        targets = [edge.target for edge in edges]
        along = _alone(drawing, targets)
        rail = along if rails and len(along) >= DATA_RAIL else []
        yield from (f"  {source} -> {target}" for target in targets if target not in rail)
        if rail:
            yield from _data_rail(f"d{number}", source, rail)


def _data_rail(rail: str, source: str, targets: list[str]) -> Iterator[str]:
    points = [f"{rail}_{i}" for i in range(len(targets))]
    for point, target in zip(points, targets, strict=True):
        yield f"  {point} {_point(rail, COLOUR['line'])}"
        yield f"  {{ rank=same; {point} -> {target} }}"
    yield f"  {source} -> {points[0]} [dir=none]"
    yield from (f"  {a} -> {b} [dir=none, minlen=0, weight=100]" for a, b in pairwise(points))


def _held(drawing: View) -> Iterator[str]:
    """Boxes without edges, such as BatchNorm's counters, are held above the next of their group, or below the last.

    Left free, Graphviz puts them anywhere, and then fails to route edges that leave the group ("lost edge").
    """
    joined = {key for edge in drawing.edges for key in (edge.source, edge.target)}
    groups: dict[str, list[str]] = {}
    for box in drawing.boxes:
        groups.setdefault(box.group, []).append(box.key)
    for keys in groups.values():
        last = max((i for i, key in enumerate(keys) if key in joined), default=0)
        for i, (a, b) in enumerate(pairwise(keys)):
            if a not in joined or i >= last:
                yield f"  {a} -> {b} [style=invis]"


def _errors(drawing: View, rails: bool) -> Iterator[str]:
    sent: dict[str, list[Edge]] = {}
    for edge in drawing.errors:
        sent.setdefault(edge.source, []).append(edge)
    for number, (source, edges) in enumerate(sent.items(), 1):
        along = _alone(drawing, [source, *(edge.target for edge in edges if edge.kind == "feedback")])
        rail = along if rails and source in along and len(along) > ERROR_RAIL else []
        for edge in edges:
            if edge.target not in rail or edge.kind != "feedback":
                yield f"  {source} -> {edge.target} [{_dashes(edge)}, constraint=false]"
        if rail:
            feedback = [edge for edge in edges if edge.kind == "feedback"]
            yield from _error_rail(f"r{number}", source, rail, feedback)


def _error_rail(rail: str, source: str, along: list[str], edges: list[Edge]) -> Iterator[str]:
    colour = COLOUR["feedback"]
    plain = f'color="{colour}", style=dashed, dir=none'
    points = [f"{rail}_{i}" for i in range(len(along))]
    for point, box in zip(points, along, strict=True):
        yield f"  {point} {_point(rail, colour)}"
        dashes = [f"dir=back, {_dashes(edge)}" for edge in edges if edge.target == box] if box != source else [plain]
        yield from (f"  {{ rank=same; {box} -> {point} [{style}] }}" for style in dashes)
    yield from (f"  {a} -> {b} [{plain}, minlen=0, weight=100]" for a, b in pairwise(points))


def _point(rail: str, colour: str) -> str:
    return f'[shape=point, width=0.03, color="{colour}", group={rail}]'


def _alone(drawing: View, keys: Iterable[str]) -> list[str]:
    """Those of the boxes that no other one stands beside, from the top down: what a rail can run along."""
    wanted = set(keys)
    found: dict[int, list[str]] = {}
    for key in wanted:
        found.setdefault(drawing.level[key], []).append(key)
    return [keys[0] for _, keys in sorted(found.items()) if len(keys) == 1]


def _dashes(edge: Edge) -> str:
    style = "dotted" if edge.kind == "vjp" and not edge.exact else "dashed"
    colour = COLOUR[edge.kind]
    label = f', label=<{_html(edge.label)}>, fontcolor="{colour}"' if edge.label else ""
    tip = _quoted(str(edge.facts["description"]))
    return f'color="{colour}", style={style}, edgetooltip={tip}, labeltooltip={tip}{label}'


_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}


def _html(text: str) -> str:
    return "".join(_HTML.get(c, c) for c in text)


def _quoted(text: str) -> str:
    """In quotes, where a backslash is an escape and an ampersand the start of an entity."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;") + '"'
