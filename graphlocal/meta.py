"""What a run keeps of how it was made."""

from __future__ import annotations

import platform
from typing import Any

import torch

from graphlocal.runtime import LocalModule
from graphlocal.version import __version__


def describe(local: LocalModule) -> dict[str, Any]:
    """The model, rule, partition and target of a compiled model, and the versions that run it."""
    partition = local.options.partition
    parameters = [p for p in local.original.parameters() if p.requires_grad]
    return {
        "model": local.graph.name,
        "rule": str(local.options.rule),
        "rule_name": local.options.rule.name,
        "partition": partition if isinstance(partition, (str, int)) else repr(partition),
        "target": local.options.target,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "device": str(parameters[0].device) if parameters else "",
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else "",
        "versions": {"graphlocal": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
