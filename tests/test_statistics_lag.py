"""A warning when BatchNorm's running statistics trail those of the batches, and none when they don't."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import graphlocal
from graphlocal.statistics_lag import EVERY, StatisticsLag


class Net(nn.Module):
    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.linear(x))))


def trained(model: nn.Module, batch: int = 16, steps: int = 60, drift: float = 0.0) -> graphlocal.LocalModule:
    """After steps on data whose mean moves by `drift` a step, as a layer's inputs do under fast updates."""
    local = graphlocal.compile(model, example_inputs=(torch.randn(batch, 4),))
    for step in range(steps):
        local(torch.randn(batch, 4) + drift * step).sum().backward()
    return local


def test_statistics_that_trail_are_warned_of_with_layer_and_remedy():
    local = trained(Net(), drift=0.3)
    with pytest.warns(UserWarning, match=r"the BatchNorm norm trail.*standard deviations.*graphlocal\.recalibrate"):
        local.eval()


def test_the_warning_comes_once_for_each_stretch_of_training():
    local = trained(Net(), drift=0.3)
    with pytest.warns(UserWarning, match="running statistics"):
        local.eval()
    local.train()
    local.eval()


def test_recalibrated_statistics_are_not_warned_of():
    local = trained(Net(), drift=0.3)
    graphlocal.recalibrate(local, [torch.randn(16, 4) + 18] * 3)
    local.eval()


@pytest.mark.parametrize("batch", [4, 64])
def test_statistics_that_keep_up_are_not_warned_of(batch):
    trained(Net(), batch=batch, steps=150).eval()


@pytest.mark.parametrize("model", [Net(momentum=None), nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))])
def test_models_without_moving_averages_are_not_watched(model):
    trained(model, drift=0.3).eval()


def test_a_frozen_norm_is_not_watched():
    model = Net().train()
    model.norm.eval()
    trained(model, drift=0.3).eval()


def test_watching_changes_neither_buffers_nor_updates():
    states = []
    for watched in (True, False):
        torch.manual_seed(0)
        local = graphlocal.compile(Net(), example_inputs=(torch.randn(16, 4),))
        local._lag.steps = EVERY - 2 if watched else 0
        for _ in range(3):
            local(torch.randn(16, 4)).sum().backward()
        states.append([*local.original.buffers(), *(p.grad for p in local.original.parameters())])
        assert local._lag.samples == watched
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_the_batch_s_statistics_are_found_from_the_step():
    model = Net()
    lag = StatisticsLag(model)
    lag.steps = EVERY - 1
    x = torch.randn(16, 4) + 2
    model.norm.running_mean.fill_(0.5)
    model.norm.running_var.fill_(4.0)
    with lag.watching():
        model(x)
    inner = model.linear(x)
    deviation, ratio = lag.seen["norm"]
    assert torch.allclose(deviation, (inner.mean(0) - 0.5) / 2, atol=1e-4)
    assert torch.allclose(ratio, (inner.var(0) / 4).log(), atol=1e-3)


def test_no_warning_is_raised_on_the_way_back_to_training():
    local = trained(Net(), drift=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local.train()
