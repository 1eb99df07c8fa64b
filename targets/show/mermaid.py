"""A drawing as a Mermaid flowchart, for Markdown pages that draw them.

With its default settings Mermaid refuses larger ones than MOST_EDGES and MOST_CHARACTERS; only the page that draws
them can change that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from graphlocal.ir import LocalGraph
from graphlocal.targets.show.colours import COLOUR, fill
from graphlocal.targets.show.view import Errors, View, view

_BRACKETS = {"input": ("([", "])"), "output": ("([", "])"), "subgraph": ("(", ")"), "operation": ("(", ")")}
MOST_EDGES, MOST_CHARACTERS = 500, 50_000
_PLAIN = frozenset(" ._,()×·…=/[]")


def mermaid(graph: LocalGraph, *, operations: bool = False, errors: Errors = "all") -> str:
    """The flowchart, error connections dashed. operations: open the subgraphs. errors: the connections to draw.

    Raises InputError for an `errors` that names a subgraph which isn't there.
    """
    drawing = view(graph, operations=operations, errors=errors)
    lines = ["flowchart TB", *_inside(drawing, "", "  ")]
    lines += [f"  {edge.source} --> {edge.target}" for edge in drawing.data]
    for edge in drawing.errors:
        label = f"|{_label(edge.label)}|" if edge.label else ""
        lines.append(f"  {edge.source} -.->{label} {edge.target}")
    text = "\n".join([*lines, *_styles(drawing)]) + "\n"
    if len(drawing.edges) < MOST_EDGES and len(text) <= MOST_CHARACTERS:
        return text
    needed = f"{{maxEdges: {len(drawing.edges) + 1}, maxTextSize: {len(text) + 200}}}"
    return f"%% larger than Mermaid's defaults: the page must call mermaid.initialize({needed})\n{text}"


def _inside(drawing: View, group: str, indent: str) -> Iterator[str]:
    """What stands directly in a group, or in none (the empty key): boxes first, then groups."""
    for box in drawing.boxes:
        if box.group == group:
            start, end = _BRACKETS[box.kind]
            yield f"{indent}{box.key}{start}{_label(box.title, *box.lines)}{end}"
    for inner in drawing.groups:
        if inner.parent == group:
            yield f"{indent}subgraph {inner.key} [{_label(inner.title)}]"
            yield from _inside(drawing, inner.key, indent + "  ")
            yield f"{indent}end"


def _label(*lines: str) -> str:
    """In quotes, where all but letters, digits and harmless signs are written by their numbers.

    A line that starts like one of a Markdown list would be refused.
    """
    escaped = ("".join(c if c.isalnum() or c in _PLAIN else _number(c) for c in line) for line in lines)
    marked = (re.sub(r"^(\d+)\. ", rf"\1{_number('.')} ", line) for line in escaped)
    return '"' + "<br/>".join(marked) + '"'


def _number(character: str) -> str:
    return f"#{ord(character)};"


def _styles(drawing: View) -> Iterator[str]:
    """Colours that read on light and dark pages: boxes bring their own background."""
    for name in ("subgraph", "frozen", "input"):
        members = [box.key for box in drawing.boxes if fill(box) == name]
        if members:
            text = f"fill:{COLOUR[name]},stroke:{COLOUR['line']},color:{COLOUR['ink']}"
            yield f"  classDef {name}Box {text}"
            yield f"  class {','.join(members)} {name}Box"
    if drawing.groups:
        yield f"  classDef groupBox fill:none,stroke:{COLOUR['line']}"
        yield f"  class {','.join(group.key for group in drawing.groups)} groupBox"
    for kind in ("loss", "vjp", "feedback"):
        numbers = [str(i) for i, edge in enumerate((*drawing.data, *drawing.errors)) if edge.kind == kind]
        if numbers:
            yield f"  linkStyle {','.join(numbers)} stroke:{COLOUR[kind]},color:{COLOUR[kind]}"
