"""What the optimizer of exported models may not take away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphlocal

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
def test_a_weight_without_a_gradient_stays_as_it_is_under_adam(tmp_path: Path) -> None:
    """0 / (sqrt(0) + eps): without the eps it were not a number."""
    from graphlocal.targets.onnx.trainer import OnnxTrainer

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    x[:, 1] = 0
    local = graphlocal.compile(model, example_inputs=x, rule="rec-lra")
    optimizer = torch.optim.Adam(local.parameters(), 0.01)
    path = tmp_path / "step.onnx"
    local.export(path, kind="training-step", loss_fn=nn.functional.cross_entropy, optimizer=optimizer, y=y)
    trainer = OnnxTrainer(path, threads=1)
    for _ in range(2):
        nn.functional.cross_entropy(local(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.step(x, y)
    for name, value in trainer.model_state().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_numbers_close_to_nothing_stay_in_an_exported_model(tmp_path: Path) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            return y * 1.000009 / (x.abs().sum(1, keepdim=True) + 1e-8)

    model = Normalized()
    nn.init.zeros_(model.fc.bias)
    nn.init.constant_(model.fc.weight, 0.5)
    x = torch.rand(3, 4)
    path = tmp_path / "model.onnx"
    graphlocal.compile(model, example_inputs=x, rule="rec-lra").export(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x[1] = 0
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, model(x).detach().numpy(), rtol=2e-6, atol=0)
