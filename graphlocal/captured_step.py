"""A training step captured in one CUDA graph. Written without a GPU at hand: **not yet run**.

The whole step of `train_step` is recorded: forward pass, loss, error pass on all its streams, optimizer. A replay
issues every kernel at once, so that the host's time per piece no longer counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphlocal.errors import InputError
from graphlocal.step import TrainStep

WARM_UP = 3
"""Ordinary steps before the capture: they make the optimizer's state, and let libraries choose their kernels."""


class CapturedStep:
    """`step(x, y) -> loss` for tensors of one shape, dtype and device; made from a `TrainStep`.

    The first `WARM_UP` calls run the step as it is, the next one captures it, and from then on it is replayed. The
    learning rate, and everything else that is no tensor on the GPU, keeps the value that it had at the capture.

    Raises InputError without a GPU, for a model that checks its updates (`local.check_finite`, which waits for the
    device), and for an optimizer that can't be captured.
    """

    def __init__(self, step: TrainStep) -> None:
        device = next(step.local.parameters()).device
        if device.type != "cuda":
            raise InputError(f"the model is on {device}, and only CUDA can capture a step", remedy="call step(x, y)")
        if step.local.check_finite:
            raise InputError(
                "the step waits for the device to see whether an update is a number",
                remedy="set local.check_finite = False before capturing",
            )
        if step.optimizer is None or not all(g.get("capturable", True) for g in step.optimizer.param_groups):
            raise InputError(
                f"this {type(step.optimizer).__name__} keeps its step count on the host",
                remedy="make it with capturable=True",
            )
        self.step, self.device = step, device
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._warm_up(x, y)
        if self.graph is None:
            self._capture(x, y)
        for given, static in ((x, self.x), (y, self.y)):
            if given.shape != static.shape or given.dtype != static.dtype:
                raise InputError(
                    f"the step was captured for {static.dtype} of shape {list(static.shape)}",
                    why=f"this call has {given.dtype} of shape {list(given.shape)}",
                    remedy="drop the last, smaller batch, or call the step itself on it",
                )
            static.copy_(given)
        assert self.graph is not None
        self.graph.replay()
        return self.loss.clone()

    def _warm_up(self, x: Tensor, y: Tensor) -> Tensor:
        """A step on a stream of its own, as captures demand of what comes before them."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            loss = self.step(x, y)
        torch.cuda.current_stream(self.device).wait_stream(side)
        return loss

    def _capture(self, x: Tensor, y: Tensor) -> None:
        """Record one step; nothing runs, so that the model stays as it is."""
        self.x, self.y = x.clone(), y.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.step(self.x, self.y)
        self.graph = graph
