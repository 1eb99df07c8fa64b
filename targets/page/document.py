"""Writes the page: everything in one HTML file that fetches nothing and runs only the scripts that it was made with."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from importlib.resources.abc import Traversable

from graphlocal.errors import InputError
from graphlocal.ir import LocalGraph
from graphlocal.targets.page.content import content

LIBRARIES = ("cytoscape.min.js", "dagre.min.js")
STYLES = ("colours.css", "page.css", "parts.css", "print.css")
SCRIPTS = (
    "data.js", "state.js", "inside.js", "place.js", "routes.js", "scales.js", "errors.js", "draw.js",
    "labels.js", "dom.js", "panel.js", "search.js", "schedule.js", "keys.js", "print.js", "main.js",
)  # fmt: skip
"""In this order they are one script, and share their names."""


def page(
    graph: LocalGraph,
    *,
    alignment: dict[str, float] | None = None,
    losses: dict[str, float] | None = None,
    title: str | None = None,
) -> str:
    """The partition page of a compiled model's graph, as HTML.

    alignment: angle in degrees between local update and gradient, by subgraph (`Alignment.by_subgraph`). losses: local
    loss by subgraph. title: of the page, the model's name by default.

    Raises InputError where the libraries that draw were not bundled, for a graph without subgraphs, and for
    measurements of unknown subgraphs.
    """
    libraries = [_library(name) for name in LIBRARIES]
    front = files("graphlocal.targets.page") / "front"
    style = "\n".join((front / name).read_text(encoding="utf-8") for name in STYLES)
    own = "\n".join((front / name).read_text(encoding="utf-8") for name in SCRIPTS)
    scripts = [_inert(text) for text in (*libraries, f'"use strict";\n(() => {{\n{own}}})();\n')]
    parts = {
        "policy": _policy(scripts, style),
        "title": html.escape(_sound(title if title is not None else graph.name)),
        "style": style,
        "data": _json(content(graph, alignment, losses)),
        "licences": html.escape(_bundled("LICENSES.txt").read_text(encoding="utf-8")),
        "scripts": "\n".join(f"<script>{text}</script>" for text in scripts),
    }
    template = (front / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _bundled(name: str) -> Traversable:
    return files("graphlocal.targets.page") / "vendor" / name


def _library(name: str) -> str:
    path = _bundled(name)
    if not path.is_file():
        raise InputError(
            f"the partition page can't be written: {name} is missing",
            where=str(path),
            why="graphlocal was built without npm, which fetches the libraries that the page draws with",
            remedy="install Node.js (with npm) and build again: pip install --force-reinstall --no-deps graphlocal's "
            "folder; or, in a checkout: cd targets/page && npm ci && npm run bundle",
        )
    return re.sub(r"^//# sourceMappingURL=.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def _inert(script: str) -> str:
    """The same program, without the letters that would end its element or open a comment in it."""
    return re.sub(r"<(?=/script|!--|script)", r"\\x3c", script, flags=re.IGNORECASE)


def _json(data: object) -> str:
    """JSON that can stand in HTML: `<` only occurs in strings, where it may be written so."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    text = re.sub("[<>&\u2028\u2029]", lambda match: escapes[match[0]], text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # lone surrogates, as JSON writes them


def _sound(text: str) -> str:
    """Text that UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _policy(scripts: list[str], style: str) -> str:
    """No connection to anywhere; of scripts and styles only these."""
    allowed = {"script-src": scripts, "style-src": [style]}
    hashes = [f"{kind} {' '.join(map(_hash, texts))}" for kind, texts in allowed.items()]
    return "; ".join(["default-src 'none'", *hashes, "img-src data:", "base-uri 'none'", "form-action 'none'"])


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
