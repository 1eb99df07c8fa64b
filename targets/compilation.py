"""What targets need to know of a compiled model, whoever holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from graphlocal.ir import LocalGraph
from graphlocal.rules import Rule
from graphlocal.targets.training_graph import TrainingGraph


class Compilation(Protocol):
    """A model compiled for one kind of call; `graphlocal.compiler.Compiled` is one."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def error_weights(self) -> nn.Module: ...

    @property
    def rule(self) -> Rule: ...

    @property
    def graph(self) -> LocalGraph: ...

    @property
    def training(self) -> TrainingGraph: ...

    @property
    def weights(self) -> tuple[nn.Parameter, ...]: ...

    @property
    def differentiable(self) -> tuple[bool, ...]: ...

    @property
    def guarded(self) -> bool: ...

    @property
    def streams(self) -> int: ...

    @property
    def calibrates(self) -> bool: ...

    @property
    def recomputed(self) -> frozenset[str]: ...

    @property
    def run_passes(self) -> tuple[Callable[..., Any], Callable[..., Any]]: ...

    @property
    def run_fused_passes(self) -> tuple[Callable[..., Any], Callable[..., Any]]: ...
