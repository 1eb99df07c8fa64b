"""What `local.export` writes, by the suffix of the file: .pt2 is a program of torch.export, all else is ONNX."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import nn

from graphlocal.errors import InputError, nearest
from graphlocal.ir import LocalGraph
from graphlocal.targets import onnx, torch_export
from graphlocal.trace import TracedModel

TRAINING_STEP = onnx.TRAINING_STEP


def export(
    graph: LocalGraph, traced: TracedModel, model: nn.Module, path: str | Path, kind: str = "model", **options: Any
) -> Any:
    """Write a compiled model as it evaluates. Raises as `onnx.export` and `torch_export.export_model` do."""
    if Path(path).suffix != torch_export.SUFFIX:
        return onnx.export(graph, traced, model, path, kind, **options)
    if kind != "model":
        raise InputError(
            f"{path} can't hold the kind {kind!r}", remedy="a .pt2 file holds the kinds 'model' and 'training-step'"
        )
    _require_known(torch_export.export_model, 4, options)
    return torch_export.export_model(graph, traced, model, Path(path), **options)


def export_step(compiled: Any, unflatten: Any, path: str | Path, **options: Any) -> Any:
    """Write the training step. Raises as `onnx.export_step` and `torch_export.export_step` do."""
    if Path(path).suffix != torch_export.SUFFIX:
        return onnx.export_step(compiled, unflatten, path, **options)
    _require_known(torch_export.export_step, 3, options, ("loss_fn", "optimizer", "y"))
    return torch_export.export_step(compiled, unflatten, Path(path), **options)


def _require_known(
    function: Callable[..., Any], skip: int, options: Collection[str], needed: Collection[str] = ()
) -> None:
    known = list(inspect.signature(function).parameters)[skip:]
    for option in options:
        if option not in known:
            raise InputError(f"unknown option {option!r} of a .pt2 file", remedy=nearest(option, known))
    for option in needed:
        if option not in options:
            raise InputError(f"the export of a training step needs {option}=")
