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

_OTHERS = {
    ".local": "local.save(path) writes that format",
    ".pt": "give a program of torch.export the suffix .pt2",
    ".pth": "give a program of torch.export the suffix .pt2",
    ".html": "local.show(path) draws",
    ".svg": "local.show(path) draws",
}
"""What to do about suffixes that stand for something else."""


def export(
    graph: LocalGraph, traced: TracedModel, model: nn.Module, path: str | Path, kind: str = "model", **options: Any
) -> Any:
    """Write a compiled model as it evaluates. Raises as `onnx.export` and `torch_export.export_model` do."""
    if not _is_program(path):
        return onnx.export(graph, traced, model, path, kind, **options)
    if kind != "model":
        raise InputError(
            f"{path} can't hold the kind {kind!r}", remedy="a .pt2 file holds the kinds 'model' and 'training-step'"
        )
    _require_known(torch_export.export_model, 4, options)
    return torch_export.export_model(graph, traced, model, Path(path), **options)


def export_step(compiled: Any, unflatten: Any, path: str | Path, **options: Any) -> Any:
    """Write the training step. Raises as `onnx.export_step` and `torch_export.export_step` do."""
    if not _is_program(path):
        return onnx.export_step(compiled, unflatten, path, **options)
    _require_known(torch_export.export_step, 3, options, ("loss_fn", "optimizer", "y"))
    return torch_export.export_step(compiled, unflatten, Path(path), **options)


def _is_program(path: str | Path) -> bool:
    """Whether a file is to be a .pt2. Raises InputError for a suffix that is neither's."""
    suffix = Path(path).suffix.lower()
    if suffix in _OTHERS:
        raise InputError(f"{path} is no file for an export, which writes ONNX or .pt2", remedy=_OTHERS[suffix])
    return suffix == torch_export.SUFFIX


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
