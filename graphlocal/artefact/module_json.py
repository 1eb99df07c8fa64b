"""The model as JSON, without its operations: its modules with their modes, its tensors, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphlocal.artefact.document import Doc
from graphlocal.artefact.tensors import INFO_FIELDS, TensorInfo, describe, read_info
from graphlocal.artefact.values import decode, encode


@dataclass(frozen=True)
class ModuleInfo:
    """training: its mode. traced: that in which it was traced for training. same_as: the first path of a module that
    the model holds several times.
    """

    path: str
    training: bool
    traced: bool
    same_as: str | None


@dataclass(frozen=True)
class NamedTensor:
    """kind: parameter or buffer. stored: the first name of a tensor that has several (a tied weight)."""

    name: str
    kind: str
    stored: str
    requires_grad: bool
    persistent: bool
    info: TensorInfo


def modules_of(model: nn.Module, traced: dict[str, bool]) -> list[ModuleInfo]:
    """Every module, also where it is held again, parents first. traced: the modes of tracing by first paths."""
    first: dict[int, str] = {}
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        known = first.setdefault(id(module), path)
        found.append(ModuleInfo(path, module.training, traced[known], None if known == path else known))
    return found


def tensors_of(model: nn.Module) -> Iterator[tuple[NamedTensor, Tensor]]:
    """Every parameter and buffer under every name, in the model's order."""
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        named = [
            *(("parameter", *x) for x in module._parameters.items()),
            *(("buffer", *x) for x in module._buffers.items()),
        ]
        for kind, key, tensor in named:
            if tensor is not None:
                name = f"{path}.{key}" if path else key
                known = first.setdefault(id(tensor), name)
                persistent = key not in module._non_persistent_buffers_set
                yield NamedTensor(name, kind, known, tensor.requires_grad, persistent, describe(tensor, name)), tensor


def module_document(module: ModuleInfo) -> dict[str, Any]:
    """The fields of a module."""
    return {"path": module.path, "training": module.training, "traced": module.traced, "same_as": module.same_as}


def read_modules(doc: Doc) -> list[ModuleInfo]:
    """The modules: every one after its parent, each path once."""
    found: dict[str, ModuleInfo] = {}
    for item in doc.array():
        path, training, traced, same_as = item.fields("path", "training", "traced", "same_as")
        name = path.text()
        parent, _, last = name.rpartition(".")
        if name in found or (name != "" and (parent not in found or not last)) or (name == "") != (not found):
            raise path.error(f"{name!r:.80} is no new path below another module")
        first = None if same_as.value is None else same_as.one_of(found)
        if first is not None and (found[first].same_as is not None or f"{name}.".startswith(f"{first}.") or not first):
            raise same_as.error(f"{first!r:.80} can't stand in for it")
        found[name] = ModuleInfo(name, training.flag(), traced.flag(), first)
    return list(found.values())


_TENSOR_FIELDS = ("name", "kind", "stored", "requires_grad", "persistent", *INFO_FIELDS)


def tensor_document(tensor: NamedTensor) -> dict[str, Any]:
    """The fields of a tensor."""
    own = {name: getattr(tensor, name) for name in _TENSOR_FIELDS if name not in INFO_FIELDS}
    return {**own, **tensor.info.document()}


def read_tensors(doc: Doc) -> list[NamedTensor]:
    """Tensors by unique names; a tied one comes after the one that it is."""
    found: dict[str, NamedTensor] = {}
    for item in doc.array():
        name, kind, stored, requires_grad, persistent, *info = item.fields(*_TENSOR_FIELDS)
        if name.text() in found or not name.text():
            raise name.error(f"{name.value!r:.80} is the name of another tensor")
        made = NamedTensor(
            name.text(), kind.one_of(("parameter", "buffer")), stored.text(), requires_grad.flag(), persistent.flag(),
            read_info(*info),
        )  # fmt: skip
        first = found.get(made.stored, made)
        if (first is made) != (made.stored == made.name) or first.stored != made.stored or first.info != made.info:
            raise stored.error(f"{made.stored!r:.80} is not the first name of the same tensor")
        plain = getattr(torch, made.info.dtype)
        if made.requires_grad and not (plain.is_floating_point or plain.is_complex):
            raise requires_grad.error(f"a tensor of {made.info.dtype} has no gradient")
        found[made.name] = made
    return list(found.values())


# Signatures.

_KINDS = {kind.name: kind for kind in inspect._ParameterKind}


class _Omitted:
    """Stands for a default that JSON can't hold."""

    def __repr__(self) -> str:
        return "..."


OMITTED = _Omitted()


def signature_document(signature: inspect.Signature) -> list[dict[str, Any]]:
    """The parameters of a signature, without annotations."""
    found = []
    for parameter in signature.parameters.values():
        has_default = parameter.default is not parameter.empty
        default = encode(parameter.default) if has_default else None
        plain = default is None or isinstance(default, (bool, int, float, str))
        item = {"name": parameter.name, "kind": parameter.kind.name, "default": [default if plain else "..."]}
        found.append(item if has_default else {**item, "default": None})
    return found


def read_signature(doc: Doc) -> inspect.Signature:
    """The signature that `signature_document` wrote."""
    parameters = []
    for item in doc.array():
        name, kind, default = item.fields("name", "kind", "default")
        value: Any = inspect.Parameter.empty
        if default.value is not None:
            (stored,) = default.array(1) or [default]
            value = OMITTED if stored.value == "..." else decode(stored)
        try:
            parameters.append(inspect.Parameter(name.text(), _KINDS[kind.one_of(_KINDS)], default=value))
        except ValueError as error:
            raise item.error(str(error)[:100]) from None
    try:
        return inspect.Signature(parameters)
    except ValueError as error:
        raise doc.error(str(error)[:100]) from None
