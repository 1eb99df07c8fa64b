"""What the passes that rewrite modules, before tracing, have in common."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from graphlocal.errors import InputError

Report = TypeVar("Report")


@dataclass(frozen=True)
class Rewritten(Generic[Report]):
    """The new model, and what was done to it."""

    model: nn.Module
    report: Report


@dataclass(frozen=True)
class LeftAlone:
    """A module that stays as it is, and why."""

    path: str
    why: str


def left_alone_table(rows: Sequence[LeftAlone]) -> list[str]:
    """The end of a report, empty if nothing was left alone."""
    return ["", *aligned([("left alone", ""), *((shown_path(row.path), row.why) for row in rows)])] if rows else []


def listed_reasons(rows: Sequence[LeftAlone]) -> str:
    """Every module with its reason, in one line."""
    return "; ".join(f"{shown_path(row.path)}: {row.why}" for row in rows)


def copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """A deep copy that shares all parameters and buffers with the model, so that training one trains the other.

    Raises InputError for what is no model, or can't be copied.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}", remedy="pass a torch.nn.Module")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} can't be copied",
            why=f"{type(error).__name__}: {error}",
            remedy="keep in the model's attributes only what copy.deepcopy can copy",
        ) from error


def has_hooks(module: nn.Module) -> bool:
    """True if hooks, such as those of weight_norm, take part in what the module computes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def shown_path(path: str) -> str:
    """The path as reports print it."""
    return path or "(the model)"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, of three or more columns all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = len(widths) > 2
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) if numeric else cell for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines
