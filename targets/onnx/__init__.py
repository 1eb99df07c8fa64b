"""The ONNX target: a compiled model as files that other tools run and show.

    local.export("model.onnx")                  # one function a subgraph, wired by the main graph
    local.export("parts", kind="split")         # one file a subgraph, with a manifest
    local.export("step.onnx", kind="training-step", loss_fn=..., optimizer=..., y=...)    # trains in ONNX Runtime

The way there: `evaluation` (the training trace as the model evaluates) -> `convert` (torch's exporter, on the whole
graph, with the boundaries marked) -> `cut` (into one piece a subgraph) -> `model` (functions) or `split` (files) ->
`comparison` (ONNX's checker; ONNX Runtime against the model).

onnx and onnxscript are imported when something is exported, not before.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from torch import nn

from graphlocal.errors import InputError, nearest
from graphlocal.ir import LocalGraph
from graphlocal.trace import TracedModel

KINDS = {"model": ("model", "export_model"), "split": ("split", "export_split")}
"""What can be exported: the module below this package and its function `(graph, traced, model, path, **options)`."""

TRAINING_STEP = "training-step"
"""The kind that `export_step` writes."""


def export(
    graph: LocalGraph, traced: TracedModel, model: nn.Module, path: str | Path, kind: str = "model", **options: Any
) -> Any:
    """Export a compiled model; see the function of the `kind` for its options and result.

    Raises InputError if the kind or an option is unknown, if onnx is not installed, if the model holds what ONNX
    can't express, or if the file can't be written; what stood at `path` then stays as it was.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of export {kind!r}", remedy=nearest(kind, (*KINDS, TRAINING_STEP)))
    require_onnx()
    module, name = KINDS[kind]
    function = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    known = list(inspect.signature(function).parameters)[4:]
    for option in options:
        if option not in known:
            raise InputError(f"unknown option {option!r} of the export {kind!r}", remedy=nearest(option, known))
    return function(graph, traced, model, Path(path), **options)


def export_step(compiled: Any, unflatten: Any, path: str | Path, **options: Any) -> Any:
    """Export the whole training step; see `training_step.export_training_step`. Raises as `export` does."""
    require_onnx()
    function = importlib.import_module(f"{__name__}.training_step").export_training_step
    known = list(inspect.signature(function).parameters)[3:]
    for option in options:
        if option not in known:
            raise InputError(f"unknown option {option!r} of a training step", remedy=nearest(option, known))
    for option in ("loss_fn", "optimizer", "y"):
        if option not in options:
            raise InputError(f"the export of a training step needs {option}=")
    return function(compiled, unflatten, Path(path), **options)


def require_onnx() -> None:
    """Raises InputError if onnx or onnxscript is not installed."""
    for name in ("onnx", "onnx_ir", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"the ONNX export needs {name.replace('_', '-')}, which is not installed",
                why=str(error),
                remedy="pip install 'graphlocal[onnx]'",
            ) from error
