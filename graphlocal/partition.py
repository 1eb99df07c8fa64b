"""Questions about a compiled model's partition."""

from __future__ import annotations

from graphlocal.passes.explain import explain as _explain
from graphlocal.runtime import LocalModule


def explain(local: LocalModule) -> str:
    """Why each cut was made: one line for each subgraph of a compiled model."""
    policy = local.options.partition
    return _explain(local.graph, local.options.rule.preferred_partition(local.graph) if policy == "auto" else policy)
