"""Models whose own forward branches on the data: recorded with guards, one compilation for each path."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from training import assert_same_forward, assert_same_gradients, step

import graphlocal
import zoo
from graphlocal.errors import GuardFailure, TraceError
from graphlocal.guards import require_shape, require_value

DOUBLE = torch.float64
X = zoo.normal(4, 6).double()


class Branching(nn.Module):
    """The sign of the input's mean chooses the layer; BatchNorm and dropout come before the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.up, self.down, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.drop(self.norm(x))
        layer = self.up if x.mean() > 0 else self.down
        return self.head(torch.tanh(layer(z)))


class Rows(Branching):
    """Learns from the rows with a positive first entry alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 100:
            return self.head(x)
        return self.head(torch.tanh(self.up(x[x[:, 0] > 0])))


class Listed(Branching):
    """Reads a whole tensor into Python."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + sum(x.sign().sum(0).clamp(-1, 1).tolist())
        return self.head(torch.tanh(self.up(x))) * (2 if scale > 0 else 3)


class Slope(Branching):
    """Takes a derivative inside forward, behind a branch."""

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 10:
            return self.head(x)
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.up(x).square().sum(), x)
        return self.head(slope)


def positive(sign: float = 1.0) -> Tensor:
    return sign * X.abs()


def pair(kind: type[nn.Module], inputs: Tensor, rule: str = "backprop") -> tuple[graphlocal.LocalModule, nn.Module]:
    eager = kind().double()
    return graphlocal.compile(copy.deepcopy(eager), example_inputs=(inputs,), rule=rule), eager


@pytest.mark.parametrize("kind", [Branching, Rows, Listed])
def test_every_path_equals_autograd_and_is_compiled_once(kind):
    local, eager = pair(kind, positive())
    assert local.compiled.traced.rung == "recording"
    mixed = X * torch.tensor([1, -1, 1, -1], dtype=DOUBLE)[:, None]
    batches = [positive(), positive(-1) if kind is not Rows else mixed, positive(), 2 * positive(), mixed]
    for seed, x in enumerate(batches):
        true, found = step(eager, (x,), zoo.classify, seed), step(local, (x,), zoo.classify, seed)
        assert_same_forward(found, true)
        assert_same_gradients(found.gradients, true.gradients)
        for name, buffer in true.buffers.items():
            assert torch.equal(found.buffers[name], buffer), name
    known = len(local._cache)
    assert 2 <= known <= 3
    for seed, x in enumerate(batches):
        step(local, (x,), zoo.classify, seed)
    assert len(local._cache) == known


def test_the_fused_step_takes_the_path_of_its_batch():
    local, eager = pair(Branching, positive())
    train = graphlocal.train_step(local, lambda output, _: zoo.classify(output), torch.optim.SGD(local.parameters(), 1))
    optimizer = torch.optim.SGD(eager.parameters(), 1)
    for seed, x in enumerate([positive(-1), positive(), positive(-1)]):
        torch.manual_seed(seed)
        train(x, None)
        torch.manual_seed(seed)
        optimizer.zero_grad()
        zoo.classify(eager(x)).backward()
        optimizer.step()
    for (name, found), true in zip(local.original.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9, msg=name)


def test_rec_lra_teaches_the_layers_of_the_path_that_ran():
    local, _ = pair(Branching, positive(), rule="rec-lra")
    for x, taught, left in ((positive(), "up", "down"), (positive(-1), "down", "up")):
        gradients = step(local, (x,), zoo.classify).gradients
        assert gradients[f"{taught}.weight"].abs().sum() > 0
        assert gradients[f"{left}.weight"] is None


def test_a_tensor_computed_out_of_sight_is_refused():
    model = Slope().double()
    with pytest.raises(TraceError, match="out of the recorder's sight") as caught:
        graphlocal.compile(model, example_inputs=(positive(),))
    assert "test_record.py:" in str(caught.value)


@dataclass
class Result:
    logits: Tensor


class Wrapped(Branching):
    def forward(self, x: Tensor) -> Result:
        return Result(self.head(x))


def test_an_output_class_that_torch_does_not_know_is_named():
    with pytest.raises(TraceError, match="the model returns a Result") as caught:
        graphlocal.compile(Wrapped().double(), example_inputs=(positive(),))
    assert "torch.export.register_dataclass" in str(caught.value)


def test_a_path_that_python_s_random_numbers_choose_is_refused():
    with pytest.raises(TraceError, match="Python's random module"):
        graphlocal.compile(zoo.SkipPython(), example_inputs=zoo.vectors())


@pytest.mark.parametrize(("found", "recorded"), [(1.0, 2.0), (float("nan"), 1.0), (True, False), (3, 4)])
def test_a_value_guard_lets_only_the_recorded_value_pass(found, recorded):
    require_value(torch.tensor(found), found)
    with pytest.raises(GuardFailure, match="the recorded forward read"):
        require_value(torch.tensor(found), recorded)


def test_a_shape_guard_lets_only_the_recorded_shape_pass():
    require_shape(torch.zeros(2, 3), [2, 3])
    with pytest.raises(GuardFailure, match="had shape"):
        require_shape(torch.zeros(2, 3), [3, 2])
