"""A cache of traces, so that compiling the same architecture again skips the tracer.

The key is everything that forward can depend on: classes, modes, plain attributes, shapes of parameters and
buffers, how parameters are tied, and the example inputs' structure and sizes. A model with a part that can't be
compared (a tensor attribute, a hook, an object without plain attributes) is not cached. A hit is bound to the
new model's tensors and goes through the same self-check as a fresh trace, so a stale one can't do harm.
"""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx, nn

from graphlocal.arguments import Arguments

SIZE = 32
"""How many traces are kept; the ones not used longest go first."""

_OWN = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Enum, type,
          types.FunctionType, types.BuiltinFunctionType)  # fmt: skip
_DEPTH = 8


class _Incomparable(Exception):
    pass


@dataclass(frozen=True)
class CachedTrace:
    """A normalized graph without its tensors. attributes: what its `get_attr` nodes name besides model states."""

    graph: fx.Graph
    attributes: dict[str, Any]
    details: tuple[Any, ...]

    def bind(self, model: nn.Module) -> fx.GraphModule:
        """The graph on another model's tensors."""
        attributes = dict(self.attributes)
        for node in self.graph.find_nodes(op="get_attr"):
            if node.target not in attributes:
                attributes[node.target] = _lookup(model, node.target)
        return fx.GraphModule(attributes, _copy(self.graph), class_name=type(model).__name__)


_cache: OrderedDict[Hashable, CachedTrace] = OrderedDict()


def find(key: Hashable | None) -> CachedTrace | None:
    """The trace kept under a key, which becomes the last to go."""
    if key is None or key not in _cache:
        return None
    _cache.move_to_end(key)
    return _cache[key]


def keep(key: Hashable | None, module: fx.GraphModule, model: nn.Module, details: tuple[Any, ...]) -> None:
    """Keep a trace; details come back with it."""
    if key is None or any(node.op == "call_module" for node in module.graph.nodes):
        return
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    targets = (str(node.target) for node in module.graph.find_nodes(op="get_attr"))
    attributes = {target: _lookup(module, target) for target in targets if target not in own}
    _cache[key] = CachedTrace(_copy(module.graph), attributes, details)
    while len(_cache) > SIZE:
        _cache.popitem(last=False)


def clear() -> None:
    """Forget all traces."""
    _cache.clear()


def fingerprint(model: nn.Module, arguments: Arguments, dynamic: Hashable) -> Hashable | None:
    """The key of a trace, or None if the model has a part that can't be compared."""
    first_name: dict[int, str] = {}
    try:
        parts = list(model.named_modules(remove_duplicate=False))
        tensors = [_tensors(path, module, first_name) for path, module in parts]
        modules = tuple(
            (path, type(module), module.training, _attributes(module, first_name), own)
            for (path, module), own in zip(parts, tensors, strict=True)
        )
        inputs = tuple(
            (x.shape, x.dtype, x.device, x.requires_grad) if isinstance(x, torch.Tensor) else _frozen(x, {})
            for x in arguments.leaves
        )
    except _Incomparable:
        return None
    return modules, inputs, str(arguments.spec), dynamic, torch.get_default_dtype()


def _attributes(module: nn.Module, known: dict[int, str]) -> Hashable:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        raise _Incomparable
    return tuple((name, _frozen(value, known)) for name, value in module.__dict__.items() if name not in _OWN)


def _tensors(path: str, module: nn.Module, first_name: dict[int, str]) -> Hashable:
    """Names and kinds of the module's own tensors, and the name under which each was seen first."""
    found: list[Hashable] = []
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            found.append((name, None))
            continue
        first = first_name.setdefault(id(tensor), f"{path}.{name}")
        found.append((name, first, tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad))
    return tuple(found)


def _frozen(value: Any, known: dict[int, str], depth: int = 0) -> Hashable:
    """A hashable value that is equal for attributes that behave alike."""
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, weakref.ReferenceType):
        value = value()
    if id(value) in known:
        return ("state", known[id(value)])
    if depth > _DEPTH or isinstance(value, (torch.Tensor, nn.Module, torch.Generator)):
        raise _Incomparable
    if isinstance(value, dict):
        return (
            type(value),
            tuple((_frozen(k, known, depth + 1), _frozen(v, known, depth + 1)) for k, v in value.items()),
        )
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_frozen(v, known, depth + 1) for v in value))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(_frozen(v, known, depth + 1) for v in value))
    foreign = type(value).__module__.partition(".")[0] not in ("builtins", "torch", "numpy")
    if (is_dataclass(value) or foreign) and hasattr(value, "__dict__"):
        return (type(value), _frozen(dict(value.__dict__), known, depth + 1))
    raise _Incomparable


def _lookup(root: Any, name: str) -> Any:
    for part in name.split("."):
        root = getattr(root, part)
    return root


def _copy(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    result = copy.graph_copy(graph, {})
    copy.output(result)
    return copy
