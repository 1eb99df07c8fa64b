"""The colours of the drawings."""

from __future__ import annotations

from graphlocal.targets.show.view import Box

LIGHT_AND_DARK = {
    "paper": ("#ffffff", "#16181d"),
    "ink": ("#1f2430", "#e6e8ee"),
    "muted": ("#5b6270", "#a3aab8"),
    "line": ("#8a92a3", "#7d8596"),
    "subgraph": ("#e7effb", "#22304a"),
    "frozen": ("#eff0f2", "#2b2e35"),
    "input": ("#f6f7f9", "#1e2129"),
    "group": ("#fafbfd", "#1a1d24"),
    "loss": ("#c92a2a", "#ff7b7b"),
    "vjp": ("#7046c6", "#b79bff"),
    "feedback": ("#c2570c", "#ff9f4a"),
}
"""Colours by their use; a drawing names the light ones, and an SVG replaces them where the reader wants it dark."""
COLOUR = {use: light for use, (light, _) in LIGHT_AND_DARK.items()}


def fill(box: Box) -> str:
    """The use under which a box's colour stands in COLOUR: `frozen` is what trains nothing."""
    if box.kind in ("input", "output"):
        return "input"
    return "subgraph" if box.facts["trainable"] else "frozen"
