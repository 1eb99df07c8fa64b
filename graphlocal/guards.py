"""Guards: operations of a recorded graph that raise `GuardFailure` where the data would take another path."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from graphlocal.errors import GuardFailure


def require_value(tensor: Tensor, value: complex) -> None:
    """Raise GuardFailure if the one element of `tensor` is not `value`."""
    found = tensor.item()
    if found != value and not (found != found and value != value):  # NaN equals NaN here
        raise GuardFailure(f"the recorded forward read {value}, these data give {found}")


def require_shape(tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise GuardFailure if `tensor` has another shape."""
    if list(tensor.shape) != list(shape):
        raise GuardFailure(f"the recorded forward had shape {list(shape)}, these data give {list(tensor.shape)}")


def is_guard(node: fx.Node) -> bool:
    """True for a check that the data take the recorded path."""
    return node.target in (require_value, require_shape)


def has_guards(module: fx.GraphModule) -> bool:
    """True if a graph holds for some data only."""
    return any(is_guard(node) for node in module.graph.nodes)
