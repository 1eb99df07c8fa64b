"""What runs the training step of a rule without a schedule, by the rule's `engine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from graphlocal.targets.lagrangian import LagrangianEngine
from graphlocal.targets.nodes import Nodes, StepCall
from graphlocal.targets.nonlinear import NonlinearEngine


class Engine(Protocol):
    """One training step in a loop of its own over the subgraphs."""

    def step(self, leaves: Sequence[Any], call: StepCall) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the gradient of each parameter that has one; leaves: the model's flat inputs."""
        ...


ENGINES: dict[str, Callable[[Nodes, Any, nn.Module], Engine]] = {
    "lagrangian": LagrangianEngine,
    "nonlinear": NonlinearEngine,
}
