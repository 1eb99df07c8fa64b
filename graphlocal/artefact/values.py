"""Arguments of operations and structures of inputs and outputs, as JSON and back.

None, true, false, numbers, strings and lists stand for themselves; everything else is a dictionary with one key:
`{"node": "relu_1"}`, `{"dtype": "float32"}`, `{"tuple": [...]}`, `{"float": "inf"}`. What no key stands for is
written as `{"unknown": "package.Class"}`: it can be compared, and is refused by name where it would be needed.
"""

from __future__ import annotations

import collections
import keyword
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphlocal.artefact.document import Doc
from graphlocal.errors import InputError

_ENUMS: dict[str, dict[str, Any]] = {
    "memory_format": {
        str(x): x for x in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
    },
    "layout": {str(torch.strided): torch.strided},
}
_DTYPES = {str(x): x for x in vars(torch).values() if isinstance(x, torch.dtype)}
_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class NeedsModel(InputError):
    """A part of a stored graph that is only in the model's own code."""


def needs_model(message: str, why: str | None = None) -> NeedsModel:
    """The error, with what to do about it."""
    return NeedsModel(message, why=why, remedy="pass the model: graphlocal.load(path, model=my_model)")


def encode(value: Any) -> Any:
    """JSON for a value; never fails."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    for kind, known in _ENUMS.items():
        if isinstance(value, (torch.memory_format, torch.layout)) and str(value) in known:
            return {kind: str(value)}
    if isinstance(value, (torch.dtype, torch.device)):
        return {"dtype" if isinstance(value, torch.dtype) else "device": str(value)}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, slice):
        return {"slice": [encode(x) for x in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, (list, tuple)) and (type(value) in (list, tuple, torch.Size) or isinstance(value, list)):
        items = [encode(item) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    return {"unknown": f"{type(value).__module__}.{type(value).__qualname__}"}


def decode(doc: Doc, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """The value that `encode` wrote; nodes: those that it may name.

    Raises FileFormatError, and NeedsModel for a value that JSON could not hold.
    """
    value = doc.value
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        return doc.number(-(2**63))
    if isinstance(value, list):
        return [decode(item, nodes) for item in doc.array()]
    pairs = list(doc.items())
    if len(pairs) != 1:
        raise doc.error("expected one key that says what the value is")
    kind, inner = pairs[0]
    if kind == "unknown":
        raise needs_model(f"the file can't hold a {inner.text():.80}", why=f"{doc.place} is one")
    if kind not in _DECODERS:
        raise doc.error(f"unknown kind of value {kind!r:.60}")
    return _DECODERS[kind](inner, nodes or {})


def _several(doc: Doc, nodes: Mapping[str, fx.Node], count: int) -> list[Any]:
    found = [decode(item, nodes) for item in doc.array(count)]
    if len(found) != count:
        raise doc.error(f"expected {count} values")
    return found


def _known(table: Mapping[str, Any]) -> Callable[[Doc, Mapping[str, fx.Node]], Any]:
    return lambda doc, _: table[doc.one_of(table)]


def _node(doc: Doc, nodes: Mapping[str, fx.Node]) -> fx.Node:
    return nodes[doc.one_of(nodes)]


def _slice(doc: Doc, nodes: Mapping[str, fx.Node]) -> slice:
    start, stop, step = _several(doc, nodes, 3)
    return slice(start, stop, step)


def _complex(doc: Doc, nodes: Mapping[str, fx.Node]) -> complex:
    parts = _several(doc, nodes, 2)
    if not all(isinstance(part, float) for part in parts):
        raise doc.error("expected two floats")
    return complex(*parts)


def _device(doc: Doc, _: Mapping[str, fx.Node]) -> torch.device:
    try:
        return torch.device(doc.text())
    except RuntimeError:
        raise doc.error("no such device") from None


_DECODERS: dict[str, Callable[[Doc, Mapping[str, fx.Node]], Any]] = {
    "node": _node,
    "float": _known(_SPECIAL),
    "dtype": _known(_DTYPES),
    "device": _device,
    "memory_format": _known(_ENUMS["memory_format"]),
    "layout": _known(_ENUMS["layout"]),
    "complex": _complex,
    "slice": _slice,
    "ellipsis": lambda doc, _: [doc.flag(), ...][1],
    "tuple": lambda doc, nodes: tuple(decode(item, nodes) for item in doc.array()),
    "dict": lambda doc, nodes: {key: decode(item, nodes) for key, item in doc.items()},
}


# Structures.

_BUILT_IN: dict[str, Any] = {
    "tuple": tuple, "list": list, "dict": dict, "OrderedDict": collections.OrderedDict, "deque": collections.deque,
}  # fmt: skip


def encode_spec(spec: pytree.TreeSpec) -> Any:
    """JSON for a pytree structure: `"*"` for a leaf, else type, context and parts."""
    if spec.is_leaf():
        return "*"
    parts = [encode_spec(part) for part in spec.children()]
    if spec.type is collections.namedtuple:  # pytree's own name for all of them
        return {"named tuple": spec.context.__name__, "context": list(spec.context._fields), "parts": parts}
    name = next((name for name, type in _BUILT_IN.items() if type is spec.type), None)
    context = encode(spec.context)
    if name is not None:
        return {"built-in": name, "context": context, "parts": parts}
    return {"registered": _qualified(spec.type), "context": context, "parts": parts}


def decode_spec(doc: Doc) -> pytree.TreeSpec:
    """The structure that `encode_spec` wrote.

    A named tuple becomes a new one of the same name and fields. Any other class must be known to pytree in this
    process: none is imported. Raises FileFormatError, and NeedsModel for a class that is not known.
    """
    if doc.value == "*":
        return pytree.treespec_leaf()
    kinds = [kind for kind in ("named tuple", "built-in", "registered") if kind in (doc.value or ())]
    if not isinstance(doc.value, dict) or len(kinds) != 1:
        raise doc.error("expected '*', or a type with its parts")
    name, context, listed = doc.fields(kinds[0], "context", "parts")
    parts = [decode_spec(part) for part in listed.array()]
    if kinds[0] == "named tuple":
        fields = [field.text() for field in context.array()]
        if not all(map(_is_identifier, [name.text(), *fields])) or len({*fields}) != len(parts):
            raise doc.error("no named tuple has such fields")
        made: Any = collections.namedtuple(name.text(), fields)  # type: ignore[misc]
        return pytree.TreeSpec(collections.namedtuple, made, parts)
    if kinds[0] == "built-in":
        return _built_in(doc, _BUILT_IN[name.one_of(_BUILT_IN)], decode(context), parts)
    known = next((t for t in pytree.SUPPORTED_NODES if isinstance(t, type) and _qualified(t) == name.text()), None)
    if known is None:
        raise needs_model(
            f"the model takes or returns a {name.text():.120}",
            why="that class is not known to torch.utils._pytree in this process (import its module first)",
        )
    return pytree.TreeSpec(known, decode(context), parts)


def _built_in(doc: Doc, type: Any, context: Any, parts: list[pytree.TreeSpec]) -> pytree.TreeSpec:
    if type in (dict, collections.OrderedDict):
        if not isinstance(context, list) or len(context) != len(parts) or len({repr(key) for key in context}) != len(
            parts
        ) or not all(isinstance(key, (str, int)) for key in context):  # fmt: skip
            raise doc.error("expected one key for each part")
    elif context is not None and not (type is collections.deque and isinstance(context, int)):
        raise doc.error(f"a {type.__name__} has no context")
    return pytree.TreeSpec(type, context, parts)


def _qualified(type: Any) -> str:
    return f"{type.__module__}.{type.__qualname__}"


def _is_identifier(name: str) -> bool:
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")
