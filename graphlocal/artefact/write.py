"""Writes a compiled model to a file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphlocal.arguments import Arguments, Binder
from graphlocal.artefact.container import write_container
from graphlocal.artefact.document import to_bytes
from graphlocal.artefact.module_json import (
    NamedTensor,
    module_document,
    modules_of,
    signature_document,
    tensor_document,
    tensors_of,
)
from graphlocal.artefact.options_json import options_document
from graphlocal.artefact.tensors import describe, to_safetensors
from graphlocal.artefact.trace_json import graph_document
from graphlocal.artefact.values import encode, encode_spec
from graphlocal.compiler import Compiled
from graphlocal.errors import GraphLocalError, InputError
from graphlocal.ir import Input
from graphlocal.lift import lift
from graphlocal.stored import StoredModel
from graphlocal.text import to_document
from graphlocal.trace import TracedModel, trace_evaluation


def write_model(
    path: str | os.PathLike[str],
    compiled: Compiled,
    traced_modes: dict[str, bool],
    *,
    training: bool,
    check_finite: bool,
) -> None:
    """Write a compiled model with its weights, maps E, modes, options, graph and example inputs.

    traced_modes: of the modules by path, when the training graph was traced. training: mode of the LocalModule.

    Raises InputError for a tensor that can't be saved, or a path that can't be written.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"path is a {type(path).__name__}", remedy="pass a file name, such as 'm.local'")
    model, traced = compiled.model, compiled.traced
    _warn_of_extra_state(model)
    tensors = list(tensors_of(model))
    maps = list(tensors_of(compiled.error_weights))
    evaluation, no_evaluation = _evaluation(compiled)
    constants = dict(_constants("training", traced))
    if evaluation is not None:
        constants |= _constants("evaluation", evaluation)
    inputs = {str(i): leaf for i, leaf in enumerate(traced.arguments.leaves) if isinstance(leaf, Tensor)}
    described = {
        "name": compiled.graph.name,
        "training": training,
        "check_finite": check_finite,
        "device": _device(model),
        "modules": [module_document(module) for module in modules_of(model, traced_modes)],
        "tensors": [tensor_document(tensor) for tensor, _ in tensors],
        "overlap": _overlap(tensors),
        "error_weights": [tensor_document(tensor) for tensor, _ in maps],
        "constants": {name: describe(value, name).document() for name, value in constants.items()},
        "options": options_document(compiled.options, compiled.graph),
        "call": _call_document(model, traced.arguments),
    }
    evaluation_document: dict[str, Any] = {"why": no_evaluation, "trace": None}
    if evaluation is not None:
        evaluation_document["trace"] = _trace_document(evaluation, _graph_inputs(evaluation, model))
    members = {
        "module.json": to_bytes(described),
        "graph.json": to_bytes(to_document(compiled.graph)),
        "trace.json": to_bytes(_trace_document(traced, compiled.graph.inputs)),
        "evaluation.json": to_bytes(evaluation_document),
        "weights.safetensors": to_safetensors({t.name: value for t, value in tensors if t.stored == t.name}),
        "error_weights.safetensors": to_safetensors({t.name: value for t, value in maps if t.stored == t.name}),
        "constants.safetensors": to_safetensors(constants),
        "inputs.safetensors": to_safetensors(inputs),
    }
    write_container(Path(path), members)


def _warn_of_extra_state(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            warnings.warn(
                f"the extra state of the module {path or type(module).__name__} is not saved (get_extra_state); "
                "parameters and buffers are.",
                stacklevel=4,
            )


def _device(model: nn.Module) -> str:
    return str(next(model.parameters()).device)


def _overlap(tensors: Sequence[tuple[NamedTensor, Tensor]]) -> list[str]:
    """Two tensors that share memory without being the same one, if there are any; only the model's code ties them."""
    spans = []
    for tensor, value in tensors:
        if tensor.stored == tensor.name and value.numel():
            extent = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
            spans.append((str(value.device), value.data_ptr(), extent * value.element_size(), tensor.name))
    spans.sort()
    for (device, begin, size, name), (other_device, other, _, other_name) in pairwise(spans):
        if device == other_device and begin + size > other:
            return [name, other_name]
    return []


def _evaluation(compiled: Compiled) -> tuple[TracedModel | None, str]:
    """The model's trace in evaluation mode, or why there is none."""
    model, traced = compiled.model, compiled.traced
    if isinstance(model, StoredModel):
        stored = model.evaluation_graph
        return (model.bound(stored, traced.arguments), "") if stored else (None, model.no_evaluation)
    try:
        return trace_evaluation(model, traced.arguments, traced.dynamic), ""
    except GraphLocalError as error:
        return None, error.message


def _constants(kind: str, traced: TracedModel) -> dict[str, Tensor]:
    return {f"{kind}/{name}": value for name, value in traced.constants.items()}


def _graph_inputs(traced: TracedModel, model: nn.Module) -> tuple[Input, ...]:
    if isinstance(model, StoredModel):
        assert model.evaluation_graph is not None
        return model.evaluation_graph.inputs
    return lift(traced, model).inputs


def _trace_document(traced: TracedModel, inputs: Sequence[Input]) -> dict[str, Any]:
    return {
        "rung": traced.rung,
        "inputs": [
            {"name": i.name, "type": None if i.type is None else {"dtype": i.type.dtype, "shape": list(i.type.shape)}}
            for i in inputs
        ],
        "dynamic": sorted(map(list, traced.dynamic)),
        "requires_grad": list(traced.requires_grad),
        "outputs": encode_spec(traced.out_spec),
        "opaque": list(traced.opaque),
        "nodes": graph_document(traced.module),
    }


def _call_document(model: nn.Module, arguments: Arguments) -> dict[str, Any]:
    leaves: list[Any] = []
    for i, leaf in enumerate(arguments.leaves):
        described = describe(leaf, f"input {arguments.names[i]}").document() if isinstance(leaf, torch.Tensor) else None
        leaves.append({"tensor": described, "value": None if described else encode(leaf)})
    return {
        "signature": signature_document(Binder(model).signature),
        "structure": encode_spec(arguments.spec),
        "leaves": leaves,
    }
