"""Questions about a compiled model's partition."""

from __future__ import annotations

from graphlocal.passes.explain import explain as _explain
from graphlocal.runtime import LocalModule


def explain(local: LocalModule) -> str:
    """Why each cut was made: one line for each subgraph of a compiled model."""
    return _explain(local.graph, local.options.partition)
