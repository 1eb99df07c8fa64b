"""The training step of a compiled model in ONNX Runtime, for a training loop that evaluates in torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from graphlocal.runtime import LocalModule
from graphlocal.targets.onnx.trainer import OnnxTrainer


class OnnxStep:
    """`step(x, y) -> loss`, as `train_step` with cross-entropy; the weights are in ONNX Runtime until `read_back`.

    y: example labels, at least as many as the example inputs. Raises NotLowered and InputError as the
    export of a training step does.
    """

    def __init__(self, local: LocalModule, optimizer: torch.optim.Optimizer, y: Tensor) -> None:
        self.local = local
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.onnx"
            size = len(local.compiled.traced.arguments.leaves[0])
            self.exported = local.export(
                path, kind="training-step", loss_fn=cross_entropy, optimizer=optimizer, y=y[:size]
            )
            self.trainer = OnnxTrainer(path, threads=torch.get_num_threads())

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tensor(self.trainer.step(x, y))

    def read_back(self) -> None:
        """Copy parameters, buffers and feedback maps into the compiled model."""
        states = self.trainer.state_dict()
        own = {name: value for name, value in states.items() if not name.startswith("optimizer.")}
        self.local.load_state_dict(own, strict=False)
