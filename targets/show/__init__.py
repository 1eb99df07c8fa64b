"""Drawings of a graph, one format a file: each writer is a function from a graph (and options) to text.

    write(graph, "resnet.svg", errors="none")    # the format is the suffix's
    text = render(graph, ".dot", operations=True)

`.json` keeps everything (`graphlocal.text.from_document` reads it back), `.txt` the same for people.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphlocal import files
from graphlocal.errors import InputError, nearest
from graphlocal.ir import LocalGraph
from graphlocal.targets.page import page
from graphlocal.targets.show.dot import dot, svg
from graphlocal.targets.show.graphml import graphml
from graphlocal.targets.show.mermaid import mermaid
from graphlocal.targets.show.model_explorer import model_explorer
from graphlocal.targets.show.notebook import Drawing
from graphlocal.targets.show.view import view
from graphlocal.text import to_document, to_text

__all__ = [
    "WRITERS",
    "Drawing",
    "dot",
    "draw",
    "graphml",
    "mermaid",
    "model_explorer",
    "render",
    "suffix",
    "svg",
    "write",
]


def document(graph: LocalGraph) -> str:
    """The graph's document as JSON, without loss."""
    return json.dumps(to_document(graph), indent=1) + "\n"


def text(graph: LocalGraph) -> str:
    """The complete text form, which `graphlocal.text.parse` reads back."""
    return to_text(graph)


WRITERS: dict[str, Callable[..., str]] = {
    ".html": page,
    ".svg": svg,
    ".dot": dot,
    ".mmd": mermaid,
    ".txt": text,
    ".graphml": graphml,
    ".me.json": model_explorer,
    ".json": document,
}
"""The writer of each suffix; a longer suffix stands before one that it ends with."""


def suffix(path: Path | str) -> str:
    """The suffix of a path that names a format. Raises InputError, listing the known ones, for any other."""
    name = Path(path).name.lower()
    found = next((known for known in WRITERS if name.endswith(known) and name != known), None)
    if found is None:
        raise InputError(
            f"{str(path)!r} has no suffix that names a format of graphlocal", remedy=f"known: {', '.join(WRITERS)}"
        )
    return found


def render(graph: LocalGraph, format: str, **options: Any) -> str:
    """The graph in a format, named by its suffix.

    Raises InputError for an unknown format, an option that it doesn't have, and where it can't be drawn.
    """
    if format not in WRITERS:
        raise InputError(f"{format!r} names no format of graphlocal", remedy=f"known: {', '.join(WRITERS)}")
    _require_options(WRITERS[format], options, format)
    return WRITERS[format](graph, **options)


def write(graph: LocalGraph, path: Path | str, **options: Any) -> None:
    """Write the graph in the format of the path's suffix, the whole file or none.

    Raises InputError as `render` does, and where the file can't be written.
    """
    files.write(Path(path), render(graph, suffix(path), **options).encode("utf-8"))


def draw(graph: LocalGraph, **options: Any) -> Drawing:
    """What a notebook shows. Raises InputError for an option that drawings don't have, or a wrong one."""
    _require_options(dot, options, "a drawing")
    view(graph, **options)
    return Drawing(graph, **options)


def _require_options(writer: Callable[..., str], options: dict[str, Any], what: str) -> None:
    known = [name for name, p in inspect.signature(writer).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise InputError(f"{what} has no option {name!r}", remedy=nearest(name, known))
