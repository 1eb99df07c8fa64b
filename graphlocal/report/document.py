"""Puts a report together: one HTML file that fetches nothing, and runs only the partition page's own scripts."""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape, unescape
from pathlib import Path

from graphlocal.errors import InputError
from graphlocal.report import sections
from graphlocal.report.clusters import clusters
from graphlocal.report.style import STYLE
from graphlocal.run_log import Record, Run, read_run
from graphlocal.targets.page import page
from graphlocal.targets.show import svg

_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)"')
_ELEMENTS = re.compile(r"<style>(.*?)</style>", re.DOTALL)


def report(folder: Path, title: str | None = None) -> str:
    """The report of the run in `folder`, as HTML. title: of the page, the model's name by default.

    The partition is drawn by the partition page; where its libraries were not bundled, by Graphviz; where that is
    missing too, it is text. Raises InputError for a folder without a run, and for a damaged one.
    """
    run = read_run(folder)
    partition, policies = _partition(run)
    parts = [
        sections.headline(run),
        sections.curves(run),
        sections.subgraphs(run),
        _representations(folder),
        partition,
        sections.details(run),
    ]
    if not run.of("step", "epoch"):
        parts.insert(1, "<p class='note'>The run has neither observed a step nor ended an epoch.</p>")
    name = title if title is not None else f"{run.meta.get('model', run.graph.name)}: training"
    html = (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(policies)}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )
    return html.encode("utf-8", "replace").decode()


def _representations(folder: Path) -> str:
    try:
        found, classes = clusters(folder)
    except InputError as error:
        return sections.representations([], [], str(error))
    return sections.representations(found, classes)


def _partition(run: Run) -> tuple[str, dict[str, set[str]]]:
    """The partition's section, and what it adds to the page's policy: hashes of scripts and styles."""
    steps = run.of("step")
    graph = run.graph
    angles: Record = next((r["angle"] for r in reversed(steps) if r.get("angle")), {})
    losses: Record = steps[-1]["local_loss"] if steps else {}
    measured = {
        name: {k: v for k, v in values.items() if v is not None and k in graph.subgraph}
        for name, values in (("alignment", angles), ("losses", losses))
    }
    about = "Subgraphs, error neurons and connections, with the last local losses and angles: a click opens a subgraph."
    try:
        inner = page(graph, alignment=measured["alignment"] or None, losses=measured["losses"] or None)
    except InputError as missing:
        return _drawn(run, missing)
    frame = f'<iframe title="partition" srcdoc="{escape(inner)}"></iframe>'
    return f"<section><h2>Partition</h2><p class='about'>{about}</p>{frame}</section>", _allowed(inner)


def _drawn(run: Run, missing: InputError) -> tuple[str, dict[str, set[str]]]:
    try:
        drawn = svg(run.graph)
    except InputError:
        text = f"<p class='note'>{escape(str(missing))}</p><pre>{escape(str(run.graph))}</pre>"
        return f"<section><h2>Partition</h2>{text}</section>", {}
    styles = {_hash(style) for style in _ELEMENTS.findall(drawn)}
    content = f"<div class='drawn'>{drawn[drawn.index('<svg') :]}</div>"
    return f"<section><h2>Partition</h2>{content}</section>", {"style-src": styles}


def _allowed(inner: str) -> dict[str, set[str]]:
    """The hashes in a page's own policy: a frame's page is under the policy of the page around it, too."""
    found = _POLICY.search(inner)
    assert found is not None
    directives = (directive.split() for directive in unescape(found[1]).split(";"))
    return {kind: set(rest) for kind, *rest in directives if kind in ("script-src", "style-src")}


def _policy(allowed: dict[str, set[str]]) -> str:
    hashes = {"script-src": allowed.get("script-src", set()), "style-src": allowed.get("style-src", set())}
    hashes["style-src"] = hashes["style-src"] | {_hash(STYLE)}
    lists = [f"{kind} {' '.join(sorted(values)) or repr('none')}" for kind, values in hashes.items()]
    return "; ".join(["default-src 'none'", *lists, "img-src data:", "base-uri 'none'", "form-action 'none'"])


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
