"""The functions that a stored graph may call, by name; a file can name no other."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from graphlocal.artefact.values import needs_model

_PYTHON: dict[str, Callable[..., Any]] = {
    **{f"operator.{f.__name__}": f for f in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod,
        operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_,
        operator.or_,
    )},
    **{f"math.{f.__name__}": f for f in (math.ceil, math.floor, math.trunc)},
    **{f"torch.{f.__name__}": f for f in (
        torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_ite,
    )},
}  # fmt: skip
_HIGHER_ORDER: dict[str, Callable[..., Any]] = {
    f"higher_order.{name}": getattr(torch.ops.higher_order, name)
    for name in ("wrap_with_set_grad_enabled", "wrap_with_autocast")
}
TABLE = {**_PYTHON, **_HIGHER_ORDER}
_NAMES = {function: name for name, function in TABLE.items()}

_ATEN = re.compile(r"aten\.(__i?(?:and|or|xor)__|_?[a-zA-Z]\w*)\.(\w+)", re.ASCII)
_REFUSED = re.compile(
    r"(from_file|save|load|set_|set_data|resize_|resize_as_|_print|warn|record_stream)$|.*(unsafe_(index|masked)|"
    r"nested_view_from|_unsafe$|_compressed_tensor|cudnn_init|_use_cudnn|_pin_memory|_share)"
)
"""Operators of ATen that reach files, or memory beyond their tensors."""
_PLAIN_TYPES = re.compile(
    r"(Optional\[)?(List\[)?(Optional\[)?(Tensor|number|int|SymInt|float|bool|str|Device|complex|Generator|Layout|"
    r"MemoryFormat|ScalarType)\]*"
)


def name_of(function: Any) -> str:
    """The name of a function in a file; of one that is not in the table, a name that `find` refuses."""
    if isinstance(function, torch._ops.OpOverload):
        return str(function)
    if function in _NAMES:
        return _NAMES[function]
    if isinstance(function, torch._ops.HigherOrderOperator):
        return f"higher_order.{function.name()}"
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"


def find(name: str) -> Callable[..., Any]:
    """The function of that name. Raises NeedsModel for one that a file may not call."""
    if name in TABLE:
        return TABLE[name]
    match = _ATEN.fullmatch(name)
    if match and not _REFUSED.match(match[1]):
        packet = getattr(torch.ops.aten, match[1], None)
        found = getattr(packet, match[2], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
        if isinstance(found, torch._ops.OpOverload) and _is_plain(found):
            return found
    if name.startswith("graphlocal.guards."):
        raise needs_model("the path through forward depends on the data, and the file has one path only")
    raise needs_model(
        f"the graph calls {name!r:.100}, which can't be loaded from a file",
        why="a file may call the operators torch.ops.aten and arithmetic on sizes alone",
    )


def _is_plain(found: torch._ops.OpOverload) -> bool:
    """Whether an operator is torch's own, on tensors and plain values."""
    return torch._C._dispatch_has_kernel(found.name()) and all(
        _PLAIN_TYPES.fullmatch(str(argument.type)) for argument in found._schema.arguments
    )


def keywords(function: Any) -> frozenset[str]:
    """The names by which its arguments may be given."""
    if isinstance(function, torch._ops.OpOverload):
        return frozenset(argument.name for argument in function._schema.arguments)
    return frozenset()
