"""Checks what was written: by ONNX's own checker, and by ONNX Runtime against the model."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from graphlocal.errors import InputError
from graphlocal.targets.evaluation import Call, Evaluation, difference

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2}
"""The largest difference of an output from the model's, relative to its largest entry, that passes."""

Run = Callable[[Mapping[str, Any]], Sequence[Any]]
"""Runs an exported model: arrays of numpy by name in, arrays out."""


def check(path: Path) -> None:
    """Raises InputError if ONNX's checker refuses the file; types and shapes are inferred throughout."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise InputError("the exported model does not pass ONNX's checker", why=str(error).strip()[:500]) from error


def session(path: Path) -> Any:
    """An inference session of ONNX Runtime on the CPU, without its log."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare(evaluation: Evaluation, make: Callable[[], Run]) -> float | None:
    """The largest difference between ONNX Runtime and the model, over its example calls.

    None where there is no ONNX Runtime, or none that has the model's types. Raises InputError if an output differs.
    """
    types = {x.dtype for call in evaluation.calls for x in (*call.inputs, *call.outputs)}
    if importlib.util.find_spec("onnxruntime") is None or torch.bfloat16 in types:
        return None
    try:
        run = make()
    except Exception as error:
        if "NOT_IMPLEMENTED" not in str(error):
            raise InputError("ONNX Runtime does not load the exported model", why=str(error)[:500]) from error
        warnings.warn(f"ONNX Runtime has no CPU kernel for this model, so it was not compared: {error}", stacklevel=2)
        return None
    return max(_largest(evaluation, call, run) for call in evaluation.calls)


def _largest(evaluation: Evaluation, call: Call, run: Run) -> float:
    given = {name: x.detach().cpu().numpy() for name, x in zip(evaluation.inputs, call.inputs, strict=True)}
    largest = 0.0
    sizes = ", ".join(str(list(x.shape)) for x in call.inputs)
    try:
        found = run(given)
    except Exception as error:
        raise InputError(
            f"ONNX Runtime does not run the exported model on inputs of shape {sizes}", why=str(error)[:500]
        ) from error
    for number, (array, expected) in enumerate(zip(found, call.outputs, strict=True)):
        distance = difference(_tensor(array), expected.cpu())
        if distance > TOLERANCES.get(expected.dtype, 0.0):
            raise InputError(
                f"ONNX Runtime computes output {number} ({evaluation.outputs[number]}) in another way than the model: "
                f"the difference is {distance:.1e} of the largest entry, on inputs of shape {sizes}",
                why="an operator was translated to one that computes something else",
                remedy="export with check=False to look at the file",
            )
        largest = max(largest, distance)
    return largest


def _tensor(array: Any) -> Tensor:
    return torch.as_tensor(array)
