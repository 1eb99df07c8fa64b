"""A drawing that a notebook shows in the cell, and a terminal as text."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from html import escape

from graphlocal.ir import LocalGraph
from graphlocal.targets.show.dot import svg
from graphlocal.targets.show.view import Errors


@dataclass(frozen=True)
class Drawing:
    """A graph with the options of its drawing: SVG in a notebook where Graphviz is installed, else text."""

    graph: LocalGraph
    operations: bool = False
    errors: Errors = "all"

    def _repr_svg_(self) -> str | None:
        if shutil.which("dot") is None:
            return None
        return svg(self.graph, operations=self.operations, errors=self.errors)

    def _repr_html_(self) -> str:
        drawn = self._repr_svg_()
        return drawn[drawn.index("<svg") :] if drawn else f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        return str(self.graph)
